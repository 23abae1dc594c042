"""Attention block by block, with a derivative of its own: no platform holds all scores at once.

The backward pass forms each block's weights again from the row's largest score and sum (Dao et al.,
https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sam3jax.model.layers import zero_like

# Scores formed at a time in elements. On a CPU 16 MB: smaller blocks were mostly slower. Elsewhere 64 MB,
# of several heads if they are small, so that a card has enough to do at once. Chosen by compiled
# temporaries of a global block's gradient: .2 GB on an H100 in the place of 5.2, .01 on a TPU v5e in
# the place of 3.5. How fast it is there has not been measured.
BLOCK = 1 << 22
ACCELERATOR_BLOCK = 1 << 24
KEPT = "attention"


def block_of(platform: str) -> int:
    """Largest number of scores that are formed at a time on a platform (`cpu`, `gpu`, `tpu`)."""
    return BLOCK if platform == "cpu" else ACCELERATOR_BLOCK


class Noise(NamedTuple):
    """Random words behind attention's dropout: rows [..., N] and columns [..., S], uint32.

    Mixed into one word a score where it is needed. Drawing a word for each of the fusion encoder's
    215 million scores a layer took six times as long as everything else in that layer.
    """

    rows: jax.Array
    columns: jax.Array

    def drop(self, weights: jax.Array, rate: float) -> jax.Array:
        """Weights [..., N, S], each zero with probability `rate`, else divided by 1 - rate."""
        words = _mix(self.rows[..., :, None] ^ self.columns[..., None, :])
        return jnp.where(words >= jnp.uint32(round(rate * 2**32)), weights / (1.0 - rate), 0.0)


def _mix(x: jax.Array) -> jax.Array:
    """Every bit of the result depends on every bit of x: the finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def blockwise(q, k, v, bias, mask, dropout_rate, noise, platform="cpu"):
    """`attention.attention` in blocks. Shapes as there; noise: rows and columns of [B, H], or None."""
    (b, n, h, _), s = q.shape, k.shape[1]
    block = block_of(platform)
    q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q, k, v))
    bias, noise = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (bias, noise))
    if mask is not None:
        mask = jnp.broadcast_to(mask, (b, 1, mask.shape[-2], s))[:, 0]
    # Under shard_map each gradient must vary over the mesh as its argument does: all do, or none.
    zero = zero_like(*jax.tree.leaves((q, k, v, bias, mask, noise)))
    q, k, v, bias = jax.tree.map(lambda x: x + zero.astype(x.dtype), (q, k, v, bias))
    if (together := 1 if platform == "cpu" else _heads_together(h, b * n * s, block)) > 1:
        fold = lambda x: x.reshape(h // together, together * b, *x.shape[2:])
        q, k, v, bias, noise = jax.tree.map(fold, (q, k, v, bias, noise))
        mask = None if mask is None else jnp.tile(mask, (together, 1, 1))
    y: Any = _blockwise(dropout_rate, block, q, k, v, bias, mask, noise)
    return jnp.moveaxis(y.reshape(h, b, *y.shape[2:]), 0, 2)


def _heads_together(heads: int, scores: int, block: int) -> int:
    """Heads, of `scores` each, that make up one block: a divisor of their number."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * scores <= block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(rate, block, q, k, v, bias, mask, noise):
    """Heads first: q [H, B, N, K]; k, v [H, B, S, K]; bias [H, B, N, S]; mask [B, N or 1, S]; noise
    of [H, B]. One head at a time, of it some rows at a time. The backward pass forms each block's
    weights again from the row's largest score and sum (Dao et al., https://arxiv.org/abs/2205.14135).
    """
    return _blockwise_forward(rate, block, q, k, v, bias, mask, noise)[0]


def _blockwise_forward(rate, block, q, k, v, bias, mask, noise):
    rows = _block_rows(q.shape[1:3], k.shape[2], block)

    def one_head(parts):
        q, k, v, bias, noise = parts

        def one_block(parts):
            scores = _block_scores(k, parts)
            most = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - most)
            total = weights.sum(-1, keepdims=True)
            if noise is not None:
                weights = Noise(parts.noise_rows, noise.columns).drop(weights, rate)
            y = _product("bns,bsk->bnk", weights.astype(v.dtype), v) / total
            return y.astype(q.dtype), most, total

        blocks = _Block.split(rows, q, bias, mask, noise)
        return jax.tree.map(_join, jax.lax.map(one_block, blocks))

    out = jax.lax.map(one_head, (q, k, v, bias, noise))
    y, most, total = checkpoint_name(out, KEPT)
    return y, (q, k, v, bias, mask, noise, y, most, total)


def _blockwise_backward(rate, size, saved, cotangent):
    q, k, v, bias, mask, noise, y, most, total = saved
    rows = _block_rows(q.shape[1:3], k.shape[2], size)
    # The share of each row that its softmax takes from all its scores alike.
    share = _product("hbnk,hbnk->hbn", y, cotangent)[..., None]

    def one_head(parts):
        q, k, v, bias, noise, *by_row = parts

        def one_block(sums, parts):
            block, (most, total, share, d_y) = parts
            weights = jnp.exp(_block_scores(k, block) - most) / total
            d_weights = _product("bnk,bsk->bns", d_y, v)
            kept = weights
            if noise is not None:
                own = Noise(block.noise_rows, noise.columns)
                kept, d_weights = own.drop(weights, rate), own.drop(d_weights, rate)
            d_scores = weights * (d_weights - share)
            if block.mask is not None:
                d_scores = jnp.where(block.mask, d_scores, 0.0)
            short = d_scores.astype(k.dtype)
            d_k = sums[0] + _product("bns,bnk->bsk", short, block.q)
            d_v = sums[1] + _product("bns,bnk->bsk", kept.astype(v.dtype), d_y)
            d_q = _product("bns,bsk->bnk", short, k) * q.shape[-1] ** -0.5
            d_bias = None if bias is None else d_scores.astype(bias.dtype)
            return (d_k, d_v), (d_q.astype(q.dtype), d_bias)

        blocks = _Block.split(rows, q, bias, mask, noise), [_rows(x, rows) for x in by_row]
        start = [jnp.zeros_like(x, dtype=jnp.float32) for x in (k, v)]
        (d_k, d_v), by_row = jax.lax.scan(one_block, tuple(start), blocks)
        return *jax.tree.map(_join, by_row), d_k.astype(k.dtype), d_v.astype(v.dtype)

    everything = (q, k, v, bias, noise, most, total, share, cotangent)
    d_q, d_bias, d_k, d_v = jax.lax.map(one_head, everything)
    return d_q, d_k, d_v, d_bias, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


class _Block(NamedTuple):
    """What some rows of one head need: q [B, n, K], already scaled; bias, mask [B, n or 1, S]."""

    q: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None
    noise_rows: jax.Array | None

    @classmethod
    def split(cls, rows: int, q, bias, mask, noise) -> _Block:
        """All blocks of a head, stacked in front."""
        blocks = q.shape[1] // rows
        if mask is not None:
            alike = mask.shape[1] == 1
            mask = jnp.broadcast_to(mask, (blocks, *mask.shape)) if alike else _rows(mask, rows)
        return cls(
            q=_rows(q * q.shape[-1] ** -0.5, rows),
            bias=None if bias is None else _rows(bias, rows),
            mask=mask,
            noise_rows=None if noise is None else _rows(noise.rows, rows),
        )


def _block_scores(k: jax.Array, block: _Block) -> jax.Array:
    scores = _product("bnk,bsk->bns", block.q, k)
    if block.bias is not None:
        scores = scores + block.bias.astype(jnp.float32)
    if block.mask is not None:
        scores = jnp.where(block.mask, scores, jnp.finfo(jnp.float32).min)
    return scores


def _block_rows(shape: tuple[int, int], columns: int, block: int) -> int:
    """Rows of a block of [B, N] x S scores: a divisor of N with which it has about `block` elements."""
    batch, n = shape
    wanted = max(block // (batch * columns), 1)
    divisors = [rows for rows in range(1, n + 1) if n % rows == 0]
    below = max(rows for rows in divisors if rows <= wanted)
    # 401 is prime: better one block too large than 401 of one row.
    return below if 4 * below >= min(wanted, n) else min(r for r in divisors if r > wanted)


def _rows(x: jax.Array, rows: int) -> jax.Array:
    """[B, N, ...] -> [N / rows, B, rows, ...]."""
    b, n, *rest = x.shape
    return jnp.moveaxis(x.reshape(b, n // rows, rows, *rest), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """Undo `_rows`."""
    blocks, b, rows, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(b, blocks * rows, *rest)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
