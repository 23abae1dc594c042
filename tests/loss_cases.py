"""Random inputs of the loss, in the form both sides take: numpy arrays with explicit masks.

Used by the parity tests (against torch), the golden cases (against frozen figures) and the property
tests. Predicted masks are arbitrary: with D = Q, mask_embed = identity and pixel_embed = the masks.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sam3jax.config import LossConfig
from sam3jax.losses import compute_losses
from sam3jax.types import Detections, Outputs, Targets

LEAVES = (
    "logits",
    "boxes",
    "logits_o2m",
    "boxes_o2m",
    "presence",
    "masks",
    "masks_o2m",
    "semantic",
)


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


@functools.lru_cache
def loss_and_gradient(config: LossConfig):
    """Compiled (outputs, targets, prompt_valid, point_rng) -> ((total, terms), gradient of outputs)."""

    def run(outputs, targets, valid, rng):
        loss = lambda o: compute_losses(o, targets, valid, config, point_rng=rng)
        return jax.value_and_grad(loss, has_aux=True)(outputs)

    # Many programs, each run a few times: the code generator's optimisations are not worth their time.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def run(case: Case, config: LossConfig, *, rng=None, dtype=jnp.float32):
    """Terms and gradients of our loss, as {name: float} and {leaf: array} with the leaves of a Case."""
    inputs = to_outputs(case, dtype), to_targets(case), jnp.asarray(case.prompt_valid), rng
    (_, terms), g = loss_and_gradient(config)(*inputs)
    q = case.masks.shape[1]
    masks = np.asarray(g.pixel_embed.astype(jnp.float32)).transpose(0, 3, 1, 2)
    grads = (
        g.o2o.logits, g.o2o.boxes, g.o2m.logits, g.o2m.boxes, g.presence_logits,
        masks[:, :q], masks[:, q:], g.semantic_logits,
    )  # fmt: skip
    grads = {k: np.asarray(v, np.float32) for k, v in zip(LEAVES, grads)}
    return {k: float(v) for k, v in terms.items()}, grads


def assert_same(got: tuple, want: tuple, *, terms: float = 1e-5, grads: float = 1e-4) -> None:
    """Two results of `run` (or of the torch reference as `want`) agree within relative tolerances.

    A term that only the reference has must be 0 there. Gradients are compared relative to each entry
    and to the largest entry of their array.
    """
    for key, value in want[0].items():
        if key not in got[0]:
            assert value == 0, f"{key} is {value} in the reference and missing here"
        np.testing.assert_allclose(got[0].get(key, 0), value, rtol=terms, atol=1e-6, err_msg=key)
    for key, value in want[1].items():
        scale = max(np.abs(value).max(), 1e-6)
        np.testing.assert_allclose(got[1][key], value, rtol=grads, atol=grads * scale, err_msg=key)
