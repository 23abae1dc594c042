"""The one geometric transform: it moves pixels, masks, boxes and exemplars alike.

Crop box -> resize (squashed, antialiased) -> mirror and turn -> place on a canvas. `square` is the
published inference transform; `draw_transform` the random one of training (random edge in steps of
32, padded with black at a random place).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sam3jax.config import DataConfig

_STEP = 32  # of random edges, as published


@dataclass(frozen=True, slots=True)
class Transform:
    """Where each point of a picture goes.

    crop: left, top, width, height of the part kept, in pixels of the picture. size: width, height
    it is resized to. flip: mirrored left to right, then `turn` quarter turns counter-clockwise.
    place: left, top on the canvas; canvas: width, height.
    """

    crop: tuple[float, float, float, float]
    size: tuple[int, int]
    flip: bool
    turn: int
    place: tuple[int, int]
    canvas: tuple[int, int]


def square(width: int, height: int, size: int) -> Transform:
    """The whole picture squashed to `size` x `size`."""
    return Transform((0, 0, width, height), (size, size), False, 0, (0, 0), (size, size))


def draw_transform(
    rng: np.random.Generator, width: int, height: int, size: int, config: DataConfig
) -> Transform:
    """A random transform onto a `size` x `size` canvas, within what `config` allows.

    The number of draws does not depend on the settings: switching one on leaves the others' luck.
    """
    shares, corner = rng.uniform(config.crop, 1, 2), rng.random(2)
    coin, turn, which, place = rng.random(), int(rng.integers(4)), rng.random(), rng.random(2)
    extent = shares * (width, height)
    left, top = corner * ((width, height) - extent)
    edge = size
    if config.min_size is not None:
        first = -(-config.min_size // _STEP) * _STEP
        edges = range(first, size + 1, _STEP) or (size,)
        edge = edges[int(which * len(edges))]
    return Transform(
        crop=(float(left), float(top), float(extent[0]), float(extent[1])),
        size=(edge, edge),
        flip=bool(config.flip and coin < 0.5),
        turn=turn if config.turn else 0,
        place=(int(place[0] * (size - edge + 1)), int(place[1] * (size - edge + 1))),
        canvas=(size, size),
    )


def move_picture(
    transform: Transform,
    picture: np.ndarray | Image.Image,
    change: Callable[[Image.Image], Image.Image] | None = None,
) -> np.ndarray:
    """Pixels [Y, X, 3] uint8 onto the canvas, bilinear with antialiasing, black around.

    change: of the resized pixels; what is around them stays black.
    """
    left, top, width, height = transform.crop
    box = (left, top, left + width, top + height)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    resized = image.resize(transform.size, Image.Resampling.BILINEAR, box)
    resized = resized if change is None else change(resized)
    canvas = np.zeros((*transform.canvas[::-1], 3), np.uint8)
    return _put(transform, np.asarray(resized), canvas)


def move_mask(transform: Transform, mask: np.ndarray) -> np.ndarray:
    """Mask bool [Y, X] onto the canvas: pixels of which at least half is covered, antialiased.

    The torch trainer resizes 0/1 bytes with the same antialiased filter and rounds.
    """
    canvas = np.zeros(transform.canvas[::-1], bool)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return canvas
    # Only the instance's own surroundings are resized: a tenth of the time on small instances.
    left, top, width, height = transform.crop
    step_x, step_y = width / transform.size[0], height / transform.size[1]
    x0, x1 = _window(columns, left, step_x, transform.size[0])
    y0, y1 = _window(rows, top, step_y, transform.size[1])
    if x0 >= x1 or y0 >= y1:
        return canvas
    box = (left + x0 * step_x, top + y0 * step_y, left + x1 * step_x, top + y1 * step_y)
    box = (*np.maximum(box[:2], 0), *np.minimum(box[2:], mask.shape[::-1]))
    # Masks of COCO run down the columns. Pillow wants rows: only the instance is copied into them.
    pixels = np.zeros(mask.shape, np.uint8)
    inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    np.multiply(mask[inside], np.uint8(255), out=pixels[inside])
    part = Image.fromarray(pixels).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box)
    resized = np.zeros(transform.size[::-1], bool)
    resized[y0:y1, x0:x1] = np.asarray(part) >= 128
    return _put(transform, resized, canvas)


def move_boxes(transform: Transform, boxes: np.ndarray) -> np.ndarray:
    """Boxes [..., 4] left, top, width, height in pixels -> [..., 4] cxcywh in 0..1 of the canvas.

    What a crop cuts off is cut off; a box wholly outside the crop has no area.
    """
    boxes = np.asarray(boxes, np.float64)
    left, top, width, height = transform.crop
    corners = np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1)
    corners = (corners - [left, top, left, top]) * (np.array(transform.size) / (width, height))[
        [0, 1, 0, 1]
    ]
    (w, h) = transform.size
    x0, y0, x1, y1 = np.moveaxis(np.clip(corners, 0, [w, h, w, h]), -1, 0)
    if transform.flip:
        x0, x1 = w - x1, w - x0
    for _ in range(transform.turn):
        x0, y0, x1, y1, w, h = y0, w - x1, y1, w - x0, h, w
    x0, x1 = x0 + transform.place[0], x1 + transform.place[0]
    y0, y1 = y0 + transform.place[1], y1 + transform.place[1]
    moved = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)
    return (moved / np.array(transform.canvas)[[0, 1, 0, 1]]).astype(np.float32)


def move_points(transform: Transform, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [A, 2] x, y -> where they are on the canvas [A, 2], and which of them are in sight [A].

    Both in pixels whose first has its centre at 0.
    """
    left, top, width, height = transform.crop
    (w, h) = transform.size
    x, y = np.moveaxis((points + 0.5 - [left, top]) * (w / width, h / height), -1, 0)
    seen = (x >= 0) & (x <= w) & (y >= 0) & (y <= h)
    if transform.flip:
        x = w - x
    for _ in range(transform.turn):
        x, y, w, h = y, w - x, h, w
    return np.stack([x + transform.place[0], y + transform.place[1]], -1) - 0.5, seen


def box_of_mask(mask: np.ndarray) -> np.ndarray:
    """Box of the True pixels of [Y, X], cxcywh in 0..1, float32; zeros where there is none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return np.zeros(4, np.float32)
    x0, x1, y0, y1 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    height, width = mask.shape
    box = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
    return np.array(box, np.float32)


def pack_mask(mask: np.ndarray) -> np.ndarray:
    """[Y, X] bool -> [Y, ceil(X / 8)] uint8, as `Targets.masks`."""
    return np.packbits(mask, axis=-1)


def unpack_mask(packed: np.ndarray, width: int) -> np.ndarray:
    """[..., Y, ceil(X / 8)] uint8 -> [..., Y, X] bool."""
    return np.unpackbits(packed, axis=-1, count=width).astype(bool)


def _window(where: np.ndarray, start: float, step: float, size: int) -> tuple[int, int]:
    """Resized pixels that source pixels `where[0]..where[-1]` can reach, as a range."""
    margin = 2  # the filter's support, whichever of the two grids is the coarser
    first = int(np.floor((where[0] - start - 1) / step)) - margin
    last = int(np.ceil((where[-1] + 2 - start) / step)) + margin
    return max(first, 0), min(last, size)


def _put(transform: Transform, resized: np.ndarray, canvas: np.ndarray) -> np.ndarray:
    if transform.flip:
        resized = resized[:, ::-1]
    resized = np.rot90(resized, transform.turn)
    left, top = transform.place
    height, width = resized.shape[:2]
    canvas[top : top + height, left : left + width] = resized
    return canvas
