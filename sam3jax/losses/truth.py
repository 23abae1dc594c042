"""The targets of each prompt, gathered from the instances of its picture."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sam3jax.types import Targets


class Truth(NamedTuple):
    """The targets of each prompt, gathered: what the losses compare with.

    boxes [B, T, 4], zero where there is none; real [B, T]; count [B] int32; valid, exhaustive [B] bool;
    instance [B, T] int32 < M; has_mask [B, T] bool.
    """

    boxes: jax.Array
    real: jax.Array
    count: jax.Array
    valid: jax.Array
    exhaustive: jax.Array
    instance: jax.Array
    has_mask: jax.Array


def gather_truth(targets: Targets, prompt_valid: jax.Array) -> Truth:
    """Targets of each prompt from the instances of its picture, B = I * P; invalid prompts have none."""
    m = targets.boxes.shape[1]
    index = (
        targets.index if targets.index.shape[-1] else jnp.full((*targets.num_targets.shape, 1), m)
    )
    i, p, t = index.shape
    valid = prompt_valid.reshape(-1)
    count = jnp.where(prompt_valid, targets.num_targets, 0).reshape(-1)
    real = jnp.arange(t) < count[:, None]  # [B, T]
    # One row of nothing behind the instances, so that "none" (M) can be looked up, also where M = 0.
    rows = jnp.clip(index, 0, m).reshape(i, p * t)
    boxes = jnp.pad(targets.boxes.astype(jnp.float32), ((0, 0), (0, 1), (0, 0)))
    boxes = jnp.take_along_axis(boxes, rows[..., None], axis=1).reshape(i * p, t, 4)
    has_mask = jnp.take_along_axis(jnp.pad(targets.mask_valid, ((0, 0), (0, 1))), rows, axis=1)
    return Truth(
        boxes=jnp.where(real[..., None], boxes, 0.0),
        real=real,
        count=count.astype(jnp.int32),
        valid=valid,
        exhaustive=jnp.asarray(targets.is_exhaustive).reshape(-1),
        instance=jnp.minimum(rows, max(m - 1, 0)).reshape(i * p, t),
        has_mask=has_mask.reshape(i * p, t) & real,
    )


def at_least_one_mask(targets: Targets) -> Targets:
    """The same targets; a blank mask stands where the whole batch has no instance (M = 0)."""
    if targets.masks.shape[1]:
        return targets
    masks = targets.masks
    return targets.replace(masks=jnp.zeros((len(masks), 1, *masks.shape[2:]), jnp.uint8))


def visible(truth: Truth) -> jax.Array:
    """[B]: does the prompt have a target with an area?"""
    return (truth.real & (truth.boxes[..., 2:] > 0).all(-1)).any(-1)
