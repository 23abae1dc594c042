"""The optimizer: AdamW with schedule, clipping and per-layer rates, all from optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam3jax.config import Config, OptimConfig
from sam3jax.training.rates import decayed
from sam3jax.training.sharding import norm, specs
from sam3jax.weights.tree import Tree


def schedule_warning(config: OptimConfig, steps: int) -> str | None:
    """What is said of a schedule that never reaches its rate, or None."""
    if config.warmup_steps < steps:
        return None
    reached = config.learning_rate * steps / config.warmup_steps
    return (
        f"warning: optim.warmup_steps {config.warmup_steps} is not below steps {steps}: the rate only climbs, to "
        f"{reached:.2g} of {config.learning_rate:.2g}; set optim.warmup_steps lower"
    )


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Rate of update number n = 1 .. steps: linear warm-up, then the schedule, then a cool-down.

    cosine: base / 2 (1 + cos(pi (n - 1 - warmup) / (steps - warmup))) behind the warm-up, optax's
    cosine_decay_schedule. inverse_sqrt: base / sqrt((n + timescale - warmup) / timescale) behind it;
    cool-down: times (steps - n + 1) / cooldown at the end; both as in sam3.train.optim.schedulers.
    Every update has a rate above 0.
    """
    base, warmup = config.learning_rate, config.warmup_steps

    def rate(count: Any) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        value = jnp.full_like(n, base)
        if config.schedule == "cosine":
            progress = jnp.clip((n - 1 - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            value = base * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "inverse_sqrt":
            shifted = (n + config.timescale - warmup) / config.timescale
            value = jnp.where(n > warmup, base / jnp.sqrt(jnp.maximum(shifted, 1e-9)), base)
        if warmup:
            value = value * jnp.minimum(1.0, n / warmup)
        if config.cooldown_steps:
            value = value * jnp.clip((steps - n + 1) / config.cooldown_steps, 0.0, 1.0)
        return value

    return rate


def build_optimizer(
    config: Config, trainable: Tree, rates: Tree, parts: int = 1
) -> optax.GradientTransformation:
    """Clip, Adam, decoupled weight decay, schedule times `rates` (rates.multipliers).

    Slots with rate 0 do not enter the gradient norm and never move. parts: into how many the weights are split.
    """
    o = config.optim
    schedule = learning_rate(o, config.steps)
    return optax.chain(
        _times(jax.tree.map(lambda r: (r > 0).astype(r.dtype), rates)),
        _clip(o.clip_norm, specs(trainable, parts)),
        optax.scale_by_adam(o.beta1, o.beta2),
        optax.add_decayed_weights(o.weight_decay, decayed(trainable)),
        _times(rates),
        # Counted from 1: with a warm-up the first update would otherwise be lost.
        optax.scale_by_schedule(lambda n: -jnp.asarray(schedule(n + 1))),
    )


def _clip(most: float, places: Any) -> optax.GradientTransformation:
    """optax.clip_by_global_norm of updates whose parts lie on several devices."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        length = norm(updates, places)
        keep = lambda u: jnp.where(length < most, u, u / length.astype(u.dtype) * most)
        return jax.tree.map(keep, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _times(factors: Tree) -> optax.GradientTransformation:
    """Multiply every update by a fixed array that broadcasts to it."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
