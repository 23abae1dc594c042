"""Loss of the semantic head: one map per prompt against the union of its instances. Answers to
SemanticSegCriterion (sam3.train.loss.loss_fns) without its own presence loss, which the decoder has.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sam3jax.config import LossConfig
from sam3jax.losses.masks import bce, dice, focal, interpolation, mask_width, resize_bilinear
from sam3jax.types import Targets


def semantic_losses(
    logits: jax.Array,
    targets: Targets,
    valid: jax.Array,
    instance: jax.Array,
    real: jax.Array,
    config: LossConfig,
    axis_names: tuple[str, ...] | None,
) -> dict[str, jax.Array]:
    """`loss_semantic_seg`, `loss_semantic_dice` and the metric `miou_semantic_seg`, as shares.

    logits [B, Y', X']; valid [B]; instance, real [B, T]. The truth is the union of a prompt's masks;
    an instance without a usable mask adds nothing. semantic_downsample: compared at the size of the
    prediction, where a pixel counts as soon as it sees any of the union (bilinear, then > 0, as in
    torch); else the prediction is upsampled. semantic_positive_only: mean over the prompts with a
    non-empty union, else over all. (A batch without any instance: torch compares with a single pixel
    or fails; here the union is empty.)
    """
    width = mask_width(targets.masks, logits[..., None])
    per_image = len(logits) // len(targets.masks)

    @jax.checkpoint  # one prompt's full-size maps at a time, drawn again for the gradient
    def prompt(args):
        b, logits, instance, real = args
        masks = targets.masks[b // per_image, instance]  # [T, Y, X / 8]
        masks = jnp.where(real[:, None, None], masks, 0)
        union = jax.lax.reduce(masks, jnp.zeros_like(masks[0, 0, 0]), jax.lax.bitwise_or, (0,))
        union = jnp.unpackbits(union, axis=-1, count=width)[None].astype(jnp.float32)
        logits = logits[None].astype(jnp.float32)
        if config.semantic_downsample:
            union = _any_seen(union, logits.shape[1:])
        else:
            logits = resize_bilinear(logits, union.shape[1:])
        if config.semantic_focal:
            pixelwise = focal(
                logits, union, alpha=config.semantic_focal_alpha, gamma=config.semantic_focal_gamma
            )
        else:
            pixelwise = bce(logits, union)
        here, said = union > 0, jax.nn.sigmoid(logits) > 0.5
        overlap = (here & said).sum() / ((here | said).sum() + 1e-8)
        return jnp.stack([pixelwise.mean(), dice(logits, union)[0], overlap, here.any()])

    index = jnp.arange(len(logits))
    seg, loss_dice, overlap, positive = jax.lax.map(prompt, (index, logits, instance, real)).T
    counted = valid & (positive > 0) if config.semantic_positive_only else valid
    over_devices = lambda x: jax.lax.psum(x, axis_names) if axis_names else x
    divisor = over_devices(counted.sum().astype(jnp.float32))
    positives = over_devices((valid & (positive > 0)).sum().astype(jnp.float32))
    divisor = divisor + 1e-6 if config.semantic_positive_only else jnp.maximum(divisor, 1)
    return {
        "loss_semantic_seg": jnp.where(counted, seg, 0.0).sum() / divisor,
        "loss_semantic_dice": jnp.where(counted, loss_dice, 0.0).sum() / divisor,
        "miou_semantic_seg": jnp.where(valid, overlap, 0.0).sum() / jnp.maximum(positives, 1),
    }


def _any_seen(union: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Does the bilinear sample of each coarse pixel see anything? [1, Y, X] -> [1, *size], 0 or 1."""
    rows, columns = (
        (interpolation(o, i) > 0).astype(jnp.float32) for o, i in zip(size, union.shape[1:])
    )
    return (jnp.einsum("yh,rhw,xw->ryx", rows, union, columns) > 0).astype(jnp.float32)
