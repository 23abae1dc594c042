"""Where the first NaN is: one evaluation outside the step, for a run that ends because nothing is finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sam3jax.tasks import Task
from sam3jax.training.mesh import micro_spec, take_micro_batch
from sam3jax.training.sharding import whole
from sam3jax.types import AXIS
from sam3jax.weights.trainable import merge
from sam3jax.weights.tree import Tree


def first_nan(
    task: Task, mesh: Mesh, trainable: Tree, frozen: Tree, prepared: Any, batch: Any
) -> str:
    """A sentence that names the array, the layer's output or the gradient that holds the first NaN.

    batch: as the step takes it. Every process of a run calls this with the same weights.
    """
    trainable, frozen = whole((trainable, frozen))
    for what, tree in (("weights", merge(trainable, frozen)), ("batch", batch)):
        if name := _first(_not_finite(tree)):
            return f"the first NaN or infinity is in the {what}: {name}"
    lost = ""
    try:
        if layer := _first_layer(task, mesh, trainable, frozen, prepared, batch):
            return f"the first NaN of the forward pass is in the output of {layer}"
    except (
        Exception
    ) as error:  # flax 0.12.12 allows no callback inside nn.scan: gradients still tell something
        lost = f" (layers could not be looked at: {str(error).splitlines()[0][:120]})"
    try:
        if name := _first(_gradients(task, mesh, trainable, frozen, prepared, batch)):
            seen = lost or "; no layer's output holds one"
            return f"the gradient of {name} holds a NaN{seen}"
    except Exception as error:  # the run ends anyway, with the sentence that this one belongs to
        return f"where the first NaN is could not be found ({str(error).splitlines()[0][:200]})"
    return f"the newest batch gives no NaN again{lost}"


def _not_finite(tree: Any) -> dict[str, jax.Array]:
    flags = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            flags[_name(path)] = ~jnp.isfinite(leaf).all()
    return flags


def _first(flags: dict[str, Any]) -> str | None:
    found = jax.device_get(flags)
    return next((name for name, bad in found.items() if bad), None)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "all of it"


def _first_layer(
    task: Task, mesh: Mesh, trainable: Tree, frozen: Tree, prepared: Any, batch: Any
) -> str | None:
    """The first module, in the order of the calls, whose output holds a NaN; inner ones return first."""
    order: dict[str, int] = {}
    bad: set[str] = set()

    def note(call: Any, arguments: Any, keywords: Any, context: Any) -> Any:
        output = call(*arguments, **keywords)
        name = ".".join((type(context.module).__name__, *context.module.path, context.method_name))
        order.setdefault(name, len(order))
        leaves = [x for x in jax.tree.leaves(output) if hasattr(x, "dtype")]
        floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
        if floats:
            # A callback, since most layers run inside a loop, out of which no flag can be taken.
            nan = jnp.stack([jnp.isnan(x).any() for x in floats]).any()
            jax.debug.callback(lambda flag, n=name: bad.add(n) if flag else None, nan)
        return output

    def forward(trainable: Tree, frozen: Tree, prepared: Any, batch: Any) -> jax.Array:
        with nn.intercept_methods(note):
            losses = _each(task, batch, lambda m, t: _loss(task, trainable, frozen, prepared, m, t))
        return losses

    jax.block_until_ready(_run(forward, task, mesh, P(AXIS))(trainable, frozen, prepared, batch))
    jax.effects_barrier()
    return min(bad, key=order.__getitem__, default=None)


def _gradients(
    task: Task, mesh: Mesh, trainable: Tree, frozen: Tree, prepared: Any, batch: Any
) -> dict[str, Any]:
    def backward(trainable: Tree, frozen: Tree, prepared: Any, batch: Any) -> Any:
        trainable = jax.lax.pcast(trainable, AXIS, to="varying")

        def flags(m: Any, totals: Any) -> Any:
            loss = lambda t: _loss(task, t, frozen, prepared, m, totals)
            return jax.tree.map(lambda g: ~jnp.isfinite(g).all(), jax.grad(loss)(trainable))

        found = _each(task, batch, flags)
        return jax.tree.map(lambda x: jax.lax.psum(x.astype(jnp.int32), AXIS).sum() > 0, found)

    flags = _run(backward, task, mesh, P())(trainable, frozen, prepared, batch)
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(flags)}


def _loss(
    task: Task, trainable: Tree, frozen: Tree, prepared: Any, batch: Any, totals: Any
) -> jax.Array:
    variables = merge(trainable, frozen)
    return task.loss(variables, prepared, batch, totals, jax.random.key(0))[0]


def _each(task: Task, batch: Any, of_one: Any) -> Any:
    """of_one(micro-batch, totals), stacked over the micro-batches."""
    number, take = take_micro_batch(micro_spec(task.batch_spec), batch)
    totals = jax.lax.map(lambda m: task.count(take(m)), jnp.arange(number))
    totals = jax.lax.psum(jax.tree.map(lambda x: x.sum(0), totals), AXIS)
    return jax.lax.map(lambda m: of_one(take(m), totals), jnp.arange(number))


def _run(function: Any, task: Task, mesh: Mesh, out: P) -> Any:
    specs = P(), P(), P(), micro_spec(task.batch_spec)
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=out == P())
    )
