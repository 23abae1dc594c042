"""Masks at another resolution or at single points, as torch's F.interpolate and F.grid_sample."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def resize_bilinear(maps: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """torch's F.interpolate(mode="bilinear", align_corners=False), no antialias. [R, Y, X] -> [R, *size].

    Two products with banded matrices: the backward pass is again two products, where a gather would
    turn into a scatter.
    """
    rows, columns = (interpolation(o, i) for o, i in zip(size, maps.shape[-2:]))
    # HIGHEST: an accelerator's short float32 product would cost three digits of every mask.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if size[1] != maps.shape[-1]:
        maps = product("rhw,xw->rhx", maps, columns)
    if size[0] != maps.shape[-2]:
        # One product per map: shared rows would make XLA:CPU transpose the large result.
        rows = jnp.broadcast_to(rows, (len(maps), *rows.shape))
        maps = product("ryh,rhx->ryx", rows, maps)
    return maps


def interpolation(out: int, inp: int) -> np.ndarray:
    """[out, inp] float32: row i weights the two nearest inputs, half-pixel centres, edges repeated."""
    source = np.float32(inp / out) * (np.arange(out, dtype=np.float32) + np.float32(0.5))
    source = np.maximum(source - np.float32(0.5), 0)
    low = np.minimum(source.astype(np.int32), inp - 1)
    weight = source - low
    matrix = np.zeros((out, inp), np.float32)
    matrix[np.arange(out), low] += 1 - weight
    matrix[np.arange(out), np.minimum(low + 1, inp - 1)] += weight
    return matrix


def nearest_bits(bits: jax.Array, size: tuple[int, ...], width: int) -> jax.Array:
    """Targets at the centres of a coarser grid. [R, Y, ceil(X / 8)] -> [R, *size]."""
    rows, columns = (
        np.minimum(((np.arange(o) + 0.5) * (i / o)).astype(np.int32), i - 1)
        for o, i in zip(size, (bits.shape[1], width))
    )
    return jnp.unpackbits(bits[:, rows], axis=-1)[:, :, columns]


def sample_bilinear(maps: jax.Array, points: jax.Array) -> jax.Array:
    """torch's F.grid_sample(align_corners=False) at points in 0..1, zero outside.

    maps [R, Y, X], points [R, N, 2] (x, y) -> [R, N].
    """
    y, x = maps.shape[-2:]
    return _bilinear_taps(points, x, y, lambda r, row, column: maps[r, row, column])


def sample_bits(bits: jax.Array, points: jax.Array, width: int) -> jax.Array:
    """`sample_bilinear` of packed masks. bits [R, Y, ceil(X / 8)], points [R, N, 2] -> [R, N]."""

    def tap(r, row, column):
        return (bits[r, row, column // 8] >> (7 - column % 8).astype(jnp.uint8)) & 1

    return _bilinear_taps(points, width, bits.shape[-2], tap)


def _bilinear_taps(points: jax.Array, x: int, y: int, tap) -> jax.Array:
    place = points * jnp.array([x, y], jnp.float32) - 0.5
    corner = jnp.floor(place)
    fraction = place - corner
    pair = jnp.arange(len(points))[:, None]
    total = 0.0
    for dx in (0, 1):
        for dy in (0, 1):
            column, row = (
                corner[..., 0].astype(jnp.int32) + dx,
                corner[..., 1].astype(jnp.int32) + dy,
            )
            inside = (column >= 0) & (column < x) & (row >= 0) & (row < y)
            weight = jnp.abs(1 - dx - fraction[..., 0]) * jnp.abs(1 - dy - fraction[..., 1])
            value = tap(pair, jnp.clip(row, 0, y - 1), jnp.clip(column, 0, x - 1))
            total += jnp.where(inside, weight, 0.0) * value
    return total
