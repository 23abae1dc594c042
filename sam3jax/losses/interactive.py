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
    # Full-size masks exist for a few objects at a time, forward and backward.
    one = jax.checkpoint(lambda row: _one_object(row, config))
    chunk = min(config.objects_at_once, len(ious))
    mask, dice_, iou_error, iou, best = jax.lax.map(one, rows, batch_size=chunk)
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


def _one_object(row: tuple[jax.Array, ...], config: ClicksConfig):
    """A row of masks [M, y, x], ious [M], target [Y, X], in_play [M] -> five numbers."""
    masks, ious, target, in_play = row
    if config.mask_resolution == "prediction":
        target = at_centres(target, masks.shape[1:])
    else:
        masks = resize_bilinear(masks, target.shape)
    wanted = jnp.broadcast_to(target, masks.shape).astype(jnp.float32)
    if config.mask_loss == "focal":
        pixelwise = focal(masks, wanted, alpha=config.focal_alpha, gamma=config.focal_gamma)
    else:
        pixelwise = bce(masks, wanted)
    mask = pixelwise.mean((1, 2))
    dice_ = dice(masks, wanted)
    true_ious = iou_of_masks(masks > 0, target[None])
    miss = jnp.abs(ious - true_ious)
    if config.iou_error == "mse":
        miss = miss**2
    cost = jnp.where(in_play, config.loss_mask * mask + config.loss_dice * dice_, jnp.inf)
    best = jnp.argmin(cost)
    if config.iou_of == "all":
        miss = jnp.where(in_play, miss, 0.0).sum() / in_play.sum()
    else:
        miss = miss[best]
    return mask[best], dice_[best], miss, true_ious[best], best


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
