"""Mask losses: focal and dice of matched pairs, and of the semantic head. Answers to `Masks`,
`SemanticSegCriterion` (sam3.train.loss.loss_fns) and sam3.train.loss.mask_sampling.

A mask is drawn only for a query that was matched, a few at a time: prompt by prompt, the matched
pairs are packed to the front and worked off in chunks of `mask_chunk`; a chunk draws its masks, brings
them to the targets' size, reads its targets from the packed bits and returns sums. The backward pass
draws each chunk again. So memory follows one chunk, time the real pairs, and neither the padding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sam3jax.config import LossConfig
from sam3jax.losses.elementwise import dice, focal
from sam3jax.losses.resample import nearest_bits, resize_bilinear, sample_bilinear, sample_bits
from sam3jax.model.layers import zero_like
from sam3jax.types import Array

_NOTHING = -1e4  # logit whose losses and gradients are 0 in float32 where the target is 0


@struct.dataclass
class MaskPairs:
    """Matched (query, target) pairs of each prompt whose masks are to be compared.

    query [B, N] row of `embed`; instance [B, N] row of `masks`; group [B, N] 0 for one-to-one, 1 for
    one-to-many; keep [B, N] bool; key [B, N] PRNG keys of the sampled points, or None.
    """

    query: jax.Array
    instance: jax.Array
    group: jax.Array
    keep: jax.Array
    key: jax.Array | None


def mask_sums(
    embed: jax.Array,
    pixel_embed: jax.Array,
    masks: Array,
    pairs: MaskPairs,
    config: LossConfig,
    void: Array | None = None,
) -> jax.Array:
    """Focal and dice loss summed over the kept pairs of each prompt, before weights and normaliser.

    embed [B, Q, D], pixel_embed [B, Y', X', D]; masks [I, M, Y, ceil(X / 8)] packed, pair b belongs
    to image b // (B / I); void [I, Y, ceil(X / 8)] packed, pixels that do not count. Returns [B, 2, 2]:
    (one-to-one, one-to-many) x (focal, dice). Differentiable in embed and pixel_embed.
    """
    mask_width(masks, pixel_embed)
    order = jnp.argsort(~pairs.keep, axis=1, stable=True)  # kept pairs to the front
    pairs = jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=1), pairs)
    short = -pairs.keep.shape[1] % config.mask_chunk
    pairs = jax.tree.map(
        lambda x: jnp.concatenate([x, x[:, :1].repeat(short, 1)], 1) if short else x, pairs
    )
    counts = pairs.keep.sum(1) if not short else pairs.keep[:, :-short].sum(1)
    return _mask_sums(config, embed, pixel_embed, masks, void, pairs, counts)


def mask_width(masks: Array, pixel_embed: jax.Array) -> int:
    """The unpadded width of packed masks, from the shape of the predictions."""
    (y, packed), (py, px) = masks.shape[-2:], pixel_embed.shape[1:3]
    width = y * px // py
    if y * px % py or -(-width // 8) != packed:
        raise ValueError(
            f"target masks of {y} rows and {packed} packed bytes do not have the shape of predictions of "
            f"{py} x {px}: expected ceil({y} * {px} / {py} / 8) bytes; pack rows with np.packbits(axis=-1)"
        )
    return width


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mask_sums(config, embed, pixel_embed, masks, void, pairs, counts):
    per_prompt = len(embed) // len(masks)

    def prompt(args):
        b, embed, pixels, pairs, count = args

        def body(i, sums):
            chunk = _take_chunk(pairs, count, i, config.mask_chunk)
            bits = masks[b // per_prompt, chunk.instance]
            hidden = None if void is None else void[b // per_prompt]
            return sums + _chunk_sums(embed[chunk.query], pixels, bits, hidden, chunk, config)

        # The carry starts from the inputs: a constant would not be "varying" under shard_map.
        start = jnp.zeros((2, 2)) + zero_like(embed, pixels, masks, count)
        return jax.lax.fori_loop(0, _num_chunks(count, config), body, start)

    index = jnp.arange(len(embed))
    return jax.lax.map(prompt, (index, embed, pixel_embed, pairs, counts))


def _mask_sums_forward(config, embed, pixel_embed, masks, void, pairs, counts):
    out = _mask_sums(config, embed, pixel_embed, masks, void, pairs, counts)
    return out, (embed, pixel_embed, masks, void, pairs, counts)


def _mask_sums_backward(config, saved, cotangent):
    embed, pixel_embed, masks, void, pairs, counts = saved
    per_prompt = len(embed) // len(masks)

    def prompt(args):
        b, embed, pixels, pairs, count, cotangent = args

        def body(i, grads):
            chunk = _take_chunk(pairs, count, i, config.mask_chunk)
            bits = masks[b // per_prompt, chunk.instance]
            hidden = None if void is None else void[b // per_prompt]
            _, pull = jax.vjp(
                lambda e, p: _chunk_sums(e, p, bits, hidden, chunk, config),
                embed[chunk.query],
                pixels,
            )
            d_embed, d_pixels = pull(cotangent)
            # Sums of many chunks: in float32 whatever the model computes in.
            return grads[0].at[chunk.query].add(d_embed.astype(jnp.float32)), grads[1] + d_pixels

        zero = zero_like(embed, pixels, masks, count, cotangent)
        start = tuple(jnp.zeros(x.shape) + zero for x in (embed, pixels))
        grads = jax.lax.fori_loop(0, _num_chunks(count, config), body, start)
        return grads[0].astype(embed.dtype), grads[1].astype(pixels.dtype)

    index = jnp.arange(len(embed))
    grads = jax.lax.map(prompt, (index, embed, pixel_embed, pairs, counts, cotangent))
    return *grads, None, None, None, None


_mask_sums.defvjp(_mask_sums_forward, _mask_sums_backward)


def _num_chunks(count: jax.Array, config: LossConfig) -> jax.Array:
    return (count + config.mask_chunk - 1) // config.mask_chunk


def _take_chunk(pairs: MaskPairs, count: jax.Array, i: jax.Array, size: int) -> MaskPairs:
    start = i * size
    chunk = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), pairs)
    return chunk.replace(keep=start + jnp.arange(size) < count)


def _chunk_sums(
    embed: jax.Array,
    pixels: jax.Array,
    bits: jax.Array,
    void: jax.Array | None,
    chunk: MaskPairs,
    config: LossConfig,
) -> jax.Array:
    """embed [R, D], pixels [Y', X', D], bits [R, Y, ceil(X / 8)], void [Y, ceil(X / 8)] -> [2, 2], see
    `mask_sums`."""
    # Pixels first, so that neither this product nor its gradients transpose the largest array.
    logits = jnp.einsum("yxd,rd->yxr", pixels, embed, preferred_element_type=jnp.float32)
    logits = logits.transpose(2, 0, 1)  # [R, Y', X']
    width = mask_width(bits, pixels[None])
    if config.num_sample_points is not None:
        points = jax.vmap(lambda key, m: uncertain_points(key, m, config))(chunk.key, logits)
        read = lambda bits: sample_bits(bits, points, width)
        logits = sample_bilinear(logits, points)
    elif config.mask_resolution == "prediction":
        size = logits.shape[1:]
        read = lambda bits: nearest_bits(bits, size, width)
    else:
        read = lambda bits: jnp.unpackbits(bits, axis=-1, count=width)
        logits = resize_bilinear(logits, (bits.shape[1], width))
    targets = read(bits).astype(jnp.float32)
    counted = 1.0  # of each pixel, on average
    if void is not None:
        hidden = read(jnp.broadcast_to(void, bits.shape)) > 0
        logits, targets, counted = without_void(logits, targets, hidden)
    pixelwise = focal(logits, targets, alpha=config.focal_alpha, gamma=config.focal_gamma)
    mean = pixelwise.mean(tuple(range(1, pixelwise.ndim))) * counted
    losses = jnp.stack([mean, dice(logits, targets)])
    member = chunk.keep & (chunk.group == jnp.arange(2)[:, None])  # [2, R]
    return jnp.where(member[:, None], losses, 0.0).sum(-1)


def without_void(
    logits: jax.Array, targets: jax.Array, void: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits and targets [R, ...] where void pixels add 0 to every sum, and pixels per known pixel [R].

    The mean over pixels times the latter is the mean over those that are known.
    """
    axes = tuple(range(1, void.ndim))
    pixels = float(np.prod(void.shape[1:]))
    known = pixels - void.sum(axes, dtype=jnp.float32)
    return jnp.where(void, _NOTHING, logits), jnp.where(void, 0.0, targets), pixels / jnp.maximum(known, 1)  # fmt: skip


def uncertain_points(key: jax.Array, logits: jax.Array, config: LossConfig) -> jax.Array:
    """Where to compare a mask (PointRend, Kirillov et al. 2020): [num_sample_points, 2], x y in 0..1.

    logits [Y, X]. Of num_sample_points * oversample_ratio random points the importance_sample_ratio
    share nearest to the contour, the rest random.
    """
    candidates, others = point_coordinates(key, config)
    points = config.num_sample_points or 0
    sampled = sample_bilinear(jax.lax.stop_gradient(logits)[None], candidates[None])[0]
    count = points - len(others)
    _, nearest = jax.lax.top_k(-jnp.abs(sampled), count)
    return jnp.concatenate([candidates[nearest], others])


def point_coordinates(key: jax.Array, config: LossConfig) -> tuple[jax.Array, jax.Array]:
    """The random points of one pair: candidates [.., 2] and those kept regardless [.., 2]."""
    points = config.num_sample_points or 0
    uncertain = int(config.importance_sample_ratio * points)
    candidates = int(points * config.oversample_ratio)
    first, second = jax.random.split(key)
    return (
        jax.random.uniform(first, (candidates, 2)),
        jax.random.uniform(second, (points - uncertain, 2)),
    )
