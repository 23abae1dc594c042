"""One training step: pure, jitted, shard_mapped over the batch, state donated, no host callback.

It knows no task. It counts first what the losses are divided by, over the whole batch; then every
micro-batch of every device returns its share of loss and gradient; then the shares are added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sam3jax.tasks import Task
from sam3jax.training.mesh import micro_spec, take_micro_batch
from sam3jax.training.sharding import as_varying, norm, specs, stored, summed
from sam3jax.training.state import TrainState, moving_average
from sam3jax.types import AXIS
from sam3jax.weights.trainable import merge
from sam3jax.weights.tree import Tree


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, *, seed: int, ema: float = 0.0, parts: int = 1
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:  # fmt: skip
    """step(state, frozen, prepared, batch) -> (state, metrics), compiled once.

    batch: from `put_batch`, with an axis of micro-batches in front. prepared: what `task.prepare`
    returned. metrics: of the task, and `grad_norm`, `skipped`; equal on all devices.
    ema: decay of the averaged weights, 0 for none. parts: into how many the weights are split.
    """
    spec = micro_spec(task.batch_spec)

    def step(places: Any, state: TrainState, frozen: Tree, prepared: Any, batch: Any):
        split, frozen = places[0].trainable, stored(frozen, places[1])
        number, take = take_micro_batch(spec, batch)
        totals = jax.lax.map(lambda m: task.count(take(m)), jnp.arange(number))
        totals = jax.lax.psum(jax.tree.map(lambda x: x.sum(0), totals), AXIS)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        # As arguments of each device: else every micro-batch would add its gradient over all devices.
        trainable = as_varying(state.trainable, split)

        def share(m: jax.Array) -> tuple[Tree, dict[str, jax.Array]]:
            def loss(trainable: Tree):
                own = jax.random.fold_in(key, m)
                variables = merge(stored(trainable, split), frozen)
                return task.loss(variables, prepared, take(m), totals, own)

            (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
            return grads, terms

        def add(sums: Tree, m: jax.Array):
            grads, terms = share(m)
            return jax.tree.map(jnp.add, sums, grads), terms

        # No loop of one turn: XLA runs the body of a loop 1.6 times slower on a CPU.
        if number == 1:
            grads, terms = share(jnp.int32(0))
        else:
            start = jax.tree.map(jnp.zeros_like, trainable)
            grads, terms = jax.lax.scan(add, start, jnp.arange(number))
            terms = jax.tree.map(lambda x: x.sum(0), terms)
        grads, terms = summed(grads, split), jax.lax.psum(terms, AXIS)
        metrics, length = task.metrics(terms), norm(grads, split)

        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(length)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        new: Any = optax.apply_updates(state.trainable, updates)
        averaged = None if state.ema is None else moving_average(state, new, ema)
        new = TrainState(state.step + 1, new, opt_state, averaged, state.skipped)
        old = state.replace(step=state.step + 1, skipped=state.skipped + 1)
        state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        return state, {**metrics, "grad_norm": length, "skipped": state.skipped}

    def on_devices(state: TrainState, frozen: Tree, prepared: Any, batch: Any):
        places = specs((state, frozen), parts)
        run = jax.shard_map(
            partial(step, places), mesh=mesh, in_specs=(*places, P(), spec), out_specs=(places[0], P()), check_vma=True
        )  # fmt: skip
        return run(state, frozen, prepared, batch)

    return jax.jit(on_devices, donate_argnums=0)
