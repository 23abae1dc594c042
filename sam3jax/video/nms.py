"""Non-maximum suppression by mask overlap, on the device, with static shapes.

Answers to nms_masks (sam3.perflib.nms) and to what forward_video_grounding_multigpu does with it.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

LOWERED = 1e4  # what a dropped detection's logit loses, as published


def nms(
    probs: jax.Array,
    masks: jax.Array,
    *,
    prob_threshold: ArrayLike = 0.5,
    iou_threshold: ArrayLike = 0.1,
) -> jax.Array:
    """Which detections stay: those above the probability that overlap no stronger one that stays.

    probs [..., Q]; masks [..., Q, Y, X] bool -> keep [..., Q] bool. Both thresholds are one number, or
    one for each row [...], and strict: a probability or an IoU equal to its threshold does not exceed
    it. Of equal probabilities the later detection counts as the stronger, as in the published order.
    """
    chex.assert_equal_shape_prefix([probs, masks], probs.ndim)
    if probs.ndim > 1:
        rows = probs.shape[:-1]
        thresholds = (jnp.broadcast_to(t, rows) for t in (prob_threshold, iou_threshold))
        one = lambda row: nms(row[0], row[1], prob_threshold=row[2], iou_threshold=row[3])
        return lax.map(one, (probs, masks, *thresholds))
    order = jnp.argsort(probs, stable=True)[::-1]  # strongest first
    candidate = probs > prob_threshold
    rival = mask_iou(masks, masks) > iou_threshold  # [Q, Q]

    def step(place: jax.Array, keep: jax.Array) -> jax.Array:
        here = order[place]
        return keep.at[here].set(candidate[here] & ~jnp.any(keep & rival[here]))

    return lax.fori_loop(0, probs.shape[0], step, jnp.zeros_like(candidate))


def lower(logits: jax.Array, keep: jax.Array) -> jax.Array:
    """Logits of which those that do not stay are lowered by 1e4; shapes do not change."""
    return logits - LOWERED * ~keep


def mask_iou(masks: jax.Array, others: jax.Array) -> jax.Array:
    """masks [N, Y, X], others [M, Y, X] bool -> IoU [N, M] float32, 0 where both are empty.

    Exact counts: sums of ones in float32 are exact below 2^24 pixels.
    """
    a, b = (m.reshape(m.shape[0], -1).astype(jnp.float32) for m in (masks, others))
    both = jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)
    union = a.sum(1)[:, None] + b.sum(1) - both
    return both / jnp.maximum(union, 1.0)
