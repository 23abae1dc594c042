"""Clicks that an annotation brings with it: `points`, x, y in pixels, and `labels`, 1 inside or 0 outside."""

from __future__ import annotations

from sam3jax.data.ledger import Ledger, Where
from sam3jax.data.numbers import number

_LEFT_OUT = "stored clicks left out"


def read_clicks(
    item: dict, width: int, height: int, ledger: Ledger, where: Where
) -> tuple[tuple[float, float, int], ...]:
    """The clicks of an annotation, x, y and label each; those that are none are counted in the ledger.

    points: [[x, y], ...], or [x, y] for one. Without labels all lie inside.
    """
    points, labels = item.get("points"), item.get("labels")
    if points is None:
        return ()
    if (
        isinstance(points, list)
        and len(points) == 2
        and not any(isinstance(p, list) for p in points)
    ):
        points, labels = (
            [points],
            labels if labels is None or isinstance(labels, list) else [labels],
        )
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
        ledger.add(f"{_LEFT_OUT}: `points` is no list of x, y", *where, points)
        return ()
    if labels is None:
        labels = [1] * len(points)
    if not isinstance(labels, list) or len(labels) != len(points):
        ledger.add(f"{_LEFT_OUT}: not as many `labels` as `points`", *where, labels)
        return ()
    found = []
    for point, label in zip(points, labels, strict=True):
        x, y, kind = (number(value) for value in (*point, label))
        if x is None or y is None:
            ledger.add(f"{_LEFT_OUT}: x, y are no numbers", *where, point)
        elif not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            ledger.add(f"{_LEFT_OUT}: outside the picture", *where, point)
        elif kind not in (0, 1):
            ledger.add(f"{_LEFT_OUT}: the label is neither 1 (inside) nor 0", *where, label)
        else:
            found.append((x, y, int(kind)))
    return tuple(found)
