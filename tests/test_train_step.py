"""The step: the same on one device and on eight, one program, nothing called back, nothing leaked."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam3jax.config import LoraConfig
from sam3jax.training.optim import build_optimizer
from sam3jax.training.step import (
    encode_vocabulary,
    init_state,
    make_mesh,
    make_train_step,
    put_batch,
    put_replicated,
    text_is_trained,
)
from sam3jax.weights.trainable import merge, multipliers
from tests.batches import random_batch, small_config, small_split

# Targets per picture and prompt: unequal over devices, the third device has none at all.
COUNTS = np.array([[1, 2], [0, 3], [0, 0], [1, 0], [2, 2], [5, 0], [1, 1], [0, 1]])


def run_once(config, batch, devices, optimizer=None, steps=1):
    """(state, metrics) after `steps` steps on that many devices."""
    mesh = make_mesh(jax.devices()[:devices])
    trainable, frozen = small_split(config)
    optimizer = optimizer or optax.sgd(1.0)
    state = put_replicated(init_state(trainable, optimizer, False), mesh)
    text = None
    if not text_is_trained(trainable):
        text = put_replicated(
            encode_vocabulary(config, merge(trainable, frozen), batch.tokens), mesh
        )
    step = make_train_step(config, optimizer, mesh)
    for _ in range(steps):
        state, metrics = step(state, put_replicated(frozen, mesh), text, put_batch(batch, mesh))
    return jax.device_get(state), jax.device_get(metrics), step


def gradient_of(config, state):
    """With plain descent of rate 1 the gradient is what was taken off."""
    trainable, _ = small_split(config)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), trainable, state.trainable)


@pytest.mark.parametrize("train", ["lora", "all"])
def test_eight_devices_equal_one(train):
    config = small_config(train=train, lora={"targets": LoraConfig().targets})
    batch = random_batch(config, 1, COUNTS)
    batch.prompts.valid[3, 1] = False
    one, metrics, _ = run_once(config, batch, 1)
    eight, sharded, _ = run_once(config, batch, 8)
    assert metrics["loss"] > 1
    for name in metrics:
        np.testing.assert_allclose(sharded[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    gradient, parallel = gradient_of(config, one), gradient_of(config, eight)
    difference = jax.tree.map(np.subtract, parallel, gradient)
    norm = optax.tree.norm(gradient)
    for path, g in jax.tree.leaves_with_path(gradient):
        size = max(np.linalg.norm(g), 1e-3 * norm)
        assert np.linalg.norm(_at(difference, path)) <= 1e-5 * size, path


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_the_step_is_one_program_without_callbacks_and_the_matcher_has_no_collective():
    config = small_config()
    batch = random_batch(config, 1, COUNTS)
    _, _, step = run_once(config, batch, 8, steps=3)
    assert step._cache_size() == 1
    mesh = make_mesh()
    trainable, frozen = small_split(config)
    optimizer = optax.sgd(1.0)
    state = init_state(trainable, optimizer, False)
    text = encode_vocabulary(config, merge(trainable, frozen), batch.tokens)
    hlo = step.lower(state, frozen, text, put_batch(batch, mesh)).compile().as_text()
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
    config = small_config()
    batch = random_batch(config, 2, COUNTS[:3])
    _, frozen = small_split(config)
    before = jax.tree.map(np.array, frozen)
    state, _, _ = run_once(config, batch, 1)
    assert set(state.trainable) == {"lora"}
    chex.assert_trees_all_equal(jax.device_get(frozen), before)
    moved = gradient_of(config, state)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(moved))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    config = small_config(optim={"clip_norm": 1e-3})
    batch = random_batch(config, 3, COUNTS[:3])
    batch.targets.boxes[0, 0] = np.nan
    trainable, frozen = small_split(config)
    optimizer = build_optimizer(config, trainable, multipliers(trainable, frozen, config))
    state, metrics, _ = run_once(config, batch, 1, optimizer)
    assert metrics["skipped"] == 1
    assert not np.isfinite(metrics["loss"])
    chex.assert_trees_all_equal(state.trainable, jax.device_get(trainable))


def test_bfloat16_is_near_float32():
    exact = small_config()
    rough = small_config(model={"compute_dtype": "bfloat16"})
    batch = random_batch(exact, 4, COUNTS[:5])
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
    _, first, _ = run_once(config, batch, 1, optax.sgd(0.0))
    _, again, _ = run_once(config, batch, 1, optax.sgd(0.0))
    _, second, _ = run_once(config, batch, 1, optax.sgd(0.0), steps=2)
    assert first["loss"] == again["loss"]
    assert first["loss"] != second["loss"]


def test_trained_text_tower_is_encoded_in_the_step():
    patterns = ("backbone.language_backbone.*attn*",)
    config = small_config(lora={"targets": patterns})
    trainable, _ = small_split(config)
    assert text_is_trained(trainable)
    batch = random_batch(config, 6, COUNTS[:1])  # two prompts, five phrases: only those asked
    state, metrics, _ = run_once(config, batch, 1)
    assert np.isfinite(metrics["loss"])
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient_of(config, state)))


def test_accumulated_gradients_are_averaged_into_one_update():
    """Two steps on the same pictures with accumulate=2 are one step without."""
    batch = random_batch(small_config(), 7, COUNTS[:3])
    states = {}
    for accumulate in (1, 2):
        config = small_config(steps=4, optim={"accumulate": accumulate, "warmup_steps": 0, "schedule": "constant"})  # fmt: skip
        trainable, frozen = small_split(config)
        optimizer = build_optimizer(config, trainable, multipliers(trainable, frozen, config))
        if accumulate == 2:
            waiting, _, _ = run_once(config, batch, 1, optimizer, steps=1)
            chex.assert_trees_all_equal(waiting.trainable, jax.device_get(trainable))
        states[accumulate], _, _ = run_once(config, batch, 1, optimizer, steps=accumulate)
    chex.assert_trees_all_close(states[1].trainable, states[2].trainable, rtol=1e-5, atol=1e-8)
