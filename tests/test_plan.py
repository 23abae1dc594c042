"""`sam3jax plan`: what is counted is what XLA counts, what is found is the largest, and what cannot be is said."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sam3jax import plan as command
from sam3jax.config import ConfigError, parse_config
from sam3jax.training import plan, targets
from sam3jax.training.mesh import make_mesh
from sam3jax.types import AXIS
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
    card = targets.Card("a card", int(gigabytes * 1e9), 1.0, {})
    config, devices = plan.with_micro_batch(parse_config({}), 1, 2), [None] * 2
    most, found = plan.most_that_fits(config, devices, card, linear(config, devices))
    assert most == max(0, int((plan.USABLE * gigabytes - 3) // 2))
    assert (found is None) == (most == 0)
    assert found is None or found.pictures == 2 * most


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


def test_a_hub_id_is_planned_for_without_its_weights(words, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(plan, "needs", lambda c, d: asked.append(c) or linear(c, d))
    assert command.main([*words, "micro_batch=1", "init=facebook/sam3"]) == 0
    assert asked[0].init is None
    assert "facebook/sam3 is not downloaded" in capsys.readouterr().out


def test_a_card_without_bfloat16_is_said(words, monkeypatch, capsys):
    monkeypatch.setattr(plan, "needs", linear)
    monkeypatch.setattr(targets, "target", lambda text: (targets.CARDS[text], [None]))
    command.main([*words, "model.compute_dtype=bfloat16", "micro_batch=1", "--device", "t4"])
    assert "NVIDIA T4 has no units for bfloat16" in capsys.readouterr().out


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
