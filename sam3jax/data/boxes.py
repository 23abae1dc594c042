"""Boxes of annotations, left, top, width, height in pixels: read one by one, then judged as a whole.

One odd box is repaired or left out. Where nearly all boxes of a file are odd in the same way, they
were exported in another convention (corners, centres, shares of the picture): that is one mistake,
and an error.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.mask_forms import parse_text
from sam3jax.data.numbers import number

Box = tuple[float, float, float, float]  # left, top, width, height, pixels
Edges = tuple[float, float, float, float]  # left, top, right, bottom, pixels

_NEARLY_ALL = 0.95
_OVER = 0.1  # share of boxes over the picture's edge from which another convention is looked for
_MISFIT = 0.3  # share of boxes that miss their masks from which another convention is looked for
_MANY = 20  # boxes from which it is no chance that all lie in the same corner
_IN_PIXELS = 4  # readings, the first ones, that need no mask to be told apart
_NONE = (float("nan"),) * 4
_SIZES = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"))  # fmt: skip
_COCO = "left, top, width, height in pixels"


def parse_box(value: Any) -> Box | None:
    """Four finite numbers, whatever they mean; None where there are none.

    Also as text, in a list of their own, or under names that leave no doubt.
    """
    if isinstance(value, str):
        value = parse_text(value)
    if isinstance(value, dict):
        return _named(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    x, y, w, h = number(value[0]), number(value[1]), number(value[2]), number(value[3])
    if x is None or y is None or w is None or h is None:
        return None
    return x, y, w, h


def _named(value: dict) -> Box | None:
    for names in _SIZES:
        if set(names) <= value.keys():
            return parse_box([value[name] for name in names])
    for names in _CORNERS:
        if set(names) <= value.keys():
            edges = parse_box([value[name] for name in names])
            return edges and (edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1])
    return None


def place_box(
    stated: Box | None, extent: Edges | None, width: int, height: int, ledger: Ledger, where: tuple
) -> tuple[Box | None, bool]:
    """The box inside the picture, and whether something was cut off; None where there is none.

    extent: of the mask, as stated, not cut. where: file, id and value for the ledger.
    """
    if stated is not None and stated[2] > 0 and stated[3] > 0:
        x, y, w, h = stated
        edges = (x, y, x + w, y + h)
        if extent is not None and not _fits(edges, extent, width, height):
            ledger.add("box does not fit its own mask (kept)", *where)
        if w < 1 or h < 1:
            ledger.add("box thinner than a pixel (kept)", *where)
    elif extent is not None and extent[2] > extent[0] and extent[3] > extent[1]:
        ledger.add("box missing or without area: taken from the mask", *where)
        edges = extent
    else:
        ledger.add("annotation left out: no box with an area", *where)
        return None, False
    if edges[0] >= 0 and edges[1] >= 0 and edges[2] <= width and edges[3] <= height:
        return (edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1]), False
    left, right = (min(max(v, 0.0), float(width)) for v in (edges[0], edges[2]))
    top, bottom = (min(max(v, 0.0), float(height)) for v in (edges[1], edges[3]))
    if right <= left or bottom <= top:
        ledger.add("annotation left out: box outside the picture", *where)
        return None, False
    outside = max(left - edges[0], top - edges[1], edges[2] - right, edges[3] - bottom)
    if outside > 1:
        ledger.add("box reached over the picture's edge (cut)", *where)
    return (left, top, right - left, bottom - top), outside > 1


def reaches_over(edges: Edges, width: int, height: int) -> bool:
    """Whether edges lie outside the picture by more than a pixel."""
    return edges[0] < -1 or edges[1] < -1 or edges[2] > width + 1 or edges[3] > height + 1


def _fits(box: Edges, extent: Edges, width: int, height: int) -> bool:
    """Whether the two agree inside the picture: one of them may have been cut at its edge already."""
    slack = 3 + 0.05 * max(extent[2] - extent[0], extent[3] - extent[1])
    (a, b, c, d), (p, q, r, s) = box, extent
    near = -slack <= a - p <= slack and -slack <= b - q <= slack
    if near and -slack <= c - r <= slack and -slack <= d - s <= slack:
        return True  # nearly always; cutting both brings them closer
    for a, b, most in zip(box, extent, (width, height, width, height)):
        if abs(min(max(a, 0), most) - min(max(b, 0), most)) > slack:
            return False
    return True


def convention(
    boxes: Sequence[Box], sizes: Sequence[tuple[int, int]], source: str
) -> tuple[str, list[Box]] | None:
    """(name, boxes as COCO has them) where boxes are clearly corners; None where they are COCO's already.

    sizes: width and height of each box's picture. Raises DataError where they are something else.
    """
    if not boxes:
        return None
    rows, pixels = np.array(boxes, np.float64), np.array(sizes, np.float64)
    BoxJudge._check_shares("boxes", rows, pixels, source)
    over = ~_inside(_corners(rows), pixels) & (rows[:, 2:] > 0).all(1)
    if over.mean() < _OVER:
        return None
    fits = [n for n, edges in _readings(rows, pixels).items() if _inside(edges, pixels).all()]
    name = "corners (left, top, right, bottom)"
    if name in fits and "centre x, centre y, width, height" not in fits:
        edges = np.concatenate([rows[:, :2], rows[:, 2:] - rows[:, :2]], 1)
        return name, [tuple(box) for box in edges.tolist()]
    BoxJudge._check_edges(rows, pixels, source)
    return None


class BoxJudge:
    """Gathers stated boxes, and tells whether all of them speak another convention than COCO's."""

    def __init__(self) -> None:
        self._rows = array("d")

    def add(self, box: Box | None, extent: Edges | None, width: int, height: int) -> None:
        """A box and the extent of its mask, both as stated; None where there is none."""
        self._rows.extend((*(box or _NONE), *(extent or _NONE), width, height))

    def check(self, source: str, ledger: Ledger) -> None:
        """Raise DataError where nearly all boxes mean something else; what may be so is counted."""
        rows = np.frombuffer(self._rows, np.float64).reshape(-1, 10)
        if not len(rows):
            return
        boxes, extents, sizes = rows[:, :4], rows[:, 4:8], rows[:, 8:]
        boxed, masked = ~np.isnan(boxes[:, 0]), ~np.isnan(extents[:, 0])
        self._check_shares("boxes", boxes[boxed], sizes[boxed], source)
        self._check_shares("masks", extents[masked], sizes[masked], source)
        both = boxed & masked
        self._check_masks(boxes[both], extents[both], sizes[both], source)
        self._check_edges(boxes[boxed], sizes[boxed], source)
        if _may_be_percent(_corners(boxes[boxed]), sizes[boxed]):
            ledger.add("box in the first 100 x 100 pixels, as all are: percent of the picture?", count=int(boxed.sum()))  # fmt: skip

    @staticmethod
    def _check_shares(what: str, values: np.ndarray, sizes: np.ndarray, source: str) -> None:
        small = np.asarray((values >= 0).all(1) & (values <= 1).all(1) & (sizes > 2).all(1))
        if len(small) and small.mean() >= _NEARLY_ALL:
            raise DataError(
                f"{source}: {_share(small)} {what} lie within 0..1: they are shares of the picture, as "
                f"in YOLO, expected {_COCO}; multiply boxes and polygons by the width and height of "
                f"their picture, or export COCO again"
            )

    @staticmethod
    def _check_masks(
        boxes: np.ndarray, extents: np.ndarray, sizes: np.ndarray, source: str
    ) -> None:
        extents = _cut(extents, sizes)
        solid = (extents[:, 2:] > extents[:, :2]).all(1)
        boxes, extents, sizes = boxes[solid], extents[solid], sizes[solid]
        if not len(boxes):
            return
        misfit = _iou(_cut(_corners(boxes), sizes), extents) < 0.5
        if misfit.mean() < _MISFIT:
            return
        for name, edges in _readings(boxes, sizes).items():
            # Not by being cut: what is larger than its picture would fit every mask that fills it.
            fits = _inside(edges, sizes) & (_iou(_cut(edges, sizes), extents) > 0.7)
            if fits.mean() >= _NEARLY_ALL:
                raise DataError(
                    f"{source}: {_share(misfit)} boxes do not fit their own masks, and fit them when "
                    f"read as {name}: expected {_COCO}; convert them, or take `bbox` out and boxes "
                    f"are taken from the masks"
                )
        if len(boxes) > 1 and misfit.mean() >= _NEARLY_ALL:
            raise DataError(
                f"{source}: {_share(misfit)} boxes do not fit their own masks: one of the two belongs "
                f"to another picture size or another object; export again, or take `bbox` out and "
                f"boxes are taken from the masks"
            )

    @staticmethod
    def _check_edges(boxes: np.ndarray, sizes: np.ndarray, source: str) -> None:
        if not len(boxes):
            return
        over = ~_inside(_corners(boxes), sizes) & (boxes[:, 2:] > 0).all(1)
        if over.sum() < 2 or over.mean() < _OVER:
            return
        readings = list(_readings(boxes, sizes).items())[:_IN_PIXELS]
        for name, edges in readings:
            if _inside(edges, sizes).mean() >= 0.99:
                raise DataError(
                    f"{source}: {_share(over)} boxes reach over the edge of their picture, and all lie "
                    f"inside when read as {name}: expected {_COCO}; convert them, or export COCO again"
                )


def _readings(boxes: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """What four numbers can mean elsewhere -> edges in pixels; the most usual first."""
    a, b, c, d = boxes.T
    width, height = sizes.T
    shares = boxes * np.concatenate([sizes, sizes], 1)
    stack = lambda *columns: np.stack(columns, 1)
    centred = lambda x, y, w, h: stack(x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    return {
        "corners (left, top, right, bottom)": boxes,
        "centre x, centre y, width, height": centred(a, b, c, d),
        "top, left, bottom, right": stack(b, a, d, c),
        "top, left, height, width": stack(b, a, b + d, a + c),
        "shares of the picture (left, top, width, height)": _corners(shares),
        "shares of the picture (centre, width, height; YOLO)": centred(*shares.T),
        "shares of the picture (corners)": shares,
        "percent of the picture (left, top, width, height)": _corners(shares / 100),
        "thousandths of the picture (top, left, bottom, right)": stack(
            b * width, a * height, d * width, c * height
        )
        / 1000,
    }


def _may_be_percent(edges: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether many boxes of large pictures fill 0 to 100 and nothing else."""
    if len(edges) < _MANY or sizes.min() < 200:
        return False
    reach = edges[:, 2:].max(0)
    return bool((reach <= 100.5).all() and (reach > 80).all())


def _corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _cut(edges: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Edges at most at those of the picture."""
    return np.clip(edges, 0, np.concatenate([sizes, sizes], 1))


def _inside(edges: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which edges are those of a box with an area inside its picture, to 2 % of its size."""
    slack = 1 + 0.02 * np.concatenate([sizes, sizes], 1)
    low = (edges >= -slack).all(1) & (edges[:, 2:] > edges[:, :2]).all(1)
    return np.asarray(low & (edges[:, 2:] <= sizes + slack[:, 2:]).all(1))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    overlap = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
    both = overlap.prod(1)
    areas = np.clip(a[:, 2:] - a[:, :2], 0, None).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    return both / np.maximum(areas - both, 1e-9)


def _share(which: np.ndarray) -> str:
    return f"{int(which.sum()):,} of {len(which):,}"
