"""`sam3jax plan`: what is counted is what XLA counts, what is found is the largest, and what cannot be is said."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import PartitionSpec as P

from sam3jax import plan as command
from sam3jax.config import ConfigError, dump_config, load_config, parse_config
from sam3jax.training import micro_batch, plan, targets
from sam3jax.training.mesh import make_mesh
from sam3jax.training.precision import precision_line
from sam3jax.types import AXIS
from tests.batches import small_config
from tests.small_run import SIZES

A, B = jnp.zeros((3, 5, 7)), jnp.zeros((3, 7, 11))
PICTURE, KERNEL = jnp.zeros((2, 9, 9, 6)), jnp.zeros((3, 3, 2, 4))


def product(a, b):
    return a @ b


def grouped(x, k):
    return jax.lax.conv_general_dilated(
        x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )  # fmt: skip


def many(a, b):
    return jax.lax.scan(lambda c, _: (c, a @ b), 0.0, length=4)[1]


def either(a, b):
    return jax.lax.cond(a.sum() > 0, lambda: (a @ b)[:, :2, :2], lambda: a[:, :2, :2])


@pytest.mark.parametrize(
    ("function", "inputs", "want"),
    [(product, (A, B), 2 * 3 * 5 * 7 * 11), (grouped, (PICTURE, KERNEL), 2 * 2 * 7 * 7 * 4 * 9 * 2),
     (many, (A, B), 4 * 2 * 3 * 5 * 7 * 11), (either, (A, B), 2 * 3 * 5 * 7 * 11),
     (jax.checkpoint(product), (A, B), 2 * 3 * 5 * 7 * 11)],
)  # fmt: skip
def test_products_and_convolutions_are_counted(function, inputs, want):
    if function is grouped:  # two groups of three channels
        inputs = (PICTURE, jnp.zeros((3, 3, 3, 4)))
        want = 2 * 2 * 7 * 7 * 4 * 9 * 3
    assert plan.flops(jax.make_jaxpr(function)(*inputs).jaxpr) == want


def test_a_product_costs_what_xla_says():
    cost = jax.jit(product).lower(A, B).cost_analysis()
    assert plan.flops(jax.make_jaxpr(product)(A, B).jaxpr) == cost["flops"]


def test_what_devices_send_is_read_from_the_program():
    mesh = make_mesh(jax.devices()[:4])
    send = lambda x, y: (jax.lax.psum(x, AXIS), jax.lax.all_gather(y, AXIS))
    split = jax.shard_map(send, mesh=mesh, in_specs=P(AXIS), out_specs=P(), check_vma=False)
    text = jax.jit(split).lower(jnp.zeros((8, 3)), jnp.zeros((4, 5))).compile().as_text()
    assert plan.collectives(text) == {"all-reduce": (1, 24), "all-gather": (1, 80)}
    tuples = "%a = (f32[2,3]{1,0:T(8,128)}, /*index=5*/bf16[4]{0}) all-reduce-start(%b, %c), channel_id=1"
    assert plan.collectives(tuples) == {"all-reduce": (1, 32)}


def linear(config, devices):
    """In the place of a compilation: 3 GB and 2 GB a picture."""
    return plan.Needs(
        3 * 10**9, 2 * 10**9 * config.micro_batch, 1e12, {}, (), 0.0, 5, config.batch_size
    )


@pytest.mark.parametrize("gigabytes", [4, 5.5, 8, 24, 80])
def test_the_largest_micro_batch_is_the_largest_that_fits(monkeypatch, gigabytes):
    monkeypatch.setattr(plan, "needs", linear)
    room = plan.USABLE * gigabytes * 1e9
    most, found = micro_batch.most_that_fits(parse_config({}), [None] * 2, room)
    assert most == max(0, int((plan.USABLE * gigabytes - 3) // 2))
    assert found.pictures == 2 * max(most, 1)
    assert (found.peak > room) == (most == 0)


@pytest.mark.parametrize(("frames", "devices"), [(1, 1), (3, 1), (3, 2), (4, 2)])
def test_the_search_asks_for_whole_clips(monkeypatch, frames, devices):
    """Any number of frames may be held at once; a batch is of whole clips."""
    asked = []
    monkeypatch.setattr(plan, "needs", lambda c, d: asked.append(c) or linear(c, d))
    config = parse_config({"task": "clips", "clips": {"frames": frames}})
    most, _ = micro_batch.most_that_fits(config, [None] * devices, 20e9)
    assert most == 8
    for c in asked:
        assert c.batch_size % frames == c.batch_size % (c.micro_batch * devices) == 0


@pytest.mark.parametrize("seed", range(200))
def test_what_is_found_fits_and_takes_few_compilations(seed):
    """Any memory that grows, in any bend: what is chosen was compiled and fits. On a line it is the largest."""
    rng = np.random.default_rng(seed)
    choices = sorted(
        rng.choice(np.arange(1, 200), int(rng.integers(1, 12)), replace=False).tolist()
    )
    bend = rng.choice([1.0, 0.7, 1.4])
    peak = lambda n: int(1000 + rng_slope * n**bend)
    rng_slope, room = rng.uniform(1, 50), rng.uniform(500, 8000)
    compiled = []
    needs_of = lambda n: compiled.append(n) or plan.Needs(peak(n), 0, 0.0, {}, (), 0.0, 0, n)
    most, tried = micro_batch.largest(needs_of, room, choices)
    assert sorted(compiled) == sorted(tried)
    assert most == 0 or peak(most) <= room
    assert most or peak(choices[0]) > room
    if bend == 1.0:
        assert most == max((n for n in choices if peak(n) <= room), default=0)
        assert len(compiled) <= 5


def test_auto_on_a_cpu_is_the_whole_share_and_is_said(tmp_path):
    mesh = make_mesh(jax.devices()[:2])
    config = small_config(batch_size=6, micro_batch="auto", output=str(tmp_path))
    chosen, number, said = micro_batch.resolve(config, mesh)
    assert (chosen.micro_batch, number) == (3, 1)
    assert "all 3 pictures" in said
    with pytest.raises(ConfigError, match="use a multiple of 2"):
        micro_batch.resolve(small_config(batch_size=5, micro_batch="auto"), mesh)
    plain = small_config(batch_size=6, micro_batch=1)
    assert micro_batch.resolve(plain, mesh) == (plain, 3, None)


def test_auto_takes_what_fits_and_a_run_keeps_it(monkeypatch, tmp_path):
    """Of an accelerator's memory, 3 GB and 2 GB a picture: of 12 pictures a device 4 fit, and divide them."""
    mesh = make_mesh(jax.devices()[:2])
    config = small_config(batch_size=24, micro_batch="auto", output=str(tmp_path))
    monkeypatch.setattr(plan, "needs", linear)
    monkeypatch.setattr(micro_batch, "backend_of", lambda mesh: "gpu")
    monkeypatch.setattr(micro_batch, "_limit", lambda mesh: int(14e9))
    chosen, number, said = micro_batch.resolve(config, mesh)
    assert (chosen.micro_batch, number) == (4, 3)
    assert "auto takes 4 of 12" in said
    assert "compiled 3 times" in said
    (tmp_path / "config.yaml").write_text(dump_config(chosen))
    monkeypatch.setattr(micro_batch, "_limit", lambda mesh: int(90e9))
    again, number, said = micro_batch.resolve(config, mesh)
    assert (again, number) == (chosen, 3)
    assert "keeps the 4" in said


def test_auto_refuses_a_device_without_room(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "needs", linear)
    monkeypatch.setattr(micro_batch, "backend_of", lambda mesh: "gpu")
    monkeypatch.setattr(micro_batch, "_limit", lambda mesh: int(4e9))
    config = small_config(batch_size=2, micro_batch="auto", output=str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs 5\.00 GB, and a device has 3\.68 GB"):
        micro_batch.resolve(config, make_mesh(jax.devices()[:1]))


def test_a_plan_chooses_as_a_training_would(words, monkeypatch, capsys):
    monkeypatch.setattr(plan, "needs", linear)
    monkeypatch.setattr(
        targets, "here", lambda: (targets.Card("a card", int(8.8e9), 1.0, {}), [None])
    )
    assert command.main([*words, "batch_size=6", "micro_batch=auto"]) == 0
    out = capsys.readouterr().out
    assert "auto takes 2 of 6 pictures" in out
    assert "6, 2 at once on a device" in out


@pytest.mark.parametrize("value", ["automatic", "0", "1.5"])
def test_another_word_is_refused(value):
    with pytest.raises(ConfigError, match="expected a whole number, 1 to 1,000,000, auto, or null"):
        load_config(None, [f"micro_batch={value}"])


def test_auto_is_read_written_and_read_again():
    config = load_config(None, ["micro_batch=auto", "batch_size=4"])
    assert config.micro_batch == "auto"
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert load_config(None, ["micro_batch=2"]).micro_batch == 2


@pytest.mark.parametrize(
    ("dtype", "platform", "capability", "asked", "said"),
    [("float32", "gpu", "9.0", None, "TF32"), ("float32", "gpu", "9.0", "highest", "at highest"),
     ("float32", "gpu", "7.5", None, "no TF32"), ("bfloat16", "gpu", "8.0", None, "bfloat16, added up in float32"),
     ("bfloat16", "gpu", "7.5", None, "no units"), ("float32", "tpu", None, None, "bfloat16 (7 bits)"),
     ("float32", "cpu", None, None, None)],
)  # fmt: skip
def test_the_log_says_the_precision_of_products(dtype, platform, capability, asked, said):
    class Device:
        pass

    device = Device()
    device.platform = platform
    if capability:
        device.compute_capability = capability
    with jax.default_matmul_precision(asked):
        line = precision_line(small_config(model={"compute_dtype": dtype}).model, device)
    assert line is None if said is None else said in line


def test_float16_is_refused():
    with pytest.raises(ConfigError, match="expected float32 or bfloat16"):
        load_config(None, ["model.compute_dtype=float16"])


@pytest.fixture
def words():
    data = {"data.train": "shapes", "data.shapes_train": 4, "data.shapes_valid": 2, "data.shapes_size": 96, "batch_size": 2}  # fmt: skip
    model = {f"model.{k}": v for k, v in SIZES.items()}
    return [f"{k}={v}" for k, v in {**data, **model, "lora.targets": "[transformer.decoder.*]"}.items()]  # fmt: skip


def test_a_plan_of_what_is_here_agrees_with_the_compiler(words, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SAM3JAX_CACHE", str(tmp_path))
    own, devices = targets.here()
    monkeypatch.setattr(targets, "here", lambda: (own, devices[:2]))
    said = []
    real = plan.needs
    monkeypatch.setattr(plan, "needs", lambda *a: said.append(real(*a)) or said[-1])
    assert command.main(words) == 0
    out = capsys.readouterr().out
    (found,) = said
    assert f"parameters trained      {found.trained:,}" in out
    assert "all-reduce" in out
    # The gradient, once: every trained number, and the terms of the loss.
    assert 4 * found.trained < found.collectives["all-reduce"][1] < 4 * found.trained + 1000
    assert found.arguments > 4 * 3 * found.trained  # weights and two moments
    assert found.flops > 1e6
    assert "nothing was run" in out


def test_what_does_not_fit_says_which_settings_would_help(words, monkeypatch, capsys):
    def compiled(config, devices):
        size = 10**9 if config.loss.mask_resolution == "prediction" else 9 * 10**9
        return plan.Needs(size, (config.micro_batch or 2) * 10**9, 1e12, {}, (), 0.0, 5, 2)

    monkeypatch.setattr(plan, "needs", compiled)
    monkeypatch.setattr(targets, "here", lambda: (targets.Card("a card", 4 * 10**9, 1e9, {"float32": 1e12}), [None]))  # fmt: skip
    assert command.main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(
        n for n, line in enumerate(lines) if line.startswith("it does not fit: 7.32 GB too much")
    )
    best = [line for line in lines[at:] if " GB " in line][1]
    assert "loss.mask_resolution=prediction" in best
    assert "3.00 GB  fits" in best
    assert "no update is faster than 9.000 s (1.000 s of products" in "\n".join(lines)


@pytest.mark.parametrize(("train", "devices"), [("lora", 1), ("lora", 8), ("all", 8)])
def test_only_remedies_that_go_with_the_run_are_tried(monkeypatch, train, devices):
    asked = []
    monkeypatch.setattr(plan, "needs", lambda c, d: asked.append(c) or linear(c, d))
    command.remedies(small_config(train=train, batch_size=16, micro_batch=2), [None] * devices)
    assert any(c.shard for c in asked) == (devices > 1)
    assert any(c.base_dtype == "int8" for c in asked) == (train == "lora")


@pytest.mark.parametrize(
    ("task", "own"),
    [("detect", "loss.mask_chunk"), ("clips", "loss.mask_chunk"), ("clicks", "clicks.")],
)
def test_remedies_are_of_settings_that_the_task_reads(monkeypatch, task, own, capsys):
    monkeypatch.setattr(plan, "needs", linear)
    config = small_config(task=task, batch_size=16, micro_batch=2)
    command.remedies(config, [None])
    tried = capsys.readouterr().out
    assert f"tried {own}" in tried
    foreign = {
        "detect": ("clips.", "clicks."),
        "clips": ("clicks.",),
        "clicks": ("clips.", "loss.", "data."),
    }
    assert not any(f"tried {section}" in tried for section in foreign[task])


def test_a_hub_id_is_planned_for_without_its_weights(words, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(plan, "needs", lambda c, d: asked.append(c) or linear(c, d))
    assert command.main([*words, "micro_batch=1", "init=facebook/sam3"]) == 0
    assert asked[0].init is None
    assert "facebook/sam3 is not downloaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("card", "setting", "said"),
    [("t4", "compute_dtype=bfloat16", "NVIDIA T4 has no units for bfloat16"),
     ("t4", "fused_attention=true", "NVIDIA T4 is too old for cuDNN's fused attention"),
     ("h100", "fused_attention=true", "its own workspace is not counted"), ("h100", "compute_dtype=bfloat16", None),
     ("v5e", "fused_attention=true", None)],
)  # fmt: skip
def test_what_a_card_cannot_do_and_a_plan_not_know_is_said(
    words, monkeypatch, capsys, card, setting, said
):
    monkeypatch.setattr(plan, "needs", linear)
    monkeypatch.setattr(targets, "target", lambda text: (targets.CARDS[text], [None]))
    command.main([*words, f"model.{setting}", "micro_batch=1", "--device", card])
    first, *_ = capsys.readouterr().out.splitlines()
    assert said in first if said else first.startswith("compiling for")


@pytest.mark.parametrize(
    ("stats", "memory"),
    [({"bytes_limit": 17 * 10**9}, 17 * 10**9), (None, targets.CARDS["l4"].memory)],
)
def test_a_card_that_is_here_has_what_jax_may_take_of_it(monkeypatch, stats, memory):
    class Device:
        device_kind = "NVIDIA L4"
        memory_stats = staticmethod(lambda: stats)

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    card, _ = targets.here()
    assert (card.name, card.memory) == ("NVIDIA L4", memory)
    assert card.rates == targets.CARDS["l4"].rates


@pytest.mark.parametrize(
    ("text", "said"),
    [("h101", "expected one of h200, h100"), ("h100:0", "expected one of"), ("h100:x", "expected one of"),
     ("v5e:3", "have 1, 4, 8, 16 chips"), ("", "expected one of")],
)  # fmt: skip
def test_a_device_that_is_not_known_is_a_sentence(text, said):
    with pytest.raises(ConfigError, match=said):
        targets.target(text)


@pytest.mark.parametrize("name", ["a100", "v6e"])
def test_without_its_compiler_the_extra_is_named(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sam3jax\[plan\]'"):
        targets.target(name)


def test_rates_are_those_of_data_sheets():
    assert all(card.memory < 200 * targets.GIB for card in targets.CARDS.values())
    assert targets.CARDS["h100"].rates["bfloat16"] == pytest.approx(989e12)
    assert np.isclose(targets.CARDS["v5e"].rates["bfloat16"], 197e12)
