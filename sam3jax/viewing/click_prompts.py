"""Clicks, boxes and masks of people -> what the interactive heads read; each mistake by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sam3jax.clicks import ABSENT, BOX_END, BOX_START, INSIDE, OUTSIDE
from sam3jax.inference.clicking import Prompted
from sam3jax.model.prompt_encoder import PADDING
from sam3jax.viewing.asking import PromptError, box_in_picture, box_list, numbers, shown


def prompted(
    points: Any,
    labels: Any,
    boxes: Any,
    mask: Any,
    *,
    width: int,
    height: int,
    size: int,
    grid: int,
) -> Prompted:
    """Prompts of B objects on a picture of width x height, for a model of `size` pixels and `grid`.

    points: [A, 2] of one object, or one such list for each; labels likewise, default all inside.
    boxes: left, top, width, height of one object or of each. mask: logits [4g, 4g] of one or each.
    Raises PromptError.
    """
    points, labels = _points(points, labels, width, height)
    boxes = _boxes(boxes, width, height)
    masks = _masks(mask, 4 * grid)
    counts = {len(x) for x in (points, boxes, masks) if x is not None}
    if not counts:
        raise PromptError("nothing is asked: give points, boxes or a mask")
    if len(counts) > 1:
        given = (("object(s) with points", points), ("box(es)", boxes), ("mask(s)", masks))
        told = [f"{len(x)} {name}" for name, x in given if x is not None]
        raise PromptError(f"{' and '.join(told)}: give as many of each, one for each object")
    (rows,) = counts
    clicks = [np.zeros((0, 2))] * rows if points is None else points
    kinds = [np.zeros(0, int)] * rows if points is None else labels
    most = max(len(c) for c in clicks) + (0 if boxes is None else 2)
    room = 1 + (max(4, 1 << (most - 1).bit_length()) if most else 0)
    at, label = np.zeros((rows, room, 2), np.float32), np.full((rows, room), ABSENT, np.int32)
    for row, (click, kind) in enumerate(zip(clicks, kinds, strict=True)):
        if boxes is not None:
            click = np.concatenate([boxes[row].reshape(2, 2), click])
            kind = np.concatenate([[BOX_START, BOX_END], kind])
        at[row, : len(click)] = click * (size / np.array([width, height]))
        label[row, : len(kind)] = kind
        if len(kind):  # as published: a mask alone is shown without any token
            label[row, -1] = PADDING
    edge = 4 * grid
    shown = np.zeros((rows, edge, edge), np.float32) if masks is None else masks
    return Prompted(at, label, shown, np.full(rows, masks is not None))


def _points(
    points: Any, labels: Any, width: int, height: int
) -> tuple[list[np.ndarray] | None, list[np.ndarray]]:
    if points is None:
        if labels is not None:
            raise PromptError("labels without points: give a point for each label")
        return None, []
    rows, is_single = _objects(points)
    if not rows or not all(row.size for row in rows):
        raise PromptError("an object has no point: give each at least one, as x, y in pixels")
    if labels is None:
        kinds: list[Any] = [np.full(row.shape[:1], INSIDE) for row in rows]
    else:
        kinds = [labels] if is_single else _each(labels)
    if len(kinds) != len(rows):
        raise PromptError(
            f"{len(rows)} objects with points but labels of {len(kinds)}: give a list of labels for each object"
        )
    found = [_clicks(row, kind, width, height) for row, kind in zip(rows, kinds, strict=True)]
    every = np.concatenate([click for click, _ in found])
    if every.max() <= 1 and (every % 1).any() and min(width, height) > 2:
        raise PromptError(
            f"points {every[:2].tolist()} look like shares of the picture: they are pixels, x to the "
            f"right up to {width - 1} and y down to {height - 1}"
        )
    return [click for click, _ in found], [kind for _, kind in found]


_FORM = "[[x, y], ...] of one object, or a list of such for each of several"


def _objects(points: Any) -> tuple[list[np.ndarray], bool]:
    """Points of each object, and whether one object was given without a list around it."""
    if isinstance(points, Iterator):
        points = list(points)
    at = numbers(points)
    if at is None:  # lists of unequal lengths, or no numbers
        rows = [numbers(row) for row in _each(points)]
        if any(row is None for row in rows):
            raise PromptError(f"points are {_FORM}, numbers in pixels; found {shown(points)}")
        return [row for row in rows if row is not None], False
    if at.shape == (2,):
        return [at[None]], True
    return ([at], True) if at.ndim < 3 else (list(at), False)


def _each(values: Any) -> list[Any]:
    """The parts of a list or an array; of anything else, nothing is known."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        return [values]
    return list(values)


def _clicks(at: np.ndarray, labels: Any, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    kind = numbers(labels, bools=True)
    if kind is None:
        raise PromptError(f"labels are 1 inside the object, 0 outside; found {shown(labels)}")
    if at.ndim != 2 or at.shape[1] != 2:
        raise PromptError(f"points have the shape {list(at.shape)}: expected {_FORM}")
    if kind.ndim == 0 and len(at) == 1:
        kind = kind[None]
    if kind.ndim != 1:
        raise PromptError(
            f"labels have the shape {list(kind.shape)}: expected a label for each point, in lists as the points"
        )
    if kind.shape != at.shape[:1]:
        raise PromptError(f"{len(at)} points but {kind.size} labels: give one for each point")
    if not np.isfinite(at).all():
        raise PromptError(f"point {at[~np.isfinite(at).all(1)][0].tolist()} is no place")
    if not np.isin(kind, (INSIDE, OUTSIDE)).all():
        wrong = kind[~np.isin(kind, (INSIDE, OUTSIDE))][0]
        raise PromptError(
            f"label {wrong:g}: 1 is inside the object, 0 outside; boxes have an argument of their own"
        )
    outside = (at < -0.5).any(1) | (at > np.array([width, height]) - 0.5).any(1)
    if outside.any():
        x, y = at[outside][0].tolist()
        raise PromptError(
            f"point {x:g}, {y:g} lies outside the picture, which is {width} x {height} pixels"
        )
    return at, kind.astype(int)


def _boxes(boxes: Any, width: int, height: int) -> np.ndarray | None:
    """[B, 4] left, top, right, bottom in pixels."""
    corners = []
    for box in box_list(boxes):
        x, y, w, h = box_in_picture(box, width, height)
        corners.append([(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height])  # fmt: skip
    return np.array(corners) if corners else None


def _masks(mask: Any, edge: int) -> np.ndarray | None:
    if mask is None:
        return None
    masks, wanted = numbers(mask, bools=True), f"{edge} x {edge} of this model, one for each object"
    if masks is None:
        raise PromptError(
            f"the mask holds no numbers: expected the logits of an earlier answer, {wanted}"
        )
    if not np.issubdtype(_type(mask), np.floating):
        raise PromptError(
            f"the mask is of {_type(mask)}, yes and no: expected the logits of an earlier answer, "
            "numbers below and above 0"
        )
    if masks.ndim == 4 and masks.shape[1] == 1:  # as they are answered without multimask
        masks = masks[:, 0]
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim == 4 and masks.shape[2:] == (edge, edge):
        raise PromptError(
            f"{masks.shape[1]} masks of each object: show one of them, such as logits[:, ious[0].argmax()]"
        )
    if masks.ndim != 3 or masks.shape[1:] != (edge, edge):
        raise PromptError(
            f"the mask has the shape {list(np.shape(mask))}: expected the logits of an earlier answer, {wanted}"
        )
    if not np.isfinite(masks).all():
        raise PromptError("the mask holds a value that is no number")
    return masks.astype(np.float32)


def _type(mask: Any) -> np.dtype:
    return np.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask).dtype
