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
from jax.ad_checkpoint import checkpoint_name

from sam3jax.config import ClicksConfig
from sam3jax.losses.elementwise import bce, dice, focal
from sam3jax.losses.resample import resize_bilinear

# What was chosen without a gradient: a round that is computed again for its gradient need not choose again.
CHOSEN = "chosen"


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
    best, true_ious = jnp.zeros(len(ious), jnp.int32), None
    if ious.shape[1] > 1:
        # All are compared without a gradient, and the one that is taught once more with it.
        mask, dice_, true_ious = _compared(jax.lax.stop_gradient(masks), targets, config)
        cost = config.loss_mask * mask + config.loss_dice * dice_
        cost = cost if in_play is None else jnp.where(in_play, cost, jnp.inf)
        best, true_ious = checkpoint_name((jnp.argmin(cost, 1), true_ious), CHOSEN)
    taught = jnp.take_along_axis(masks, best[:, None, None, None], 1)
    mask, dice_, iou = _compared(taught, targets, config)
    miss = jnp.abs(ious - (iou if true_ious is None else true_ious))
    if config.iou_error == "mse":
        miss = miss**2
    if config.iou_of == "best":
        iou_error = jnp.take_along_axis(miss, best[:, None], 1)[:, 0]
    else:
        counted = jnp.ones(ious.shape, bool) if in_play is None else in_play
        iou_error = jnp.where(counted, miss, 0.0).sum(1) / jnp.maximum(counted.sum(1), 1)
    present = targets.any((1, 2))
    share = lambda x: jnp.where(present, x, 0.0)
    return RoundLosses(
        mask=share(mask[:, 0]),
        dice=share(dice_[:, 0]),
        iou_error=share(iou_error),
        score=bce(score, present.astype(jnp.float32)),
        iou=share(iou[:, 0]),
        best=best,
    )


def _compared(
    masks: jax.Array, targets: jax.Array, config: ClicksConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Masks [B, M, y, x] with targets [B, Y, X]: pixelwise loss, Dice loss and IoU, each [B, M].

    Full-size masks exist for a few objects at a time, forward and backward: equal chunks, as few as may be.
    """
    chunks = -(-len(masks) // config.objects_at_once)
    size = -(-len(masks) // chunks)
    rows = jax.tree.map(lambda x: _in_chunks(x, chunks, size), (masks, targets))
    some = jax.checkpoint(lambda chunk: _some_objects(chunk[0], chunk[1], config))
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[: len(masks)], jax.lax.map(some, rows))


def _in_chunks(x: jax.Array, chunks: int, size: int) -> jax.Array:
    """[B, ...] -> [chunks, size, ...], filled up with zeros."""
    filled = jnp.pad(x, [(0, chunks * size - len(x)), *[(0, 0)] * (x.ndim - 1)])
    return filled.reshape(chunks, size, *x.shape[1:])


def _some_objects(
    masks: jax.Array, target: jax.Array, config: ClicksConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_compared` for C objects at once.

    Written for C objects, not for one under `vmap`: XLA:CPU would transpose every enlarged mask.
    """
    c, m = masks.shape[:2]
    if config.mask_resolution == "prediction":
        target = at_centres(target, masks.shape[2:])
    # [C M, Y, X] from here on.
    masks = masks.reshape(-1, *masks.shape[2:])
    if config.mask_resolution == "target":
        masks = resize_bilinear(masks, target.shape[1:])
    truth = jnp.repeat(target, m, 0)
    wanted = truth.astype(jnp.float32)
    if config.mask_loss == "focal":
        pixelwise = focal(masks, wanted, alpha=config.focal_alpha, gamma=config.focal_gamma)
    else:
        pixelwise = bce(masks, wanted)
    found = pixelwise.mean((1, 2)), dice(masks, wanted), iou_of_masks(masks > 0, truth)
    mask, dice_, iou = (x.reshape(c, m) for x in found)
    return mask, dice_, iou


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
