"""The loss of prompted masks. Answers to `MultiStepMultiMasksAndIous`, sam2's loss that trained SAM 3's
interactive heads (sam3 ships it commented out).

One call is one round: first prompt or correction. The loss of a training step is the sum over its
rounds, divided by the number of objects: not by rounds, not by pictures.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sam3jax.config import ClicksConfig
from sam3jax.losses.elementwise import bce, dice, focal
from sam3jax.losses.resample import resize_bilinear


@struct.dataclass
class RoundLosses:
    """Shares of each of B objects, unweighted; `iou`: of the best mask with the truth, no loss.

    best [B] int32: the mask that was taught.
    """

    mask: jax.Array
    dice: jax.Array
    iou_error: jax.Array
    score: jax.Array
    iou: jax.Array
    best: jax.Array

    def total(self, config: ClicksConfig) -> jax.Array:
        """The weighted loss of each object, [B]."""
        return (
            config.loss_mask * self.mask
            + config.loss_dice * self.dice
            + config.loss_iou * self.iou_error
            + config.loss_score * self.score
        )


def round_losses(
    masks: jax.Array,  # [B, M, y, x]
    ious: jax.Array,  # [B, M]
    score: jax.Array,  # [B]
    targets: jax.Array,  # [B, Y, X]
    config: ClicksConfig,
    *,
    in_play: jax.Array | None = None,  # [B, M]
) -> RoundLosses:
    """Losses of one round, object by object.

    masks and score are logits, ious in 0..1, targets bool. Of the M masks the one with the least
    weighted mask and dice loss is taught; the IoU head on that one or on all (`iou_of`). Masks that are
    not `in_play` count for nothing. An object without a pixel in its target only teaches the score.
    """
    rows = (masks, ious, targets, jnp.ones(ious.shape, bool) if in_play is None else in_play)
    # Full-size masks exist for a few objects at a time, forward and backward: equal chunks, as few as may be.
    chunks = -(-len(ious) // config.objects_at_once)
    size = -(-len(ious) // chunks)
    rows = jax.tree.map(lambda x: _in_chunks(x, chunks, size), rows)
    some = jax.checkpoint(lambda chunk: _some_objects(chunk, config))
    found = jax.lax.map(some, rows)
    mask, dice_, iou_error, iou, best = (x.reshape(-1)[: len(ious)] for x in found)
    present = targets.any((1, 2))
    share = lambda x: jnp.where(present, x, 0.0)
    return RoundLosses(
        mask=share(mask),
        dice=share(dice_),
        iou_error=share(iou_error),
        score=bce(score, present.astype(jnp.float32)),
        iou=share(iou),
        best=best,
    )


def _in_chunks(x: jax.Array, chunks: int, size: int) -> jax.Array:
    """[B, ...] -> [chunks, size, ...], filled up with zeros."""
    filled = jnp.pad(x, [(0, chunks * size - len(x)), *[(0, 0)] * (x.ndim - 1)])
    return filled.reshape(chunks, size, *x.shape[1:])


def _some_objects(chunk: tuple[jax.Array, ...], config: ClicksConfig):
    """Masks [C, M, y, x], ious [C, M], targets [C, Y, X], in_play [C, M] -> five arrays [C].

    Written for C objects, not for one under `vmap`: XLA:CPU would transpose every enlarged mask.
    """
    masks, ious, target, in_play = chunk
    if config.mask_resolution == "prediction":
        target = at_centres(target, masks.shape[2:])
    # [C M, Y, X] from here on.
    masks = masks.reshape(-1, *masks.shape[2:])
    if config.mask_resolution == "target":
        masks = resize_bilinear(masks, target.shape[1:])
    of_mask = lambda x: jnp.repeat(x, ious.shape[1], 0)
    wanted = of_mask(target).astype(jnp.float32)
    if config.mask_loss == "focal":
        pixelwise = focal(masks, wanted, alpha=config.focal_alpha, gamma=config.focal_gamma)
    else:
        pixelwise = bce(masks, wanted)
    by_object = lambda x: x.reshape(ious.shape)
    mask = by_object(pixelwise.mean((1, 2)))
    dice_ = by_object(dice(masks, wanted))
    true_ious = by_object(iou_of_masks(masks > 0, of_mask(target)))
    miss = jnp.abs(ious - true_ious)
    if config.iou_error == "mse":
        miss = miss**2
    cost = jnp.where(in_play, config.loss_mask * mask + config.loss_dice * dice_, jnp.inf)
    best = jnp.argmin(cost, 1)
    of_best = lambda x: jnp.take_along_axis(x, best[:, None], 1)[:, 0]
    if config.iou_of == "all":
        miss = jnp.where(in_play, miss, 0.0).sum(1) / jnp.maximum(in_play.sum(1), 1)
    else:
        miss = of_best(miss)
    return of_best(mask), of_best(dice_), miss, of_best(true_ious), best


def iou_of_masks(a: jax.Array, b: jax.Array) -> jax.Array:
    """IoU of bool masks [..., Y, X]; 0 where both are empty."""
    both, either = (a & b).sum((-2, -1)), (a | b).sum((-2, -1))
    return both / jnp.maximum(either, 1)


def at_centres(target: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """A mask at the centres of a grid of another size. [..., Y, X] -> [..., *size]."""
    rows, columns = (
        np.minimum(((np.arange(o) + 0.5) * (i / o)).astype(np.int32), i - 1)
        for o, i in zip(size, target.shape[-2:], strict=True)
    )
    return target[..., rows, :][..., columns]
