"""On the device: the detector's outputs become the strongest scored boxes and masks, of static shape.

Answers to sam3/eval/postprocessors.py (PostProcessImage) and sam3/model/sam3_image_processor.py.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from sam3jax.model import draw_masks
from sam3jax.types import Outputs


@struct.dataclass
class Candidates:
    """The K strongest queries of each of B pairs, strongest first.

    scores [B, K] in 0..1; boxes [B, K, 4]; mask_logits [B, K, Y', X'], at the model's mask size;
    keep [B, K] bool, False where mask NMS dropped the query.
    """

    scores: jax.Array
    boxes: jax.Array
    mask_logits: jax.Array
    keep: jax.Array


def scores(outputs: Outputs) -> jax.Array:
    """[B, Q]: sigmoid(logit) * sigmoid(presence) of the last decoder layer."""
    presence = jax.nn.sigmoid(outputs.presence_logits[-1].astype(jnp.float32))  # [B]
    return jax.nn.sigmoid(outputs.o2o.logits[-1].astype(jnp.float32)) * presence[:, None]


def top_candidates(
    outputs: Outputs, *, limit: int, nms: float | None = None, mask_threshold: float = 0.5
) -> Candidates:
    """The `limit` strongest queries of each pair (all of them where there are fewer), with masks.

    Masks are drawn for these only. `nms`: mask IoU, at the model's mask size, above which the
    weaker of two is not kept; None keeps all.
    """
    ranked, query = lax.top_k(scores(outputs), min(limit, outputs.o2o.logits.shape[-1]))  # [B, K]
    boxes = jnp.take_along_axis(outputs.o2o.boxes[-1], query[..., None], axis=1)
    embed = jnp.take_along_axis(outputs.o2o.mask_embed, query[..., None], axis=1)  # [B, K, D]
    mask_logits = draw_masks(embed, outputs.pixel_embed)  # [B, K, Y', X']
    keep = jnp.ones(ranked.shape, bool)
    if nms is not None:
        keep = mask_nms(mask_logits > logit(mask_threshold), nms)
    return Candidates(ranked, boxes.astype(jnp.float32), mask_logits, keep)


def mask_nms(masks: jax.Array, threshold: float) -> jax.Array:
    """Greedy non-maximum suppression: masks [B, K, Y, X] bool, strongest first -> keep [B, K]."""

    def of_one_pair(mask: jax.Array) -> jax.Array:
        flat = mask.reshape(mask.shape[0], -1).astype(jnp.float32)
        both = flat @ flat.T  # [K, K], exact below 2^24 pixels
        area = jnp.diagonal(both)
        union = area[:, None] + area[None] - both
        rival = both > threshold * union  # two empty masks are no rivals: 0 > 0 is False
        order = jnp.arange(mask.shape[0])

        def step(k: jax.Array, keep: jax.Array) -> jax.Array:
            return keep.at[k].set(~jnp.any(keep & rival[k] & (order < k)))

        return lax.fori_loop(0, mask.shape[0], step, jnp.ones_like(area, bool))

    return lax.map(of_one_pair, masks)


def logit(probability: float) -> float:
    """The logit at which a probability is reached."""
    return math.log(probability / (1 - probability))
