"""Clicks that an annotation brings with it: `points`, x, y in pixels, and `labels`, 1 inside or 0 outside.

Also under SAM's names, `point_coords` and `point_labels`.
"""

from __future__ import annotations

from typing import Any

from sam3jax.data.ledger import Ledger, Where
from sam3jax.data.mask_forms import parse_text
from sam3jax.data.numbers import flag, number

Clicks = tuple[tuple[float, float, int], ...]

_LEFT_OUT = "stored clicks left out"
_NAMES = (("points", "labels"), ("point_coords", "point_labels"))
_WORDS = {"positive": 1, "foreground": 1, "negative": 0, "background": 0}


def read_clicks(item: dict, width: int, height: int, ledger: Ledger, where: Where) -> Clicks:
    """The clicks of an annotation, x, y and label each; those that are none are counted in the ledger.

    points: [[x, y], ...], or [x, y] for one. labels: one for each, or one for all; without them all lie
    inside.
    """
    names = next((names for names in _NAMES if item.get(names[0]) is not None), None)
    if names is None:
        return ()
    points, labels = (_list(item.get(name)) for name in names)
    if isinstance(points, list) and len(points) == 2 and not any(isinstance(p, list | dict) for p in points):  # fmt: skip
        points = [points]
    pairs = [_pair(point) for point in points] if isinstance(points, list) else [None]
    if None in pairs:
        ledger.add(f"{_LEFT_OUT}: `points` is no list of x, y", *where, item[names[0]])
        return ()
    if not isinstance(labels, list):
        labels = [1 if labels is None else labels] * len(pairs)
    if len(labels) != len(pairs):
        ledger.add(f"{_LEFT_OUT}: not as many `labels` as `points`", *where, labels)
        return ()
    found = []
    for (x, y), label in zip(filter(None, pairs), labels, strict=True):
        a, b, kind = number(x), number(y), _kind(label)
        if a is None or b is None:
            ledger.add(f"{_LEFT_OUT}: x, y are no numbers", *where, [x, y])
        elif not (-0.5 <= a <= width - 0.5 and -0.5 <= b <= height - 0.5):
            ledger.add(f"{_LEFT_OUT}: outside the picture", *where, [x, y])
        elif kind is None:
            ledger.add(f"{_LEFT_OUT}: the label is neither 1 (inside) nor 0", *where, label)
        else:
            found.append((a, b, kind))
    return tuple(found)


def is_in_box(x: float, y: float, box: tuple[float, float, float, float]) -> bool:
    """Whether a click lies in left, top, width, height, or a pixel beside it."""
    return -1 <= x - box[0] <= box[2] + 1 and -1 <= y - box[1] <= box[3] + 1


def _list(value: Any) -> Any:
    """A list as it is, as text, or in a list of its own, as SAM's batches have it."""
    if isinstance(value, str):
        value = parse_text(value) or value
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    return value


def _pair(point: Any) -> tuple[Any, Any] | None:
    if isinstance(point, dict) and {"x", "y"} <= point.keys():
        return point["x"], point["y"]
    return (point[0], point[1]) if isinstance(point, list) and len(point) == 2 else None


def _kind(label: Any) -> int | None:
    if isinstance(label, str) and label.strip().lower() in _WORDS:
        return _WORDS[label.strip().lower()]
    found = None if label is None else flag(label)
    return None if found is None else int(found)
