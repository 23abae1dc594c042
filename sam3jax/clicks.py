"""Simulated users: clicks, boxes and masks drawn on the device from truth and prediction.

Answers to sam2.modeling.sam2_utils (sample_random_points_from_errors, get_next_point,
sample_box_points). Everything is a pure function of its key, works row by row, and has one static
shape for any mix of prompts, so that a step compiles once.

Masks are bool [B, Y, X] on any grid over the model's picture; points are x, y in pixels of that
picture, whose pixel (0, 0) is the point 0, 0 (see `pixels`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

OUTSIDE, INSIDE, BOX_START, BOX_END = 0, 1, 2, 3  # labels, as in sam3jax.model.prompt_encoder
ABSENT = -2


class Click(NamedTuple):
    """One click for each row: place [B, 2] (column, row) int32 on the masks' grid; label [B] int32."""

    place: jax.Array
    label: jax.Array


def uniform_click(keys: jax.Array, target: jax.Array, predicted: jax.Array) -> Click:
    """A pixel drawn uniformly from all that are wrong: label 1 where the object was missed, else 0.

    keys [B]. Where nothing is wrong: anywhere outside the object, label 0; pixel (0, 0) if the object
    covers all.
    """
    error = target != predicted
    region = jnp.where(error.any((1, 2), keepdims=True), error, ~target)
    column, row = jax.vmap(_uniform_pixel)(keys, region)
    b = jnp.arange(len(target))
    missed = target[b, row, column] & error[b, row, column]
    return Click(jnp.stack([column, row], -1), missed.astype(jnp.int32))


def point_on(keys: jax.Array, target: jax.Array) -> Click:
    """A pixel drawn uniformly from the object, label 1; without one, as where nothing is wrong."""
    return uniform_click(keys, target, jnp.zeros_like(target))


def deepest_click(target: jax.Array, predicted: jax.Array) -> Click:
    """The pixel deepest inside the larger error, as published evaluations click.

    Depth is the exact distance to the error's edge, and the picture's border is an edge. Label 1 where
    the object was missed; 0 where it was made up, where both are as deep, and, at pixel (0, 0), where
    nothing is wrong. Of equals the first in row order.
    """
    missed, made_up = (
        jax.vmap(squared_depth)(x) for x in (target & ~predicted, predicted & ~target)
    )
    is_missed = missed.max((1, 2)) > made_up.max((1, 2))
    depth = jnp.where(is_missed[:, None, None], missed, made_up)
    first = jnp.argmax(depth.reshape(len(depth), -1), 1)
    columns = target.shape[2]
    place = jnp.stack([first % columns, first // columns], -1)
    return Click(place.astype(jnp.int32), is_missed.astype(jnp.int32))


def squared_depth(region: jax.Array) -> jax.Array:
    """Squared distance of every pixel of a region [Y, X] to the nearest pixel outside, int32; 0 outside.

    Beyond the border all is outside. Exact: along rows by running maxima, then the least over rows
    (Felzenszwalb and Huttenlocher, https://doi.org/10.4086/toc.2012.v008a019, without their envelope:
    a compiled minimum over all rows is faster than a loop at these sizes).
    """
    rows, columns = region.shape
    column = jnp.arange(columns)
    before = jax.lax.cummax(jnp.where(region, -1, column), axis=1)
    after = jax.lax.cummin(jnp.where(region, columns, column), axis=1, reverse=True)
    along = jnp.minimum(column - before, after - column) ** 2  # [Y, X]
    row = jnp.arange(rows)
    across = (row[:, None] - row) ** 2  # [Y, Y]
    depth = (across[:, :, None] + along[None]).min(1)
    border = jnp.minimum(row + 1, rows - row) ** 2
    return jnp.minimum(depth, border[:, None]).astype(jnp.int32)


def box_of(target: jax.Array) -> jax.Array:
    """The first and last column and row of each object: [B, 2, 2] (x, y) int32; zeros without one."""
    sides = []
    for axis in (1, 2):
        seen = target.any(axis)
        first = jnp.argmax(seen, 1)
        last = seen.shape[1] - 1 - jnp.argmax(seen[:, ::-1], 1)
        sides.append(jnp.where(seen.any(1)[:, None], jnp.stack([first, last], 1), 0))
    return jnp.stack(sides, -1).astype(jnp.int32)


def noisy_box(
    keys: jax.Array, box: jax.Array, *, noise: float, most: float, size: float
) -> jax.Array:
    """Corners [B, 2, 2] in pixels, each side moved by up to `noise` of the box's width or height.

    No side moves by more than `most` pixels, or out of the picture, 0 to size - 1.
    """
    reach = jnp.minimum(noise * (box[:, 1] - box[:, 0]), most)[:, None]  # [B, 1, 2]
    draw = jax.vmap(lambda key: jax.random.uniform(key, (2, 2), minval=-1.0, maxval=1.0))(keys)
    return jnp.clip(box + reach * draw, 0.0, size - 1.0)


def damaged_mask(keys: jax.Array, target: jax.Array, grid: int) -> jax.Array:
    """A user's rough mask as logits [B, 4 grid, 4 grid]: moved, coarse, too large or too small.

    Shares of coarse cells that the object covers, cut at a random level, so that it grows or shrinks.
    However small, it does not vanish.
    """
    edge = 2 * grid

    def one(key: jax.Array, target: jax.Array) -> jax.Array:
        key_move, key_level = jax.random.split(key)
        cells = jax.image.resize(target.astype(jnp.float32), (edge, edge), "linear")
        move = jax.random.randint(key_move, (2,), -1, 2)
        cells = jax.lax.dynamic_slice(jnp.pad(cells, 1), 1 + move, (edge, edge))
        level = jax.random.uniform(key_level, minval=0.25, maxval=0.75)
        fine = jax.image.resize(cells, (4 * grid, 4 * grid), "linear")
        return 20.0 * (fine / jnp.maximum(fine.max(), 1e-6) - level)

    return jax.vmap(one)(keys, target)


def pixels(place: jax.Array, grid: tuple[int, ...], size: int) -> jax.Array:
    """Places (column, row) on a grid of (rows, columns) over the picture -> x, y in its pixels.

    A cell's centre; on a grid as fine as the picture, the pixel itself.
    """
    rows, columns = grid
    return (place + 0.5) * jnp.array([size / columns, size / rows]) - 0.5


def _uniform_pixel(key: jax.Array, region: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(column, row) of a pixel of the region [Y, X], each as likely; (0, 0) where it is empty.

    Counts, not one random number a pixel: the n-th pixel lies in the row where the counts pass n.
    """
    by_row = jnp.cumsum(region.sum(1, dtype=jnp.int32))
    n = jax.random.randint(key, (), 0, jnp.maximum(by_row[-1], 1))
    row = jnp.argmax(by_row > n)
    n = n - jnp.where(row > 0, by_row[row - 1], 0)
    column = jnp.argmax(jnp.cumsum(region[row], dtype=jnp.int32) > n)
    return column, row
