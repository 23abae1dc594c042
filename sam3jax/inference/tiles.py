"""Pictures far larger than the model's square: cut into tiles that overlap, and what is found put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from sam3jax.inference.full_size import Detections, rle_of_changes

OVERLAP = 0.25  # of a tile's edge: what is smaller than that lies whole in some tile
_SAME = 0.5  # mask IoU above which two finds are one
_INSIDE = 0.7  # share of a find that a tile's edge cut, above which it is a part of another


class Tile(NamedTuple):
    """A part of a picture, in its pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """left, top, right, bottom."""
        return self.left, self.top, self.left + self.width, self.top + self.height


def tiles_of(width: int, height: int, edge: int) -> list[Tile]:
    """The picture in tiles of `edge` pixels, row by row; neighbours share OVERLAP of an edge or more."""
    across, down = _starts(width, edge), _starts(height, edge)
    return [Tile(x, y, min(edge, width), min(edge, height)) for y in down for x in across]


def _starts(length: int, edge: int) -> list[int]:
    if length <= edge:
        return [0]
    number = 1 + int(np.ceil((length - edge) / (edge * (1 - OVERLAP))))
    return [round(k * (length - edge) / (number - 1)) for k in range(number)]


def put_back(found: Detections, tile: Tile, width: int, height: int) -> Detections:
    """What was found in a tile, in the pixels of its picture of (height, width)."""
    boxes = found.boxes_xyxy + np.array([tile.left, tile.top] * 2, found.boxes_xyxy.dtype)
    masks = [_moved(rle, tile, width, height) for rle in found.masks]
    return Detections(found.scores, boxes, masks, height, width)


def _moved(rle: dict[str, Any], tile: Tile, width: int, height: int) -> dict[str, Any]:
    bits = coco_mask.decode(rle).T.astype(np.int8)  # [X, Y]
    edges = np.diff(bits, axis=1, prepend=0, append=0)
    x, y = np.nonzero(edges)  # column by column: begin, end, begin, end, ...
    places = (tile.left + x) * height + tile.top + y
    # Where a run ends at the bottom and the next begins at the top of the next column, it goes on.
    goes_on = np.flatnonzero(places[1:] == places[:-1])
    places = np.delete(places, np.concatenate([goes_on, goes_on + 1]))
    return rle_of_changes(places, height, width)


def merged(parts: Sequence[tuple[Detections, Tile]], width: int, height: int) -> Detections:
    """One list, strongest first, of what tiles of a picture found, in its pixels.

    Of two finds whose masks overlap by more than half (IoU) the stronger stays. Finds that the edge of a
    tile cuts come last: one that lies within another is a part of it.
    """
    every = [
        (_is_cut(box, tile, width, height), float(score), box, rle)
        for found, tile in parts
        for score, box, rle in zip(found.scores, found.boxes_xyxy, found.masks, strict=True)
    ]
    every.sort(key=lambda find: (find[0], -find[1]))
    kept: list[tuple[bool, float, np.ndarray, dict[str, Any]]] = []
    for find in every:
        cut, _, box, rle = find
        near = [other[3] for other in kept if _touch(box, other[2])]
        if near:
            same = coco_mask.iou([rle], near, [0] * len(near)).max()
            inside = coco_mask.iou([rle], near, [1] * len(near)).max() if cut else 0.0
            if same > _SAME or inside > _INSIDE:
                continue
        kept.append(find)
    kept = sorted(kept, key=lambda find: -find[1])
    scores = np.array([find[1] for find in kept], np.float32)
    boxes = np.array([find[2] for find in kept], np.float32).reshape(-1, 4)
    return Detections(scores, boxes, [find[3] for find in kept], height, width)


def _is_cut(box: np.ndarray, tile: Tile, width: int, height: int) -> bool:
    """Whether a box reaches an edge of its tile that is none of the picture's."""
    left, top, right, bottom = box
    margin = 0.01 * max(tile.width, tile.height)
    return bool(
        (tile.left > 0 and left < tile.left + margin)
        or (tile.top > 0 and top < tile.top + margin)
        or (tile.left + tile.width < width and right > tile.left + tile.width - margin)
        or (tile.top + tile.height < height and bottom > tile.top + tile.height - margin)
    )


def _touch(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a[:2] < b[2:]).all() and (b[:2] < a[2:]).all())
