"""Boxes: formats, areas, overlap. Answers to sam3.model.box_ops.

All functions work on the last axis and broadcast the others, so that one formula serves pairs
(`giou(a, b)`) and tables (`giou(a[:, None], b[None])`). Unlike the torch functions they never return
NaN: an overlap whose denominator vanishes (two boxes without area) is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Below this a box is nothing (a thousandth of a pixel at 1008 px has area 1e-12). The square of the
# bound must stay a normal float32, since the gradient of a quotient divides by it.
_NO_AREA = 1e-16


def cxcywh_to_xyxy(boxes: jax.Array) -> jax.Array:
    """Centre and size to corners. [..., 4] -> [..., 4], same unit."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([centre - 0.5 * size, centre + 0.5 * size], axis=-1)


def xyxy_to_cxcywh(boxes: jax.Array) -> jax.Array:
    """Corners to centre and size. [..., 4] -> [..., 4], same unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def area(boxes_xyxy: jax.Array) -> jax.Array:
    """Signed area of corner boxes. [..., 4] -> [...]."""
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    return size[..., 0] * size[..., 1]


def iou(boxes_xyxy: jax.Array, other_xyxy: jax.Array) -> jax.Array:
    """Intersection over union of corner boxes, broadcasting. [..., 4], [..., 4] -> [...].

    0 where neither box has an area (torch: NaN).
    """
    inter, union = _inter_union(boxes_xyxy, other_xyxy)
    return _ratio(inter, union)


def giou(boxes_xyxy: jax.Array, other_xyxy: jax.Array) -> jax.Array:
    """Generalized IoU (Rezatofighi et al. 2019) of corner boxes, broadcasting, in -1..1.

    IoU minus the share of the smallest enclosing box that neither covers. Two boxes without area: -1
    where they are apart, 0 where even the enclosing box has none (torch: NaN in both cases).
    """
    inter, union = _inter_union(boxes_xyxy, other_xyxy)
    low = jnp.minimum(boxes_xyxy[..., :2], other_xyxy[..., :2])
    high = jnp.maximum(boxes_xyxy[..., 2:], other_xyxy[..., 2:])
    size = _at_least_zero(high - low)
    hull = size[..., 0] * size[..., 1]
    return _ratio(inter, union) - _ratio(hull - union, hull)


def _inter_union(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    size = _at_least_zero(jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]))
    inter = size[..., 0] * size[..., 1]
    return inter, area(a) + area(b) - inter


def _at_least_zero(x: jax.Array) -> jax.Array:
    # Not jnp.maximum: at exactly 0 it hands on half the gradient, torch's clamp all of it.
    return jnp.where(x >= 0, x, 0.0)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    there = b > _NO_AREA
    return jnp.where(there, a / jnp.where(there, b, 1.0), 0.0)
