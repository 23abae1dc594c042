"""Non-maximum suppression by mask overlap, on the device, with static shapes.

Answers to nms_masks (sam3.perflib.nms) and to what forward_video_grounding_multigpu does with it.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import lax

LOWERED = 1e4  # what a dropped detection's logit loses, as published


def nms(
    probs: jax.Array,
    masks: jax.Array,
    *,
    prob_threshold: float = 0.5,
    iou_threshold: float = 0.1,
) -> jax.Array:
    """Which detections stay: those above the probability that overlap no stronger one that stays.

    probs [..., Q]; masks [..., Q, Y, X] bool -> keep [..., Q] bool. Both thresholds are strict: a
    probability or an IoU equal to its threshold does not exceed it. Of equal probabilities the
    later detection counts as the stronger, as in the published order.
    """
    chex.assert_equal_shape_prefix([probs, masks], probs.ndim)
    if probs.ndim > 1:
        one = lambda p, m: nms(p, m, prob_threshold=prob_threshold, iou_threshold=iou_threshold)
        return lax.map(lambda pair: one(*pair), (probs, masks))
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
