"""The ledger of everything odd about a data set: what happened, how often, and to which entry.

Nothing is repaired or left out without a line here. `doctor` prints a few entries of each kind and
writes all of them to doctor.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sam3jax.errors import UserError

Where = tuple[str, Any]  # the file and the id of an entry

_TEXT = 80  # characters of a value that a message repeats


class DataError(UserError):
    """The data cannot be used; the message names the thing and the remedy, in printable text."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True, slots=True)
class Entry:
    """One odd entry: the file or category it belongs to, the id of the entry, what was found."""

    file: str = ""
    id: Any = None
    found: str = ""

    def __str__(self) -> str:
        parts = [self.file, "" if self.id is None else f"id {shown(self.id)}", self.found]
        return printable(", ".join(part for part in parts if part))


class Ledger(Mapping[str, int]):
    """Sentence -> how often it is true, in the order of first appearance; entries beside it."""

    def __init__(self, other: Ledger | Mapping[str, int] | None = None) -> None:
        self._counts: dict[str, int] = dict(other or {})
        self._entries: dict[str, list[Entry]] = {}
        if isinstance(other, Ledger):
            self._entries = {sentence: list(found) for sentence, found in other._entries.items()}

    def add(
        self, sentence: str, file: str = "", id: Any = None, found: Any = None, count: int = 1
    ) -> None:
        """Count `sentence` once more, for the entry `id` of `file`; found: the value that is odd."""
        self._counts[sentence] = self._counts.get(sentence, 0) + count
        if file or id is not None or found is not None:
            text = "" if found is None else f"found {shown(found)}"
            self._entries.setdefault(sentence, []).append(Entry(file, id, text))

    def entries(self, sentence: str) -> tuple[Entry, ...]:
        """The entries that a sentence is about, in the file's order."""
        return tuple(self._entries.get(sentence, ()))

    def total(self, start: str) -> int:
        """How often sentences that begin with `start` are true, all together."""
        return sum(count for sentence, count in self._counts.items() if sentence.startswith(start))

    def examples(self, start: str, most: int = 3) -> str:
        """The first entries of sentences that begin with `start`, for an error message."""
        found = [
            str(entry)
            for sentence in self._counts
            if sentence.startswith(start)
            for entry in self._entries.get(sentence, ())[:most]
        ]
        return "; ".join(found[:most])

    def __getitem__(self, sentence: str) -> int:
        return self._counts[sentence]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __repr__(self) -> str:
        return f"Ledger({self._counts})"


def shown(value: Any) -> str:
    """A short printable form of any value of a JSON file."""
    if isinstance(value, str):
        text = repr(value[: _TEXT + 1])
    elif isinstance(value, int) and abs(value) >= 10**30:
        text = f"a number of {value.bit_length() * 30103 // 100000 + 1} digits"
    elif isinstance(value, list | tuple):
        inner = ", ".join(shown(v) for v in value[:8])
        text = f"[{inner}{', ...' if len(value) > 8 else ''}]"
    elif isinstance(value, dict):
        inner = ", ".join(f"{shown(k)}: {shown(v)}" for k, v in list(value.items())[:6])
        text = f"{{{inner}{', ...' if len(value) > 6 else ''}}}"
    else:
        text = repr(value)
    return printable(text if len(text) <= _TEXT else text[:_TEXT] + "...")


def printable(text: str) -> str:
    """The text with control characters and halves of characters escaped, for a terminal or a page."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
