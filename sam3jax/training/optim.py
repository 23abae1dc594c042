"""The optimizer: AdamW with schedule, clipping and per-layer rates, all from optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam3jax.config import Config, OptimConfig
from sam3jax.weights.trainable import Tree, decayed


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Rate of update number n of `steps`: linear warm-up, then the schedule, then a cool-down to 0.

    inverse_sqrt: base / sqrt((n + timescale - warmup) / timescale) behind the warm-up, as in
    sam3.train.optim.schedulers.
    """
    base, warmup = config.learning_rate, config.warmup_steps

    def rate(count: jax.Array) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        value = jnp.full_like(n, base)
        if config.schedule == "cosine":
            progress = jnp.clip((n - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            value = base * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "inverse_sqrt":
            shifted = (n + config.timescale - warmup) / config.timescale
            value = jnp.where(n > warmup, base / jnp.sqrt(jnp.maximum(shifted, 1e-9)), base)
        if warmup:
            value = value * jnp.minimum(1.0, n / warmup)
        if config.cooldown_steps:
            value = value * jnp.clip((steps - n) / config.cooldown_steps, 0.0, 1.0)
        return value

    return rate


def build_optimizer(config: Config, trainable: Tree, rates: Tree) -> optax.GradientTransformation:
    """Clip, Adam, decoupled weight decay, schedule times `rates` (trainable.multipliers).

    Slots with rate 0 do not enter the gradient norm and never move. With `accumulate` gradients of
    that many steps are averaged, and the schedule counts updates.
    """
    o = config.optim
    updates = max(config.steps // o.accumulate, 1)
    schedule = learning_rate(o, updates)
    chain = optax.chain(
        _times(jax.tree.map(lambda r: (r > 0).astype(r.dtype), rates)),
        optax.clip_by_global_norm(o.clip_norm),
        optax.scale_by_adam(o.beta1, o.beta2),
        optax.add_decayed_weights(o.weight_decay, decayed(trainable)),
        _times(rates),
        # Counted from 1: with a warm-up the first update would otherwise be lost.
        optax.scale_by_schedule(lambda n: -schedule(n + 1)),
    )
    if o.accumulate > 1:
        multi = optax.MultiSteps(chain, o.accumulate)
        return optax.GradientTransformation(multi.init, multi.update)
    return chain


def _times(factors: Tree) -> optax.GradientTransformation:
    """Multiply every update by a fixed array that broadcasts to it."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
