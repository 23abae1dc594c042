"""Random inputs of the loss, in the form both sides take: numpy arrays with explicit masks.

Used by the parity tests (against torch), the golden cases (against frozen figures) and the property
tests. Predicted masks are arbitrary: with D = Q, mask_embed = identity and pixel_embed = the masks.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from sam3jax.types import Detections, Outputs, Targets


@dataclasses.dataclass
class Case:
    """I pictures with P prompts; L layers, Q queries; every array as in sam3jax.types, masks unpacked."""

    logits: np.ndarray  # [L, B, Q]
    boxes: np.ndarray  # [L, B, Q, 4]
    logits_o2m: np.ndarray
    boxes_o2m: np.ndarray
    presence: np.ndarray  # [L, B]
    masks: np.ndarray  # [B, Q, Y', X']
    masks_o2m: np.ndarray
    semantic: np.ndarray  # [B, Y', X']
    target_boxes: np.ndarray  # [I, M, 4]
    target_masks: np.ndarray  # [I, M, Y, X] bool
    mask_valid: np.ndarray  # [I, M]
    index: np.ndarray  # [I, P, T]
    num_targets: np.ndarray  # [I, P]
    exhaustive: np.ndarray  # [I, P]
    prompt_valid: np.ndarray  # [I, P]


def random_case(
    seed: int,
    *,
    images: int = 3,
    prompts: int = 2,
    queries: int = 7,
    layers: int = 3,
    targets: int = 4,
    instances: int = 5,
    size: tuple[int, int] = (6, 8),
    scale: int = 3,
    logit_scale: float = 2.0,
    crowded: bool = False,
    counts: np.ndarray | None = None,
    zero_area: bool = False,
    invalid_masks: bool = True,
) -> Case:
    """A random case. Half of the queries lie near an instance, so that one-to-many finds matches.

    crowded: instances nearly coincide, so that one query serves several. zero_area: some target boxes
    have no width or height.
    """
    rng = np.random.default_rng(seed)
    pairs, (y, x) = images * prompts, size
    centre, extent = (
        rng.uniform(0.3, 0.7, (images, instances, 2)),
        rng.uniform(0.1, 0.5, (images, instances, 2)),
    )
    if crowded:
        centre = centre[:, :1] + rng.normal(0, 0.004, centre.shape)
        extent = extent[:, :1] + rng.uniform(0, 0.004, extent.shape)
    target_boxes = np.concatenate([centre, extent], -1)
    if zero_area:
        target_boxes[:, ::2, 2 + rng.integers(2)] = 0.0
    index = np.full((images, prompts, targets), instances, np.int32)
    if counts is None:
        counts = rng.integers(0, min(targets, instances) + 1, (images, prompts))
    for i, p in np.ndindex(images, prompts):
        index[i, p, : counts[i, p]] = rng.permutation(instances)[: counts[i, p]]

    def boxes() -> np.ndarray:
        b = np.concatenate(
            [
                rng.uniform(0.2, 0.8, (layers, pairs, queries, 2)),
                rng.uniform(0.05, 0.5, (layers, pairs, queries, 2)),
            ],
            -1,
        )
        near = target_boxes[np.arange(pairs) // prompts][:, rng.integers(0, instances, queries)]
        near = np.maximum(near + rng.normal(0, 0.01, b.shape), 0.01)
        return np.where((np.arange(queries) % 2 == 0)[:, None], near, b).astype(np.float32)

    def logits() -> np.ndarray:
        return (logit_scale * rng.normal(size=(layers, pairs, queries))).astype(np.float32)

    def maps(*shape: int) -> np.ndarray:
        return (2 * rng.normal(size=(*shape, y, x))).astype(np.float32)

    return Case(
        logits=logits(),
        boxes=boxes(),
        logits_o2m=logits() + 1,
        boxes_o2m=boxes(),
        presence=(logit_scale * rng.normal(size=(layers, pairs))).astype(np.float32),
        masks=maps(pairs, queries),
        masks_o2m=maps(pairs, queries),
        semantic=maps(pairs),
        target_boxes=target_boxes.astype(np.float32),
        target_masks=rng.uniform(size=(images, instances, scale * y, scale * x)) < 0.3,
        mask_valid=rng.uniform(size=(images, instances)) < (0.7 if invalid_masks else 2.0),
        index=index,
        num_targets=counts.astype(np.int32),
        exhaustive=rng.uniform(size=(images, prompts)) < 0.6,
        prompt_valid=np.ones((images, prompts), bool),
    )


def to_outputs(case: Case, dtype=jnp.float32) -> Outputs:
    """The case as the detector would return it."""
    pairs, q = case.masks.shape[:2]
    eye = np.broadcast_to(np.eye(2 * q, dtype=np.float32), (pairs, 2 * q, 2 * q))
    pixels = np.concatenate([case.masks, case.masks_o2m], 1).transpose(0, 2, 3, 1)
    cast = lambda x: jnp.asarray(x, dtype)
    return Outputs(
        o2o=Detections(cast(case.logits), cast(case.boxes), cast(eye[:, :q])),
        o2m=Detections(cast(case.logits_o2m), cast(case.boxes_o2m), cast(eye[:, q:])),
        presence_logits=cast(case.presence),
        pixel_embed=cast(pixels),
        semantic_logits=cast(case.semantic),
    )


def to_targets(case: Case) -> Targets:
    """The targets as the loader would pack them."""
    return Targets(
        boxes=jnp.asarray(case.target_boxes),
        masks=jnp.asarray(np.packbits(case.target_masks, axis=-1)),
        mask_valid=jnp.asarray(case.mask_valid),
        index=jnp.asarray(case.index),
        num_targets=jnp.asarray(case.num_targets),
        is_exhaustive=jnp.asarray(case.exhaustive),
    )
