"""Frozen kernels in eight bits: what numpy would make of them, and one layer's float at a time."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core.meta import unbox
from jax.sharding import PartitionSpec as P

from sam3jax.config import ConfigError, parse_config
from sam3jax.model.stored import Int8
from sam3jax.model.vit import ViT
from sam3jax.training import sharding
from sam3jax.training.mesh import make_mesh
from sam3jax.training.sharding import placed, specs, stored
from sam3jax.types import AXIS
from sam3jax.weights.frozen import compact, in_eight_bits, quantised
from sam3jax.weights.trainable import merge
from sam3jax.weights.tree import flatten
from tests.batches import small_config, small_split
from tests.small_run import SIZES, small_run

TRUNK = {"targets": ("backbone.*.trunk.*",), "rank": 8}


def by_hand(kernel, axes):
    """Plain numpy: to the nearest of 255 steps, and back."""
    scale = np.abs(kernel).max(axes, keepdims=True) / 127
    scale[scale == 0] = 1
    return (np.rint(kernel / scale) * scale).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "stack", "axes"),
    [((5, 7), 0, 0), ((2, 3, 5, 7), 2, 2), ((3, 3, 5, 7), 0, (0, 1, 2)), ((4, 5, 7), 1, 1)],
)
def test_a_kernel_is_rounded_channel_by_channel(shape, stack, axes):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    kernel[..., 2] *= 1e-6
    kernel[..., 3] = 0
    found = quantised(kernel, stack)
    assert found.values.dtype == np.int8
    assert np.abs(found.values).max() == 127
    np.testing.assert_allclose(found.unbox(), by_hand(kernel, axes), rtol=1e-6)
    step = np.abs(kernel).max(axes, keepdims=True) / 127
    assert (np.abs(np.asarray(found.unbox()) - kernel) <= 0.5001 * step).all()


def test_only_frozen_kernels_of_the_compute_dtype_are_rounded():
    config = small_config(base_dtype="int8", lora=TRUNK, trainable=("*encoder.layers*",))
    trainable, frozen = small_split(config)
    kept = flatten(compact(frozen, config, "cpu")["params"])
    for path, x in kept.items():
        exact = path[-1] != "kernel" or {"scoring", "bbox_embed", "presence_token_head"} & set(path)
        assert isinstance(x, Int8) != bool(exact), path
    whole = flatten(in_eight_bits(merge(trainable, frozen)["params"], config))
    trained = flatten(trainable["params"]).keys()
    assert trained
    assert {path for path, x in whole.items() if isinstance(x, Int8)} == {
        path for path, x in kept.items() if isinstance(x, Int8)
    }
    assert not any(isinstance(whole[path], Int8) for path in trained)


def test_adapters_learn_over_eight_bits_as_over_the_rounded_floats(monkeypatch):
    """The trunk's answer and the adapters' gradient, the eight bits split over devices besides."""
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    config = small_config(base_dtype="int8", lora=TRUNK, model={"remat": True})
    model, mesh = ViT(config.model), make_mesh()
    trainable, frozen = small_split(config)
    few = lambda tree: {k: {"vit": v["vit"]} for k, v in tree.items()}
    narrow = few(compact(frozen, config, "cpu"))
    assert sum(isinstance(x, Int8) for x in flatten(narrow["params"]).values()) == 9
    images = np.random.default_rng(0).normal(size=(8, 84, 84, 3)).astype(np.float32)

    def program(frozen, parts):
        lora = few({"lora": trainable["lora"]})
        own = specs(frozen, parts)

        def run(frozen, images):
            def loss(lora):
                variables = {k: v["vit"] for k, v in {**stored(frozen, own), **lora}.items()}
                y = model.apply(variables, images)
                return jnp.sin(y).sum(), y

            varying = jax.lax.pcast(lora, AXIS, to="varying")
            grads, y = jax.grad(loss, has_aux=True)(varying)
            return y, jax.lax.psum(grads, AXIS)

        split = jax.shard_map(run, mesh=mesh, in_specs=(own, P(AXIS)), out_specs=(P(AXIS), P()))
        compiled = jax.jit(split)
        return lambda frozen: jax.device_get(compiled(placed(frozen, mesh, parts), images))

    floats = program(few(frozen), 1)
    found = program(narrow, 8)(narrow)
    rounded = floats({**narrow, "params": unbox(narrow["params"])})
    chex.assert_trees_all_close(found, rounded, rtol=1e-4, atol=1e-4)
    exact = floats(few(frozen))[0]
    error = np.linalg.norm(found[0] - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.02


def test_a_run_is_asked_with_the_base_that_it_was_trained_on(tmp_path):
    plain, narrow = (small_run(tmp_path, base_dtype=kind) for kind in ("float", "int8"))
    assert plain.asked() is plain.variables
    for base in (False, True):
        variables = narrow.asked(base)
        assert any(isinstance(x, Int8) for x in flatten(variables["params"]).values())
    # Exports read these.
    assert not any(isinstance(x, Int8) for x in flatten(narrow.variables["params"]).values())


def test_eight_bits_for_weights_that_are_all_trained_are_refused():
    with pytest.raises(ConfigError, match="base_dtype int8 is for weights that are not trained"):
        parse_config({"model": SIZES, "train": "all", "base_dtype": "int8"})
