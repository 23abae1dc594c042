"""COCO segmentations: polygons, uncompressed and compressed RLE; only what pycocotools can decode.

pycocotools raises TypeError on a polygon of two points, returns uninitialised memory for run lengths
that do not fill the picture, and ends the process on points far outside: all of it is sorted out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as rle_codec

from sam3jax.data.ledger import Ledger, Where
from sam3jax.data.mask_forms import UNREADABLE, normal_form, parse_text
from sam3jax.data.numbers import whole

Polygons = tuple[np.ndarray, ...]  # each [2 n] float64: x y x y ..., pixels
Rle = Mapping[str, Any]  # {"size": [height, width], "counts": bytes}, compressed
Extent = tuple[float, float, float, float]  # left, top, right, bottom, pixels

_NOT_RLE = frozenset("\"', ")  # are in no compressed RLE, whose characters are 0 to o
_SHORT = 64  # numbers of a polygon
_DIGITS = 7  # characters of a run length: 35 bits, more than pycocotools' 32


def decode_segmentation(segmentation: Polygons | Rle | None, height: int, width: int) -> np.ndarray:
    """The pixels inside, bool [Y, X], by pycocotools' rules; all False for None."""
    if segmentation is None:
        return np.zeros((height, width), bool)
    if not isinstance(segmentation, Mapping):
        segmentation = _drawn(segmentation, height, width)
    return rle_codec.decode(segmentation).astype(bool)


def read_segmentation(
    value: Any, width: int, height: int, ledger: Ledger, where: Where = ("", None)
) -> tuple[Polygons | Rle | None, Extent | None, bool]:
    """A segmentation that pycocotools can decode, or None; its extent, or None; was one stated?

    value: the JSON's `segmentation`. The extent is as stated, also beyond the picture's edge. What is
    repaired or left out is counted in the ledger; where: the file and the id that it names.
    """
    parts, other_form = normal_form(value)
    if parts is None:
        return None, None, False
    if parts is UNREADABLE:
        ledger.add("mask left out: neither polygons nor RLE", *where, value)
        return None, None, True
    if isinstance(parts[0], dict):
        found = _rles(parts, width, height, ledger, where)
    else:
        found = _polygons(parts, width, height, ledger, where)
    if found is None:
        return None, None, any(parts)
    if other_form:
        ledger.add("mask written in another form than COCO's (read)", *where)
    return found[0], found[1], True


def segmentation_area(
    segmentation: Polygons | Rle | None, height: int, width: int, cut: bool = False
) -> float:
    """Pixels inside, parts of polygons summed; 0 for None. cut: only those inside the picture."""
    if segmentation is None:
        return 0.0
    if isinstance(segmentation, Mapping):
        return float(rle_codec.area(segmentation))
    if cut:
        return float(rle_codec.area(_drawn(segmentation, height, width)))
    return sum(_shoelace(polygon) for polygon in segmentation)


def _drawn(polygons: Polygons, height: int, width: int) -> Rle:
    return rle_codec.merge(rle_codec.frPyObjects([p.tolist() for p in polygons], height, width))


def _polygons(
    parts: list, width: int, height: int, ledger: Ledger, where: Where
) -> tuple[Polygons, Extent] | None:
    found = [p for part in parts if (p := _polygon(part, width, height, ledger, where)) is not None]
    if not found:
        if any(parts):
            ledger.add("mask left out: no polygon with three points", *where)
        return None
    lefts, tops, rights, bottoms = zip(*(extent for _, extent in found))
    left, top, right, bottom = min(lefts), min(tops), max(rights), max(bottoms)
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        ledger.add("mask left out: outside the picture", *where)
        return None
    return tuple(polygon for polygon, _ in found), (left, top, right, bottom)


def _polygon(
    part: Any, width: int, height: int, ledger: Ledger, where: Where
) -> tuple[np.ndarray, Extent] | None:
    try:
        polygon = np.array(part, np.float64)
    except (TypeError, ValueError, OverflowError):
        polygon = np.zeros(0)
    # pycocotools takes four numbers for a box and raises TypeError.
    usable = polygon.ndim == 1 and polygon.size >= 6 and polygon.size % 2 == 0
    extent = _extent(polygon) if usable else (np.nan, np.nan, np.nan, np.nan)
    far = 4 * max(width, height)
    # pycocotools allocates by the length of the outline: points at 1e9 end the process.
    if (min(extent) < -far or max(extent) > far) and np.isfinite(polygon).all():
        ledger.add("polygon point far outside the picture (moved to its edge)", *where)
        polygon = np.clip(polygon.reshape(-1, 2), 0, [width, height]).ravel()
        extent = _extent(polygon)
    if not -np.inf < sum(extent) < np.inf:
        ledger.add("polygon left out: fewer than three points, or not numbers", *where, part)
        return None
    if extent[0] == extent[2] or extent[1] == extent[3] or _is_line(polygon):
        ledger.add("polygon left out: a line, without an area", *where, part)
        return None
    return polygon, extent


def _is_line(polygon: np.ndarray) -> bool:
    """Whether three or four points lie on one line; of more points, nobody draws that by mistake."""
    if polygon.size > 8:
        return False
    x, y, *rest = polygon.tolist()
    (a, b), *others = [(u - x, v - y) for u, v in zip(rest[0::2], rest[1::2], strict=True)]
    if not a and not b:
        return len(others) < 2 or others[0][0] * others[1][1] == others[0][1] * others[1][0]
    return all(a * v == b * u for u, v in others)


def _extent(polygon: np.ndarray) -> Extent:
    """Left, top, right, bottom; NaN where a coordinate is."""
    if polygon.size <= _SHORT:  # numpy needs longer to start than Python for the whole of it
        values = polygon.tolist()
        if not math.isfinite(sum(values)):
            return math.nan, math.nan, math.nan, math.nan
        x, y = values[0::2], values[1::2]
        return min(x), min(y), max(x), max(y)
    points = polygon.reshape(-1, 2)
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    return left, top, right, bottom


def _shoelace(polygon: np.ndarray) -> float:
    x, y = polygon[0::2], polygon[1::2]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _rles(
    parts: list, width: int, height: int, ledger: Ledger, where: Where
) -> tuple[Rle, Extent] | None:
    """One RLE of all parts together."""
    found = [rle for part in parts if (rle := _rle(part, width, height, ledger, where)) is not None]
    if not found:
        return None
    rle = found[0] if len(found) == 1 else rle_codec.merge(found)
    x, y, w, h = rle_codec.toBbox(rle).tolist()
    return rle, (x, y, x + w, y + h)


def _rle(value: dict, width: int, height: int, ledger: Ledger, where: Where) -> Rle | None:
    rows, columns = _size(value.get("size", (height, width)))
    counts = value.get("counts")
    if isinstance(counts, str) and set(counts) & _NOT_RLE:
        counts = parse_text(counts)  # the repr of bytes, or a list as text
    runs = _runs(counts)
    if runs is None or rows is None or columns is None:
        ledger.add("mask left out: RLE cannot be read", *where, value)
        return None
    # pycocotools fills what the runs do not cover with uninitialised memory.
    if runs.min(initial=0) < 0 or runs.sum() != rows * columns:
        ledger.add("mask left out: RLE does not fill its size", *where)
        return None
    if (rows, columns) != (height, width):
        exchanged = ", width and height exchanged" if (columns, rows) == (height, width) else ""
        ledger.add(
            f"mask left out: RLE has another size than its picture{exchanged}",
            *where,
            [rows, columns],
        )
        return None
    if not runs[1::2].any():
        ledger.add("mask left out: RLE without a pixel", *where)
        return None
    if (runs[1:] == 0).any():  # pycocotools would count them into the mask's box
        runs = _without_empty_runs(runs)
    elif isinstance(counts, str | bytes):
        text = counts.encode("ascii") if isinstance(counts, str) else counts
        return {"size": [height, width], "counts": text}
    return rle_codec.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)


def _size(value: Any) -> tuple[int | None, int | None]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None, None
    return whole(value[0]), whole(value[1])


def _runs(counts: Any) -> np.ndarray | None:
    """Run lengths [n] int64 of a list or of compressed text; None where they cannot be read."""
    if isinstance(counts, list):
        try:
            runs = np.array(counts)
        except (ValueError, OverflowError):
            return None
        if runs.ndim != 1 or runs.dtype.kind not in "iuf" or not runs.size:
            return None
        if not np.isfinite(runs).all() or (np.abs(runs) > 2**31).any():
            return None
        return runs.astype(np.int64) if (runs == np.floor(runs)).all() else None
    if isinstance(counts, str):
        if not counts.isascii():
            return None
        counts = counts.encode("ascii")
    return _run_lengths(counts) if isinstance(counts, bytes) and counts else None


def _run_lengths(counts: bytes) -> np.ndarray | None:
    """Runs of a compressed RLE: 5 bits a character, from 48; differences to the run before last.

    The format of pycocotools' maskApi.c (rleFrString). None where it is not that.
    """
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    if codes.min() < 0 or codes.max() > 63 or not ends.size or ends[-1] != codes.size - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > _DIGITS:
        return None
    runs = np.zeros(ends.size, np.int64)
    for k in range(int(digits.max())):
        has = digits > k
        runs[has] |= (codes[starts[has] + k] & 31) << (5 * k)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * digits), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _without_empty_runs(runs: np.ndarray) -> np.ndarray:
    """The same mask with no run of length 0 but the first."""
    values = np.arange(runs.size) % 2
    values, runs = values[runs > 0], runs[runs > 0]
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    merged = np.add.reduceat(runs, starts)
    return merged if values[0] == 0 else np.concatenate([[0], merged])
