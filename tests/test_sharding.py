"""Weights split over devices: what lies where, sums over devices, and checkpoints that open on any number of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core.meta import unbox
from jax.sharding import PartitionSpec as P

from sam3jax.checksums import of_arrays
from sam3jax.config import ModelConfig
from sam3jax.model.init import parameter_shapes
from sam3jax.model.vit import ViT
from sam3jax.training import sharding
from sam3jax.training.mesh import make_mesh
from sam3jax.training.optim import build_optimizer
from sam3jax.training.rates import multipliers
from sam3jax.training.sharding import placed, specs, whole
from sam3jax.training.state import init_state, restore, save
from sam3jax.types import AXIS
from sam3jax.weights.checkpoints import Checkpoints
from sam3jax.weights.names import entries
from sam3jax.weights.scope import CLICKS
from sam3jax.weights.tree import flatten, leaf
from tests.batches import small_config, small_split

OPTIM = {
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "ema": 0.9,
    "layer_decay": 0.5,
    "weight_decay": 0.1,
}


@pytest.fixture
def split_small(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST", 64)


def full_size():
    return parameter_shapes(ModelConfig(), CLICKS.parts)


def test_no_axis_of_a_stack_is_split():
    stacked = {e.path: len(e.slot) for e in entries(ModelConfig(), CLICKS.parts)}
    places = flatten(specs({"params": full_size()}, 2)["params"])
    assert sum(map(bool, places.values())) > 100
    for path, place in places.items():
        assert AXIS not in place[: stacked[path]], path


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_split_axis_divides_and_is_the_longer_one(parts):
    for path, place in flatten(specs(full_size(), parts)).items():
        shape = leaf(full_size(), path).shape
        if place:
            rest = shape[len(place) - 1]
            assert rest % parts == 0
            assert rest == max(n for n in shape[-2:] if n % parts == 0)


def test_on_eight_devices_each_holds_a_seventh_at_most():
    """At full size: of the weights alone, and of everything that full training keeps."""
    params = full_size()
    optimizer = optax.scale_by_adam()
    state = jax.eval_shape(lambda p: init_state(p, optimizer, True), params)
    for tree in (params, state):
        sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)]
        places = jax.tree.structure(tree).flatten_up_to(specs(tree, 8))
        own = sum(n / 8 if place else n for n, place in zip(sizes, places, strict=True))
        assert own <= sum(sizes) / 7


def test_one_device_splits_nothing():
    assert not any(flatten(specs(full_size(), 1)).values())
    assert sharding.parts_of(make_mesh(jax.devices()[:1]), True) == 1
    assert sharding.parts_of(make_mesh(jax.devices()[:4]), False) == 1


def few_trained(**optim):
    """Matrices in stacks and alone, norms and biases; adapters besides."""
    few = ("*trunk.blocks.0.*", "transformer.decoder.layers.0.linear1.*")
    return small_config(lora={"rank": 8}, trainable=few, optim={**OPTIM, **optim})


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


def test_parts_are_updated_as_the_whole_is(split_small):
    """Clipped by the norm of all devices' parts, with rates by layer, decay and Adam's moments."""
    config = few_trained(clip_norm=1e-3)
    trainable, frozen = small_split(config)
    rates = multipliers(trainable, frozen, config)
    mesh = make_mesh()
    found = {}
    for parts in (1, 8):
        optimizer = build_optimizer(config, trainable, rates, parts)
        state = init_state(placed(trainable, mesh, parts), optimizer, False)
        state, grads = (placed(t, mesh, parts) for t in (state, random_like(trainable, 1)))
        own = specs(state, parts)

        def update(state, grads, own=own, optimizer=optimizer):
            updates, rest = optimizer.update(grads, state.opt_state, state.trainable)
            length = sharding.norm(grads, own.trainable)
            return state.replace(
                trainable=optax.apply_updates(state.trainable, updates), opt_state=rest
            ), length

        run = jax.shard_map(update, mesh=mesh, in_specs=(own, own.trainable), out_specs=(own, P()))
        found[parts] = jax.device_get(jax.jit(run)(state, grads))
    np.testing.assert_allclose(found[8][1], optax.tree.norm(random_like(trainable, 1)), rtol=1e-6)
    chex.assert_trees_all_close(found[8], found[1], rtol=1e-5, atol=1e-10)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found[8][0].trainable, trainable)
    assert all(v > 0 for v in jax.tree.leaves(moved))


def test_gradients_of_parts_are_sums_over_devices(split_small):
    """Against a whole copy on every device, whose gradients psum adds."""
    mesh = make_mesh()
    tree = {
        "dense": {
            "kernel": np.arange(256.0, dtype=np.float32).reshape(16, 16),
            "bias": np.ones(16, np.float32),
        }
    }
    x = np.random.default_rng(0).normal(size=(8, 3, 16)).astype(np.float32)
    found = {}
    for parts in (1, 8):
        own = specs(tree, parts)

        def gradient(tree, x, own=own):
            def loss(tree):
                dense = unbox(sharding.stored(tree, own))
                return jnp.sin(
                    x[0] @ dense["dense"]["kernel"] * 0.01 + dense["dense"]["bias"]
                ).sum()

            grads = jax.grad(loss)(sharding.as_varying(tree, own))
            return sharding.summed(grads, own)

        run = jax.shard_map(gradient, mesh=mesh, in_specs=(own, P(AXIS)), out_specs=own)
        found[parts] = jax.device_get(jax.jit(run)(placed(tree, mesh, parts), x))
    chex.assert_trees_all_close(found[8], found[1], rtol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(8, 1), (8, 3), (3, 8), (1, 8)])
def test_a_checkpoint_opens_on_any_number_of_devices(split_small, tmp_path, before, after):
    config = few_trained()
    trainable, frozen = small_split(config)
    optimizer = build_optimizer(config, trainable, multipliers(trainable, frozen, config))

    def start(devices):
        return placed(
            init_state(trainable, optimizer, True), make_mesh(jax.devices()[:devices]), devices
        )

    def other(x):
        return x + 1 if x.dtype == np.int32 else 2 * x + 1

    saved = jax.tree.map(lambda x: jax.device_put(other(x), x.sharding), start(before))
    checkpoints = Checkpoints(tmp_path, keep=1)
    about = {"base": "noise", "data": {}}
    save(checkpoints, saved, about)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=1)
    like = start(after)
    found = restore(checkpoints, int(saved.step), like)
    checkpoints.close()
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(saved))
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, like)


def test_checksums_and_gathering_do_not_depend_on_the_split(split_small):
    tree = {"kernel": np.random.default_rng(0).normal(size=(3, 16, 24)).astype(np.float32)}
    split = placed(tree, make_mesh(), 8)
    assert not split["kernel"].is_fully_replicated
    assert split["kernel"].addressable_data(0).shape == (3, 16, 3)
    assert of_arrays(split) == of_arrays(tree)
    gathered = whole(split)
    assert gathered["kernel"].is_fully_replicated
    chex.assert_trees_all_equal(jax.device_get(gathered), tree)


def inside(jaxpr):
    """Every equation, those of loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from inside(inner)


def test_the_backward_pass_gathers_again_and_nothing_whole_is_kept(split_small):
    """Traced only: loops over the blocks of the trunk hold a block's kernels, no more."""
    config = small_config(model={"vit_stage_blocks": 4, "remat": True}).model
    model, mesh = ViT(config), make_mesh()
    params = {"params": parameter_shapes(config)["vit"]}
    own = specs(params, 8)

    def gradient(params, images):
        loss = lambda p: model.apply(sharding.stored(p, own), images).sum()
        return sharding.summed(jax.grad(loss)(sharding.as_varying(params, own)), own)

    run = jax.shard_map(gradient, mesh=mesh, in_specs=(own, P(AXIS)), out_specs=own)
    edge = config.image_size
    jaxpr = jax.make_jaxpr(run)(params, jax.ShapeDtypeStruct((8, edge, edge, 3), jnp.float32))
    loops = [
        e for e in inside(jaxpr.jaxpr) if e.primitive.name == "scan" and e.params["length"] == 3
    ]
    count = lambda e, name: sum(x.primitive.name == name for x in inside(e.params["jaxpr"].jaxpr))
    assert [count(e, "all_gather") for e in loops] == [4, 4]
    assert [count(e, "reduce_scatter") for e in loops] == [0, 4]
    kernels = {
        x.shape[-2:] for path, x in flatten(params["params"]).items() if path[-1] == "kernel"
    }
    loops = [e for e in inside(jaxpr.jaxpr) if e.primitive.name == "scan"]
    kept = {v.aval.shape[-2:] for e in loops for v in e.outvars}
    assert not kept & kernels
