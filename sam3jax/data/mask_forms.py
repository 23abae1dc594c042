"""The many ways in which exporters write a segmentation, brought to COCO's two.

    [[x, y, x, y, ...], ...]            polygons (COCO's own)
    [x, y, x, y, ...]                   one bare polygon
    [[x, y], [x, y], ...]               one polygon, pairs of points (labelme)
    [[[x, y], ...], ...]                polygons of pairs; any further level of nesting
    [{"x": 1, "y": 2}, ...]             points as dictionaries
    {"x": [...], "y": [...]}            columns; also all_points_x, all_points_y (VIA)
    [null, [...]]                       null beside polygons
    {"size": ..., "counts": ...}        run lengths (COCO's own); counts as list or text, b'...' too
    [{"size": ..., "counts": ...}]      one or more of them in a list
    "[[1, 2, ...]]"                     any of these as JSON or Python text

Each has one reading only. What has several, or none, is left alone: `UNREADABLE`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

UNREADABLE = object()
_LEVELS = 8  # of nesting and of text within text
_COLUMNS = (("x", "y"), ("all_points_x", "all_points_y"), ("xs", "ys"))


def normal_form(value: Any, level: int = 0) -> tuple[Any, bool]:
    """(polygons, run lengths, None or UNREADABLE; whether the form was another one than COCO's).

    Polygons are a list of flat lists, run lengths a list of dictionaries with `counts`. None: no mask
    is stated. The numbers themselves are not looked at.
    """
    if value is None or value == "" or value == [] or value == {}:
        return None, False
    if level > _LEVELS:
        return UNREADABLE, False
    if isinstance(value, str):
        inner = parse_text(value)
        return (normal_form(inner, level + 1)[0], True) if inner is not None else (UNREADABLE, True)
    if isinstance(value, dict):
        if "counts" in value or "size" in value:
            return [value], False
        polygon = _columns(value)
        return (UNREADABLE, True) if polygon is None else ([polygon], True)
    if not isinstance(value, list):
        return UNREADABLE, False
    first = value[0]
    usual = type(first) is list and len(first) > 2 and type(first[0]) in (int, float)
    if usual and all(type(part) is list for part in value):
        return value, False  # COCO's own, nearly always
    return _list(value, level)


def parse_text(text: str) -> Any:
    """What JSON or Python text says; None where it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return _lists(read(text))
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def _lists(value: Any) -> Any:
    """Tuples, which Python text may hold, as lists."""
    return [_lists(part) for part in value] if isinstance(value, list | tuple) else value


def _list(value: list, level: int) -> tuple[Any, bool]:
    parts = [part for part in value if part is not None]
    dropped = len(parts) < len(value)
    if not parts:
        return None, dropped
    if all(_is_number(part) for part in parts):
        return [parts], dropped
    if all(isinstance(part, dict) and "counts" in part for part in parts):
        return parts, True
    points = [point for part in parts if (point := _point(part)) is not None]
    if len(points) >= 3 and len(points) == len(parts):
        return [[v for point in points for v in point]], True
    found: list = []
    nothing = True
    for part in parts:
        if isinstance(part, list) and not part:
            found.append(part)  # an empty polygon is odd, but no mask
            continue
        inner, _ = normal_form(part, level + 1) if not _flat(part) else ([part], False)
        if inner is UNREADABLE:
            return UNREADABLE, True
        found += inner or ()
        nothing = False
    kinds = {isinstance(part, dict) for part in found}
    if len(kinds) > 1:
        return UNREADABLE, True
    if nothing:
        return found, False
    return found, dropped or any(not _flat(part) for part in parts)


def _flat(part: Any) -> bool:
    return isinstance(part, list) and all(_is_number(v) or isinstance(v, str) for v in part)


def _point(part: Any) -> Sequence | None:
    """x and y of [x, y] or {"x": x, "y": y}, else None."""
    if isinstance(part, dict) and set(part) >= {"x", "y"}:
        part = [part["x"], part["y"]]
    if isinstance(part, list) and len(part) == 2 and all(_is_number(v) for v in part):
        return part
    return None


def _columns(value: dict) -> list | None:
    for x, y in _COLUMNS:
        xs, ys = value.get(x), value.get(y)
        if isinstance(xs, list) and isinstance(ys, list) and len(xs) == len(ys):
            return [v for pair in zip(xs, ys) for v in pair]
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
