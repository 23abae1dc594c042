"""The step: the same on one device and on eight, one program, nothing called back, nothing leaked."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam3jax.config import Config, ConfigError, LoraConfig
from sam3jax.model.layers import Linear
from sam3jax.tasks.detection import Detection, DetectionData
from sam3jax.training import sharding
from sam3jax.training.mesh import make_mesh, micro_batches, put_batch
from sam3jax.training.optim import build_optimizer
from sam3jax.training.rates import multipliers
from sam3jax.training.sharding import placed
from sam3jax.training.state import init_state
from sam3jax.training.step import make_train_step
from sam3jax.weights.trainable import touches
from tests.batches import random_batch, small_config, small_split

pytestmark = pytest.mark.slow

# Targets per picture and prompt: unequal over devices, the third device has none at all.
COUNTS = np.array([[1, 2], [0, 3], [0, 0], [1, 0], [2, 2], [5, 0], [1, 1], [0, 1]])


DESCENT = optax.sgd(1.0)  # one optimizer for all tests: equal steps are traced and compiled once


@functools.cache
def a_step(settings, optimizer, devices, parts):
    config = Config.model_validate_json(settings)
    mesh = make_mesh(jax.devices()[:devices])
    task = Detection(config)
    ema = config.optim.ema
    step = make_train_step(task, optimizer, mesh, seed=config.seed, ema=ema, parts=parts)
    return mesh, task, step


def run_once(config, batch, devices, optimizer=DESCENT, steps=1, micro=1, parts=1):
    """(state, metrics, step) after `steps` steps on that many devices, in that many micro-batches."""
    mesh, task, step = a_step(config.model_dump_json(), optimizer, devices, parts)
    trainable, frozen = small_split(config)
    data = DetectionData(None, None, (), batch.tokens)
    prepared, rest = task.prepare(trainable, frozen, data)
    prepared, rest = placed(prepared, mesh), placed(rest, mesh, parts)
    state = placed(init_state(trainable, optimizer, config.optim.ema > 0), mesh, parts)
    put = put_batch(batch, task.batch_spec, mesh, micro)
    for _ in range(steps):
        state, metrics = step(state, rest, prepared, put)
    return (
        jax.device_get(state),
        jax.device_get(metrics),
        lambda: (step, state, rest, prepared, put),
    )


def gradient_of(config, state):
    """With plain descent of rate 1 the gradient is what was taken off."""
    trainable, _ = small_split(config)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), trainable, state.trainable)


# Adapters everywhere, whatever has none trained itself: the gradient of every tensor there is.
EVERYTHING = dict(lora={"targets": LoraConfig().targets}, trainable=("*",))
# What sums over prompts and over pictures in the loss, at once. The trainings of one device share it.
ALL_SUMS = dict(loss={"semantic": True, "normalize_by_valid_object_num": True})


def some_absent(seed):
    batch = random_batch(small_config(), seed, COUNTS)
    batch.prompts.valid[3, 1] = False
    return batch


def test_eight_devices_equal_one():
    config, batch = small_config(**EVERYTHING), some_absent(1)
    one = run_once(config, batch, 1)
    assert set(one[0].trainable) == {"lora", "params"}
    assert_same_update(config, one, run_once(config, batch, 8))


def test_weights_split_over_eight_devices_give_the_same_update(monkeypatch):
    """Adapters and weights, trained or not; each layer is gathered inside the loop over layers."""
    monkeypatch.setattr(sharding, "SMALLEST", 64)  # nearly all of so small a model
    config, batch = small_config(**EVERYTHING), some_absent(1)
    one, eight = run_once(config, batch, 1), run_once(config, batch, 8, parts=8)
    assert_same_update(config, one, eight)
    step, state, rest, *others = eight[2]()
    assert step._cache_size() == 1  # what comes out lies as what went in
    size = sum(x.nbytes for x in jax.tree.leaves((state, rest)))
    own = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves((state, rest)))
    assert own < size / 5  # biases and norms weigh more in a small model
    text = step.lower(state, rest, *others).compile().as_text()
    loops = _reachable_from_loops(text).values()
    # Two blocks of a stage, four kernels each with the two matrices of their adapters.
    assert sum(len(re.findall(r" all-gather\(", body)) for body in loops) >= 2 * 4 * 3
    assert "reduce-scatter" in text


def assert_same_update(config, one, other):
    """Loss, every term and the gradient of every tensor, relative to a thousandth of the whole at least."""
    assert one[1]["loss"] > 1
    for name, value in one[1].items():
        np.testing.assert_allclose(other[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    gradient, parallel = gradient_of(config, one[0]), gradient_of(config, other[0])
    difference = jax.tree.map(np.subtract, parallel, gradient)
    norm = optax.tree.norm(gradient)
    for path, g in jax.tree.leaves_with_path(gradient):
        size = max(np.linalg.norm(g), 1e-3 * norm)
        assert np.linalg.norm(_at(difference, path)) <= 1e-5 * size, path


@pytest.mark.parametrize(("devices", "micro"), [(1, 8), (2, 2)])
def test_micro_batches_add_up_to_the_batch(monkeypatch, devices, micro):
    """One after the other, on one device or on several that share the weights: the gradient of the batch, not of the means."""
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    config, batch = small_config(**ALL_SUMS), some_absent(7)
    whole = run_once(config, batch, 1)
    assert_same_update(config, whole, run_once(config, batch, devices, micro=micro, parts=devices))


def test_a_mean_of_micro_batches_would_be_another_gradient():
    """So the test above can fail: pictures with many targets and with few do not weigh alike."""
    config, batch = small_config(**ALL_SUMS), some_absent(7)
    want = gradient_of(config, run_once(config, batch, 1)[0])
    few = np.arange(8) < 5
    parts = [run_once(config, batch.replace(image_valid=kept), 1)[0] for kept in (few, ~few)]
    means = jax.tree.map(lambda a, b: (a + b) / 2, *(gradient_of(config, p) for p in parts))
    error = optax.tree.norm(jax.tree.map(np.subtract, means, want)) / optax.tree.norm(want)
    assert error > 0.1


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "devices", "number"),
    [(8, None, 2, 1), (8, 1, 2, 4), (6, 3, 1, 2)],
)
def test_batch_size_counts_the_pictures_of_one_update(batch_size, micro_batch, devices, number):
    config = small_config(batch_size=batch_size, micro_batch=micro_batch)
    assert micro_batches(config, make_mesh(jax.devices()[:devices])) == number


@pytest.mark.parametrize(("micro_batch", "multiple"), [(None, 4), (2, 8), (3, 12)])
def test_a_rest_of_the_batch_is_refused(micro_batch, multiple):
    config = small_config(batch_size=6, micro_batch=micro_batch)
    with pytest.raises(ConfigError, match=f"batch_size 6 .*use a multiple of {multiple}$"):
        micro_batches(config, make_mesh(jax.devices()[:4]))


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_the_step_is_one_program_without_callbacks_and_the_matcher_has_no_collective():
    _, _, inside = run_once(small_config(**EVERYTHING), some_absent(1), 8, steps=3)
    step, *arguments = inside()
    assert step._cache_size() == 1
    hlo = step.lower(*arguments).compile().as_text()
    assert not [
        call for call in re.findall(r'custom_call_target="(.*?)"', hlo) if "callback" in call
    ]
    # Collectives may stand nowhere inside a loop: the matcher is loops.
    inside = _reachable_from_loops(hlo)
    assert inside, "the compiled step has no loop: the test reads it wrongly"
    for name, body in inside.items():
        assert not re.search(r"all-(reduce|gather|to-all)|collective|reduce-scatter", body), name


def _reachable_from_loops(hlo: str) -> dict[str, str]:
    computations = dict(re.findall(r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", hlo, re.M | re.S))
    todo = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", hlo))
    seen: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name in seen or name not in computations:
            continue
        seen[name] = computations[name]
        todo |= set(re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)", seen[name]))
    return seen


def test_base_params_receive_no_gradient_and_do_not_move():
    config = small_config(**ALL_SUMS)
    _, frozen = small_split(config)
    before = jax.tree.map(np.array, frozen)
    state, _, _ = run_once(config, some_absent(2), 1)
    assert set(state.trainable) == {"lora"}
    chex.assert_trees_all_equal(jax.device_get(frozen), before)
    moved = gradient_of(config, state)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(moved))


def test_bfloat16_is_near_float32():
    exact = small_config(**ALL_SUMS)
    rough = small_config(model={"compute_dtype": "bfloat16"}, **ALL_SUMS)
    batch = some_absent(4)
    _, a, _ = run_once(exact, batch, 1)
    _, b, _ = run_once(rough, batch, 1)
    assert abs(a["loss"] - b["loss"]) < 0.05 * a["loss"]
    assert b["loss"].dtype == jnp.float32


def test_dropout_differs_from_step_to_step_and_repeats_with_the_seed():
    config = small_config(
        model={"dropout": 0.2, "drop_path": 0.2},
        lora={"dropout": 0.1},
        optim={"learning_rate": 1e-9},
    )
    batch = random_batch(config, 5, COUNTS[:3])
    still = optax.sgd(0.0)
    _, first, _ = run_once(config, batch, 1, still)
    _, again, _ = run_once(config, batch, 1, still)
    _, second, _ = run_once(config, batch, 1, still, steps=2)
    assert first["loss"] == again["loss"]
    assert first["loss"] != second["loss"]


def test_trained_text_tower_is_encoded_in_the_step():
    patterns = ("backbone.language_backbone.*attn*",)
    config = small_config(lora={"targets": patterns})
    trainable, _ = small_split(config)
    assert touches(trainable, "text_encoder")
    batch = random_batch(config, 6, COUNTS[:1])  # two prompts, five phrases: only those asked
    state, metrics, _ = run_once(config, batch, 1)
    assert np.isfinite(metrics["loss"])
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient_of(config, state)))


def test_the_average_of_weights_is_unbiased_and_a_step_that_is_not_finite_moves_nothing():
    config = small_config(optim={"ema": 0.9, "clip_norm": 1e-3, "warmup_steps": 0})
    batch = random_batch(config, 3, COUNTS[:3])
    trainable, frozen = small_split(config)
    rate = build_optimizer(config, trainable, multipliers(trainable, frozen, config))
    runs = [run_once(config, batch, 1, rate, steps=n) for n in (1, 2, 3)]
    weights = [state for state, _, _ in runs]
    step, *_ = runs[0][2]()
    assert step._cache_size() == 1  # on one device too, the second step is the program of the first
    assert_close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-7)
    assert_close(weights[0].ema, weights[0].trainable)  # not still at the start
    share = np.array([0.81, 0.9, 1.0]) / (0.81 + 0.9 + 1)
    want = jax.tree.map(lambda *x: sum(s * v for s, v in zip(share, x)), *(w.trainable for w in weights))  # fmt: skip
    assert_close(weights[2].ema, want)
    batch.targets.boxes[0, 0] = np.nan
    bad, metrics, _ = run_once(config, batch, 1, rate, steps=2)
    assert bad.skipped == metrics["skipped"] == 2
    assert not np.isfinite(metrics["loss"])
    fresh = init_state(trainable, rate, True)
    chex.assert_trees_all_equal(bad.trainable, jax.device_get(trainable))
    chex.assert_trees_all_equal(bad.opt_state, jax.device_get(fresh.opt_state))
    assert_close(bad.ema, jax.device_get(trainable))


def test_adapter_dropout_in_bfloat16_drops_as_often_as_asked():
    layer = Linear(1, use_bias=False, dtype=jnp.bfloat16, train=True)
    one, number = jnp.ones((1, 1)), 100_000
    for rate in (0.003, 0.05):
        scale = {"scale": jnp.float32(1), "dropout": jnp.float32(rate)}
        variables = {"params": {"kernel": 0 * one}, "lora": {"a": one, "b": one}, "lora_scale": scale}  # fmt: skip
        y = layer.apply(variables, jnp.ones((number, 1)), rngs={"dropout": jax.random.key(0)})
        dropped = float((y == 0).mean())
        assert abs(dropped - rate) < 4 * (rate / number) ** 0.5
        assert abs(float(y.astype(jnp.float32).max()) - 1 / (1 - rate)) < 2**-8


def test_a_step_can_be_lowered_for_platforms_that_are_not_here():
    config = small_config()
    batch = random_batch(config, 1, COUNTS[:3])
    for platform, backend in (("cuda", "gpu"), ("tpu", "tpu")):
        mesh = make_mesh(jax.devices()[:1])
        task = Detection(config, backend)
        trainable, frozen = small_split(config)
        data = DetectionData(None, None, (), batch.tokens)
        prepared, rest = task.prepare(trainable, frozen, data)
        optimizer = optax.sgd(1.0)
        step = make_train_step(task, optimizer, mesh, seed=0)
        put = put_batch(batch, task.batch_spec, mesh)
        state = init_state(trainable, optimizer, False)
        lowered = step.trace(state, rest, prepared, put).lower(lowering_platforms=(platform,))
        assert "callback" not in lowered.as_text()
