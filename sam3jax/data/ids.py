"""Ids of any kind -> own whole numbers.

A file may number its entries 0, 1, 2, or name them "c1", a uuid, {"$oid": "..."}, 2.5 or 10^30. Whole
numbers from 0 on are kept, so that predictions can be held against the file; others get the next free
number. "0" and 0 and 0.0 are one id, unless the file lists both; an id that is a list, null or a
truth value names nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable
from typing import Any

LARGEST = 2**53 - 1  # beyond it, JSON readers in other languages no longer agree
_WHOLE = re.compile(r"[+-]?\d{1,400}(\.0{1,9})?")


class Ids:
    """The ids that a list of entries defines; `find` tells which entry another id means."""

    def __init__(self, listed: Iterable[Any]) -> None:
        keys = dict.fromkeys(key for raw in listed if (key := key_of(raw)) is not None)
        self._numbers: dict[Hashable, int] = {}
        self.sources: dict[int, Any] = {}
        self._loose: dict[Hashable, list[Hashable]] = {}
        for key in keys:
            self._loose.setdefault(loose(key), []).append(key)
        late: list[Hashable] = []
        for key in keys:
            wanted = loose(key)
            alone = len(self._loose[wanted]) == 1 or isinstance(key, int)
            if alone and isinstance(wanted, int) and 0 <= wanted <= LARGEST:
                self._numbers[key] = wanted
            else:
                late.append(key)
        taken = set(self._numbers.values())
        following = 0 if not taken else min(max(taken) + 1, LARGEST)
        for key in late:
            while following in taken:
                following = following + 1 if following < LARGEST else 0
            taken.add(following)
            self._numbers[key] = following
            self.sources[following] = key[1] if isinstance(key, tuple) else key

    def find(self, raw: Any) -> int | None:
        """The number of the entry that `raw` means; None where it means none, or one of two."""
        key = key_of(raw)
        if key is None:
            return None
        if (number := self._numbers.get(key)) is not None:
            return number
        alike = self._loose.get(loose(key), ())
        return self._numbers[alike[0]] if len(alike) == 1 else None

    def lists(self, raw: Any) -> bool:
        """Whether an entry has this very id, not only one that means the same."""
        return key_of(raw) in self._numbers


def key_of(raw: Any) -> Hashable | None:
    """The id in a form in which equal ids are equal: an int, a float, or ("text", str).

    None for what cannot name anything: null, truth values, lists, empty text, NaN.
    """
    kind = type(raw)
    if kind is int:
        return raw
    if kind is str:
        text = raw.strip()
        return ("text", text) if text else None
    if kind is float:
        if not math.isfinite(raw):
            return None
        return int(raw) if raw.is_integer() else raw
    if kind is dict and len(raw) == 1:  # {"$oid": "5f..."}, {"$numberLong": "7"}
        ((name, value),) = raw.items()
        if name.startswith("$") and not isinstance(value, dict):
            return key_of(value)
    return None


def loose(key: Hashable) -> Hashable:
    """The whole number that a text spells, else the key itself."""
    if isinstance(key, tuple) and _WHOLE.fullmatch(key[1]) and key[1].isascii():
        return int(key[1].partition(".")[0])
    return key
