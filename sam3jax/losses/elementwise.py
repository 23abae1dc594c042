"""Loss functions of single logits and of whole masks, each exact and with a finite gradient everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_jvp
def sigmoids(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """p = sigmoid(x), 1 - p and log p, each to full precision, from one exponential and one logarithm.

    Masks have millions of pixels: on a CPU these functions are most of the time of their loss.
    """
    small = jnp.exp(-jnp.abs(logits))
    large = 1 / (1 + small)
    positive = logits >= 0
    p, rest = jnp.where(positive, large, small * large), jnp.where(positive, small * large, large)
    return p, rest, jnp.minimum(logits, 0) - jnp.log1p(small)


@sigmoids.defjvp
def _sigmoids_jvp(primals, tangents):
    p, rest, log_p = sigmoids(*primals)
    slope = p * rest * tangents[0]
    return (p, rest, log_p), (slope, -slope, rest * tangents[0])


def bce(logits: jax.Array, targets: jax.Array | float) -> jax.Array:
    """Binary cross entropy with logits, elementwise; targets in 0..1."""
    return (1 - targets) * logits - sigmoids(logits)[2]


def focal(logits: jax.Array, targets: jax.Array, *, alpha: float, gamma: float) -> jax.Array:
    """Focal loss (Lin et al. 2017), elementwise; targets in 0..1; no alpha weighting if alpha < 0."""
    p, rest, log_p = sigmoids(logits)
    loss = ((1 - targets) * logits - log_p) * power(p * (1 - targets) + rest * targets, gamma)
    return loss * (alpha * targets + (1 - alpha) * (1 - targets)) if alpha >= 0 else loss


def dice(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """1 - (2 |p t| + 1) / (|p| + |t| + 1) over all axes but the first. [R, ...] -> [R]."""
    axes = tuple(range(1, logits.ndim))
    p, _, _ = sigmoids(logits)
    return 1 - (2 * (p * targets).sum(axes) + 1) / (p.sum(axes) + targets.sum(axes) + 1)


def power(base: jax.Array, exponent: float) -> jax.Array:
    """base ** exponent for base >= 0, with a finite gradient at 0."""
    if float(exponent).is_integer():
        return jax.lax.integer_pow(base, int(exponent))
    positive = base > 0
    return jnp.where(positive, jnp.where(positive, base, 1.0) ** exponent, 0.0)
