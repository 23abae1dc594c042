"""Positions: sine tables of grids and boxes, 2-d rotary tables, the log box-relative deltas.

Answers to sam3.model.position_encoding and parts of vitdet, decoder and model_misc.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

TEMPERATURE = 10000.0


def sine(x: jax.Array, width: int) -> jax.Array:
    """Sine and cosine pairs of positions in 0..1 (times 2 pi): x [...] -> [..., width]."""
    i = jnp.arange(width)
    period = TEMPERATURE ** (2 * (i // 2) / width)
    angle = x[..., None] * (2 * math.pi) / period
    return jnp.where(i % 2 == 0, jnp.sin(angle), jnp.cos(angle))


def sine_grid(rows: int, columns: int, width: int) -> jax.Array:
    """Sine positions of a feature map: [rows, columns, width], the y half first.

    Cell n of N stands at n / (N + 1e-6), n counted from 1.
    """
    y = sine(jnp.arange(1, rows + 1) / (rows + 1e-6), width // 2)
    x = sine(jnp.arange(1, columns + 1) / (columns + 1e-6), width // 2)
    y = jnp.broadcast_to(y[:, None], (rows, columns, width // 2))
    x = jnp.broadcast_to(x[None], (rows, columns, width // 2))
    return jnp.concatenate([y, x], -1)


def sine_boxes(boxes: jax.Array, width: int) -> jax.Array:
    """Sine positions of boxes [..., 4] -> [..., 2 * width] in the order y, x, w, h."""
    parts = [sine(boxes[..., i], width // 2) for i in (1, 0, 2, 3)]
    return jnp.concatenate(parts, -1)


def rope_table(grid: int, head_width: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [grid * grid, head_width / 2] of the 2-d rotary positions: x angles, then y.

    `scale` shrinks positions to the grid that was used in pretraining.
    """
    quarter = head_width // 4
    frequency = 1.0 / TEMPERATURE ** (4 * jnp.arange(quarter) / head_width)
    position = jnp.arange(grid) * scale
    angle = position[:, None] * frequency  # [grid, K/4]
    x = jnp.broadcast_to(angle[None], (grid, grid, quarter))
    y = jnp.broadcast_to(angle[:, None], (grid, grid, quarter))
    angle = jnp.concatenate([x, y], -1).reshape(grid * grid, 2 * quarter)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate neighbouring channel pairs of x [B, N, H, K] by the table's angles, in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None], sin[:, None]  # [N, 1, K/2]
    out = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return out.reshape(x.shape).astype(x.dtype)


def log_deltas(boxes_xyxy: jax.Array, cells: int) -> tuple[jax.Array, jax.Array]:
    """Signed log distances of grid cells to box sides, [B, Q, cells, 2] for x and for y.

    sign(d) log2(|8 d| + 1) / 3 with d the distance in picture widths (BoxRPB "log").
    """
    cell = jnp.arange(cells) / cells

    def deltas(sides):  # [B, Q, 2]
        d = 8.0 * (cell[:, None] - sides[:, :, None])  # [B, Q, cells, 2]
        return jnp.sign(d) * jnp.log2(jnp.abs(d) + 1.0) / math.log2(8)

    return deltas(boxes_xyxy[..., 0::2]), deltas(boxes_xyxy[..., 1::2])
