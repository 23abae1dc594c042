"""COCO segmentations: polygons, uncompressed and compressed RLE; only what pycocotools can decode.

pycocotools raises TypeError on a polygon of two points, returns uninitialised memory for run lengths
that do not fill the picture, and ends the process on points far outside: all of it is sorted out here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as rle_codec

Polygons = tuple[np.ndarray, ...]  # each [2 n] float64: x y x y ..., pixels
Rle = Mapping[str, Any]  # {"size": [height, width], "counts": bytes}, compressed
Extent = tuple[float, float, float, float]  # left, top, right, bottom, pixels


def decode_segmentation(segmentation: Polygons | Rle | None, height: int, width: int) -> np.ndarray:
    """The pixels inside, bool [Y, X], by pycocotools' rules; all False for None."""
    if segmentation is None:
        return np.zeros((height, width), bool)
    if not isinstance(segmentation, Mapping):
        parts = rle_codec.frPyObjects([p.tolist() for p in segmentation], height, width)
        segmentation = rle_codec.merge(parts)
    return rle_codec.decode(segmentation).astype(bool)


def read_segmentation(
    value: Any, width: int, height: int, problems: Counter[str]
) -> tuple[Polygons | Rle | None, Extent | None]:
    """A segmentation that pycocotools can decode, or None; and its extent, or None.

    value: the JSON's `segmentation`. What is left out is counted in `problems`.
    """
    if not value:
        return None, None
    if isinstance(value, dict):
        return _rle(value, width, height, problems)
    if not isinstance(value, list):
        problems["mask left out: neither polygons nor RLE"] += 1
        return None, None
    parts = [value] if not isinstance(value[0], list | tuple) else value  # one bare polygon
    polygons = tuple(
        p for part in parts if (p := _polygon(part, width, height, problems)) is not None
    )
    if not polygons:
        problems["mask left out: no polygon with three points"] += 1
        return None, None
    points = polygons[0] if len(polygons) == 1 else np.concatenate(polygons)
    x, y = points[0::2], points[1::2]
    left, top, right, bottom = x.min(), y.min(), x.max(), y.max()
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        problems["mask left out: outside the picture"] += 1
        return None, None
    extent = (max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height))
    return polygons, tuple(map(float, extent))


def segmentation_area(segmentation: Polygons | Rle | None) -> float:
    """Pixels inside, parts of polygons summed; 0 for None."""
    if segmentation is None:
        return 0.0
    if isinstance(segmentation, Mapping):
        return float(rle_codec.area(segmentation))
    return sum(_shoelace(polygon) for polygon in segmentation)


def _polygon(part: Any, width: int, height: int, problems: Counter[str]) -> np.ndarray | None:
    try:
        polygon = np.asarray(part, np.float64)
    except (TypeError, ValueError):
        polygon = np.zeros(0)
    # pycocotools takes four numbers for a box and raises TypeError.
    if polygon.ndim != 1 or polygon.size < 6 or polygon.size % 2 or not np.isfinite(polygon).all():
        problems["polygon left out: fewer than three points, or not numbers"] += 1
        return None
    # pycocotools allocates by the length of the outline: points at 1e9 end the process.
    if np.abs(polygon).max() > 4 * max(width, height):
        problems["polygon point far outside the picture (moved to its edge)"] += 1
        limits = np.tile([width, height], polygon.size // 2)
        polygon = np.clip(polygon, 0, limits)
    return polygon


def _shoelace(polygon: np.ndarray) -> float:
    x, y = polygon[0::2], polygon[1::2]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _rle(
    value: dict, width: int, height: int, problems: Counter[str]
) -> tuple[Rle | None, Extent | None]:
    none = (None, None)
    try:
        rows, columns = (int(v) for v in value["size"])
        counts = value["counts"]
        if isinstance(counts, list):
            runs = [int(c) for c in counts]
        else:
            runs = _run_lengths(counts if isinstance(counts, bytes) else counts.encode("ascii"))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        problems["mask left out: RLE cannot be read"] += 1
        return none
    # pycocotools fills what the runs do not cover with uninitialised memory.
    if min(runs, default=0) < 0 or sum(runs) != rows * columns:
        problems["mask left out: RLE does not fill its size"] += 1
        return none
    if (rows, columns) != (height, width):
        problems["mask left out: RLE has another size than its picture"] += 1
        return none
    if isinstance(counts, list):
        rle = rle_codec.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    else:
        rle = {
            "size": [height, width],
            "counts": counts if isinstance(counts, bytes) else counts.encode("ascii"),
        }
    x, y, w, h = rle_codec.toBbox(rle).tolist()
    if not w or not h:
        problems["mask left out: RLE without a pixel"] += 1
        return none
    return rle, (x, y, x + w, y + h)


def _run_lengths(counts: bytes) -> list[int]:
    """Runs of a compressed RLE: 5 bits a character, from 48; differences to the run before last.

    The format of pycocotools' maskApi.c (rleFrString).
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = character - 48
        if not 0 <= code < 64:
            raise ValueError("not an RLE character")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("RLE ends within a number")
    return runs
