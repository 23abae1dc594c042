"""Numbers of a JSON file: what is one, whatever type the exporter gave it."""

from __future__ import annotations

import math
from typing import Any

_NO = frozenset(("0", "0.0", "false", "no", "n", "f", "none", "null", ""))
_YES = frozenset(("1", "1.0", "true", "yes", "y", "t"))


def number(value: Any) -> float | None:
    """The finite number that a value is or spells; None for 10^400, NaN, truth values, the rest."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def whole(value: Any) -> int | None:
    """The whole number > 0 that a value is or spells (640, 640.0, "640"), else None."""
    found = number(value)
    return int(found) if found is not None and found > 0 and found.is_integer() else None


def flag(value: Any) -> bool | None:
    """0, 1, true and false, also as text or null; None where a value is neither yes nor no."""
    if value is None or value is False:
        return False
    if value is True:
        return True
    if isinstance(value, int | float):
        return bool(value) if value in (0, 1) else None
    if isinstance(value, str):
        text = value.strip().lower()
        return True if text in _YES else False if text in _NO else None
    return None
