"""Category names, which are the phrases that are asked: which are one concept, and what replaces them.

Two names are one concept where the model reads the same words: `Dog` and `dog`, `a &amp; b` and
`a & b`, a name with two blanks. Were they two, one would be asked as absent where the other is present.
"""

from __future__ import annotations

import difflib
import functools
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sam3jax.data.ids import Ids
from sam3jax.data.ledger import DataError, Ledger, shown
from sam3jax.data.records import Dataset, ImageRecord
from sam3jax.data.tokenizer import words

_JOINERS = "\u200c\u200d"
_LISTED = 20  # category names that a message lists


class Named(Protocol):
    """A data set of pictures or of videos."""

    @property
    def name(self) -> str: ...
    @property
    def categories(self) -> Mapping[int, str]: ...


@dataclass(frozen=True)
class Categories:
    """ids: of the file -> number. names: number -> name. merged: number -> first of the same name."""

    ids: Ids
    names: Mapping[int, str]
    merged: Mapping[int, int]

    @property
    def own(self) -> dict[int, str]:
        """The names that are left after merging."""
        return {i: name for i, name in self.names.items() if self.merged[i] == i}

    def find(self, raw: Any) -> int | None:
        """The number of the category that an annotation names by id, or else by name."""
        number = self.ids.find(raw)
        return None if number is None else self.merged[number]

    def find_by_name(self, raw: Any) -> int | None:
        """The same for an annotation that gives the name in place of the id."""
        return self._by_name.get(phrase_key(raw)) if isinstance(raw, str) else None

    @functools.cached_property
    def _by_name(self) -> dict[str, int]:
        return {phrase_key(name): i for i, name in self.own.items()}


@functools.lru_cache(maxsize=65536)
def phrase_key(name: str) -> str:
    """Equal for two names exactly where the model reads the same words; empty where it reads none."""
    return " ".join(words(visible(name).encode("utf-8", "replace").decode()))


def visible(text: str) -> str:
    """The text without what nobody sees: control characters become blanks, zero-width ones and marks of
    direction go. Joiners stay beside other letters than Latin's: Persian and emoji need them."""
    if text.isprintable():
        return text
    drop = "" if all(c.isascii() or c in _JOINERS for c in text) else _JOINERS
    kept = []
    for c in text:
        kind = unicodedata.category(c)
        if kind in ("Cc", "Zl", "Zp"):
            kept.append(" ")
        elif kind != "Cf" or c in drop:
            kept.append(c)
    return "".join(kept).strip()


def read_categories(items: list, ledger: Ledger, source: str) -> Categories:
    """The categories of a COCO file. Raises DataError for one without a usable id or name."""
    ids = Ids(item.get("id") for item in items if isinstance(item, dict))
    names: dict[int, str] = {}
    for item in items:
        number = ids.find(item.get("id")) if isinstance(item, dict) else None
        name = _name(item.get("name")) if isinstance(item, dict) else None
        if name and (seen := visible(name)) != name:
            ledger.add("category name holds signs that nobody sees (left out)", id=item["id"], found=name)  # fmt: skip
            name = seen or name
        if number is None or not name:
            raise DataError(
                f"{source}: category {shown(item)} needs an `id` and a `name`: a number or a text, "
                f"and a text that is a phrase"
            )
        if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
            raise DataError(
                f"{source}: the name of category {shown(item)} holds half a character: export the "
                f"annotations again, as UTF-8"
            )
        if not phrase_key(name):
            raise DataError(
                f"{source}: the name of category {shown(item)} has nothing to read: give it a name"
            )
        if number in names and names[number] != name:
            raise DataError(
                f"{source}: category id {shown(item['id'])} is both {shown(names[number])} and "
                f"{shown(name)}: give each category an id of its own"
            )
        names[number] = name
        for key in sorted(set(item) & {"phrase", "noun_phrase", "synonyms"}):
            ledger.add(
                f"category field `{key}` is not used: phrases are category names", id=item["id"]
            )
    for number, raw in ids.sources.items():
        ledger.add(
            "category id is no whole number >= 0 (numbered anew)", id=raw, found=names.get(number)
        )
    merged = merge_equal_names(names, ledger)
    _note_near_names({i: name for i, name in names.items() if merged[i] == i}, ledger)
    return Categories(ids, names, merged)


def _note_near_names(names: Mapping[int, str], ledger: Ledger) -> None:
    """`red-cup` and `red cup` are two phrases to the model, and may be one to the people who wrote them."""
    first: dict[str, str] = {}
    for number, name in names.items():
        letters = "".join(c for c in phrase_key(name) if c.isalnum())
        other = first.setdefault(letters, name)
        if letters and other != name:
            ledger.add(
                "category name differs from another one's in blanks or signs only (kept apart; data.phrases can "
                "make them one)",
                id=number,
                found=f"{name} beside {other}",
            )


def _name(raw: Any) -> str:
    """The name as text; numbers are fair names ("7"), null, lists and truth values are not."""
    if isinstance(raw, str):
        return raw.strip()
    if isinstance(raw, float):
        return f"{raw:g}" if math.isfinite(raw) else ""
    return str(raw) if type(raw) is int and abs(raw) < 10**30 else ""


def merge_equal_names(names: Mapping[int, str], ledger: Ledger) -> dict[int, int]:
    """Category number -> number of the first category with the same words."""
    first: dict[str, int] = {}
    merged: dict[int, int] = {}
    for number, name in names.items():
        merged[number] = first.setdefault(phrase_key(name), number)
        if merged[number] != number:
            ledger.add("category repeats another one's name (made one)", id=number, found=name)
    return merged


def check_phrases(phrases: Mapping[str, str], *datasets: Named) -> None:
    """Raise DataError for a key of data.phrases that names no category of any of the data sets."""
    there = {phrase_key(n): n for d in datasets for n in d.categories.values()}
    for key in phrases:
        if phrase_key(key) in there:
            continue
        close = difflib.get_close_matches(key, there.values(), n=1)
        hint = f"did you mean {shown(close[0])}? " if close else ""
        listed = sorted(there.values())
        more = f", ... ({len(listed)} in all)" if len(listed) > _LISTED else ""
        raise DataError(
            f"data.phrases names no category of {datasets[0].name} with {shown(key)}: {hint}it names "
            f"{', '.join(phrases)}; the data has {', '.join(listed[:_LISTED])}{more}"
        )
    seen: dict[str, str] = {}
    for key, value in phrases.items():
        if not phrase_key(value):
            raise DataError(
                f"data.phrases gives {shown(key)} the phrase {shown(value)}, which has nothing to read"
            )
        if seen.setdefault(phrase_key(key), value) != value:
            raise DataError(
                f"data.phrases gives {shown(key)} two phrases, {shown(seen[phrase_key(key)])} and "
                f"{shown(value)}: keys that differ in capitals or blanks are one name; keep one"
            )


def rename_categories(
    dataset: Dataset, phrases: Mapping[str, str], *, strict: bool = True
) -> Dataset:
    """The same data under other phrases; categories given the same phrase become one.

    strict: a key that names no category is an error; else it is left out, as for another data set
    than the one that the phrases were written for.
    """
    if strict:
        check_phrases(phrases, dataset)
    ledger = Ledger(dataset.problems)
    own, merged = renamed(dataset.categories, phrases, ledger)
    if own == dict(dataset.categories):
        return dataset
    images = dataset.images
    if any(merged[i] != i for i in merged):
        images = tuple(_renumber(image, merged) for image in images)
    return replace(dataset, images=images, categories=own, problems=ledger)


def renamed(
    categories: Mapping[int, str], phrases: Mapping[str, str], ledger: Ledger
) -> tuple[dict[int, str], dict[int, int]]:
    """(categories under other phrases, the category that each becomes): equal phrases become one."""
    by_key = {phrase_key(name): phrase for name, phrase in phrases.items()}
    names = {i: by_key.get(phrase_key(n), n) for i, n in categories.items()}
    if names == dict(categories):
        return names, {i: i for i in names}
    merged = merge_equal_names(names, ledger)
    return {i: n for i, n in names.items() if merged[i] == i}, merged


def _renumber(image: ImageRecord, merged: Mapping[int, int]) -> ImageRecord:
    negative = image.negative_ids
    return replace(
        image,
        annotations=tuple(replace(a, category_id=merged[a.category_id]) for a in image.annotations),
        negative_ids=None if negative is None else frozenset(merged[i] for i in negative),
        not_exhaustive_ids=frozenset(merged[i] for i in image.not_exhaustive_ids),
    )
