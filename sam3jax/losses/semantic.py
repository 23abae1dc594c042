"""Loss of the semantic head: one map per prompt against the union of its instances. Answers to
SemanticSegCriterion (sam3.train.loss.loss_fns) without its own presence loss, which the decoder has.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sam3jax.config import LossConfig
from sam3jax.losses.elementwise import bce, dice, focal
from sam3jax.losses.masks import mask_width, without_void
from sam3jax.losses.resample import interpolation, nearest_bits, resize_bilinear
from sam3jax.losses.truth import Truth
from sam3jax.types import Array, Targets


def semantic_losses(
    logits: jax.Array, targets: Targets, truth: Truth, config: LossConfig
) -> dict[str, jax.Array]:
    """`loss_semantic_seg`, `loss_semantic_dice` and the metric `miou_semantic_seg` of each prompt, [B].

    logits [B, Y', X']. The truth is the union of a prompt's masks; an instance without a usable mask
    adds nothing. semantic_downsample: compared at the size of the prediction, where a pixel counts as
    soon as it sees any of the union (bilinear, then > 0, as in torch); else the prediction is
    upsampled. Void pixels do not count. semantic_positive_only: prompts with an empty union count 0. (Torch compares a batch
    without any instance with a single pixel, or fails; here the union is empty.)
    """
    width = mask_width(targets.masks, logits[..., None])
    per_image = len(logits) // len(targets.masks)

    @jax.checkpoint  # one prompt's full-size maps at a time, drawn again for the gradient
    def prompt(args):
        b, logits, instance, real = args
        union = _union(targets.masks[b // per_image, instance], real, width)
        logits = logits[None].astype(jnp.float32)
        if config.semantic_downsample:
            union = _any_seen(union, logits.shape[1:])
        else:
            logits = resize_bilinear(logits, union.shape[1:])
        share = jnp.ones(1)
        if targets.void is not None:
            bits = jnp.asarray(targets.void)[b // per_image][None]
            hidden = nearest_bits(bits, union.shape[1:], width) > 0
            logits, union, share = without_void(logits, union, hidden)
        if config.semantic_focal:
            pixelwise = focal(
                logits, union, alpha=config.semantic_focal_alpha, gamma=config.semantic_focal_gamma
            )
        else:
            pixelwise = bce(logits, union)
        here, said = union > 0, jax.nn.sigmoid(logits) > 0.5
        overlap = (here & said).sum() / ((here | said).sum() + 1e-8)
        return jnp.stack([pixelwise.mean() * share[0], dice(logits, union)[0], overlap, here.any()])

    index = jnp.arange(len(logits))
    seg, loss_dice, overlap, positive = jax.lax.map(
        prompt, (index, logits, truth.instance, truth.real)
    ).T
    counted = truth.valid & (positive > 0) if config.semantic_positive_only else truth.valid
    return {
        "loss_semantic_seg": jnp.where(counted, seg, 0.0),
        "loss_semantic_dice": jnp.where(counted, loss_dice, 0.0),
        "miou_semantic_seg": jnp.where(truth.valid, overlap, 0.0),
    }


def has_union(
    targets: Targets, truth: Truth, config: LossConfig, size: tuple[int, ...]
) -> jax.Array:
    """[B]: whether the truth of a prompt is not empty at the size where it is compared."""
    per_image = len(truth.real) // len(targets.masks)
    width = mask_width(targets.masks, jnp.zeros((1, *size, 0)))

    def prompt(args):
        b, instance, real = args
        union = _union(targets.masks[b // per_image, instance], real, width)
        return (_any_seen(union, size) if config.semantic_downsample else union).any()

    index = jnp.arange(len(truth.real))
    return jax.lax.map(prompt, (index, truth.instance, truth.real))


def _union(masks: Array, real: jax.Array, width: int) -> jax.Array:
    """Packed masks [T, Y, X / 8], those that are real -> [1, Y, X] float32, 0 or 1."""
    masks = jnp.where(real[:, None, None], masks, 0)
    union = jax.lax.reduce(masks, jnp.zeros_like(masks[0, 0, 0]), jax.lax.bitwise_or, (0,))
    return jnp.unpackbits(union, axis=-1, count=width)[None].astype(jnp.float32)


def _any_seen(union: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Does the bilinear sample of each coarse pixel see anything? [1, Y, X] -> [1, *size], 0 or 1."""
    rows, columns = (
        (interpolation(o, i) > 0).astype(jnp.float32) for o, i in zip(size, union.shape[1:])
    )
    return (jnp.einsum("yh,rhw,xw->ryx", rows, union, columns) > 0).astype(jnp.float32)
