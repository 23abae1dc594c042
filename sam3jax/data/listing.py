"""The pictures that a COCO file lists: ids, files, sizes, and what is known to be absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from sam3jax.data.ids import Ids
from sam3jax.data.ledger import DataError, Ledger, shown
from sam3jax.data.names import Categories
from sam3jax.data.numbers import number, whole
from sam3jax.data.pictures import displayed_size
from sam3jax.data.records import ImageRecord

Locate = Callable[[str], Path | None]

_OTHER_NAMES = (
    "filename",
    "fileName",
    "file",
    "coco_url",
)  # of `file_name`; the last one is LVIS's
_LARGEST_EDGE = 1_000_000  # pixels; a stated size beyond it is no size


class Listing:
    """records: one for each file; `find` gives the row of the picture that an `image_id` means."""

    def __init__(
        self, items: list, locate: Locate, categories: Categories, ledger: Ledger, source: str
    ) -> None:
        self._locate, self._categories = locate, categories
        self._ledger, self._source = ledger, source
        self.ids = Ids(item.get("id") for item in items if isinstance(item, dict))
        self.records: list[ImageRecord] = []
        self.merged: set[int] = set()  # rows that several entries of the file describe
        self._rows: dict[int, int] = {}  # number -> row
        self.names: list[str] = []  # file_name of each row
        self._by_name: dict[str, int] | None = None
        self._quick: dict[int, int] = {}
        self._read(items)

    def find(self, raw: Any) -> int | None:
        """Row of the picture with that id; None where there is none."""
        if type(raw) is int:
            row = self._quick.get(raw)
            if row is not None:
                return row
        number = self.ids.find(raw)
        row = None if number is None else self._rows.get(number)
        if row is not None and type(raw) is int:
            self._quick[raw] = row
        return row

    def find_by_name(self, raw: Any) -> int | None:
        """The same for an annotation that gives the file's name in place of the id."""
        if not isinstance(raw, str):
            return None
        if self._by_name is None:
            self._by_name = {}
            for row, name in enumerate(self.names):
                for key in (name, PurePosixPath(name).stem):
                    # A name of two pictures names none.
                    self._by_name[key] = -1 if key in self._by_name else row
        row = self._by_name.get(raw.strip(), -1)
        return row if row >= 0 else None

    def _read(self, items: list) -> None:
        missing: list[str] = []
        ambiguous: set[int] = set()
        files: dict[tuple[Path, int], int] = {}
        for item in items:
            number, name = self._identify(item)
            file = self._locate(name)
            if file is None:
                missing.append(name)
                continue
            frame = self._frame(item, name)
            row = files.get((file, frame))
            if number in self._rows:
                if row != self._rows[number]:
                    ambiguous.add(number)
                self._ledger.add("picture id used more than once", name, item["id"])
            elif row is not None:
                self._merge(row, number, name, item)
            else:
                files[file, frame] = self._rows[number] = len(self.records)
                self.records.append(self._record(item, number, name, file, frame))
                self.names.append(name)
        if missing:
            raise self._missing(missing, len(items))
        self._leave_out(ambiguous)
        for raw in self.ids.sources.values():
            self._ledger.add("picture id is no whole number >= 0 (numbered anew)", "", raw)

    def _identify(self, item: Any) -> tuple[int, str]:
        if isinstance(item, dict) and "file_name" not in item:
            for other in _OTHER_NAMES:
                if other in item:
                    self._ledger.add(f"picture field `{other}` is read as `file_name`", "", item.get("id"))  # fmt: skip
                    item = {**item, "file_name": item[other]}
                    break
        raw = item.get("file_name") if isinstance(item, dict) else None
        name = str(raw) if isinstance(raw, str | int) and not isinstance(raw, bool) else ""
        number = self.ids.find(item.get("id")) if isinstance(item, dict) else None
        if number is None or not name.strip():
            raise DataError(
                f"{self._source}: picture {shown(item)} needs an `id`, a number or a text, and a "
                f"`file_name`"
            )
        return number, name

    def _record(self, item: dict, number: int, name: str, file: Path, frame: int) -> ImageRecord:
        width, height = whole(item.get("width")), whole(item.get("height"))
        if not width or not height or max(width, height) > _LARGEST_EDGE:
            self._ledger.add(
                "picture without width and height: taken from the file", name, item["id"]
            )
            width, height = displayed_size(file)
        negative, not_exhaustive = self._absences(item, name)
        return ImageRecord(number, file, width, height, (), negative, not_exhaustive, frame=frame)

    def _frame(self, item: dict, name: str) -> int:
        if (raw := item.get("frame")) is None:
            return 0
        found = number(raw)
        if found is not None and found >= 0 and found.is_integer():
            return int(found)
        self._ledger.add("`frame` is no whole number >= 0 (the first is read)", name, item["id"], raw)  # fmt: skip
        return 0

    def _absences(self, item: dict, name: str) -> tuple[frozenset[int] | None, frozenset[int]]:
        found: list[frozenset[int] | None] = []
        for field in ("neg_category_ids", "not_exhaustive_category_ids"):
            value = item.get(field)
            numbers: set[int] = set()
            if value is not None and not isinstance(value, list):
                self._ledger.add(f"`{field}` is no list (taken as empty)", name, item["id"], value)
            elif value is not None:
                for raw in value:
                    category = self._categories.find(raw)
                    if category is None:
                        category = self._categories.find_by_name(raw)
                    if category is None:
                        self._ledger.add(
                            f"`{field}` has a category that is not listed (left out)",
                            name,
                            item["id"],
                            raw,
                        )
                    else:
                        numbers.add(category)
            found.append(None if value is None else frozenset(numbers))
        return found[0], found[1] or frozenset()

    def _merge(self, row: int, number: int, name: str, item: dict) -> None:
        """Another entry for a file that is listed already: one picture with the annotations of both."""
        first, other = self.records[row], self.names[row]
        path = first.file.as_posix()
        for stated in (name, other):
            if name != other and not path.endswith("/" + _clean(stated).lstrip("/")):
                raise DataError(
                    f"{self._source}: {shown(stated)} is missing: the only file of that name is {path}, "
                    f"which is {shown(name if stated == other else other)}; put it into its folder, or "
                    f"take it out of `images`"
                )
        size = (whole(item.get("width")), whole(item.get("height")))
        if None not in size and size != (first.width, first.height):
            raise DataError(
                f"{self._source}: {shown(name)} is listed under two ids as {first.width} x "
                f"{first.height} and as {size[0]} x {size[1]}: two pictures lost their folders? give each "
                f"a file of its own"
            )
        self._ledger.add(
            "picture listed more than once under different ids (made one)", name, item["id"]
        )
        negative, not_exhaustive = self._absences(item, name)
        known = [n for n in (first.negative_ids, negative) if n is not None]
        self._rows[number] = row
        self.merged.add(row)
        self.records[row] = replace(
            first,
            negative_ids=frozenset.union(*known) if known else None,
            not_exhaustive_ids=first.not_exhaustive_ids | not_exhaustive,
        )

    def _leave_out(self, ambiguous: set[int]) -> None:
        if not ambiguous:
            return
        gone = {self._rows.pop(number) for number in ambiguous}
        for row in sorted(gone):  # whose annotations are whose cannot be told
            self._ledger.add(
                "picture left out: its id belongs to several files",
                self.names[row],
                self.records[row].id,
            )
        kept = [row for row in range(len(self.records)) if row not in gone]
        moved = {row: k for k, row in enumerate(kept)}
        self._rows = {number: moved[row] for number, row in self._rows.items() if row in moved}
        self.merged = {moved[row] for row in self.merged if row in moved}
        self.records = [self.records[row] for row in kept]
        self.names = [self.names[row] for row in kept]

    def _missing(self, missing: list[str], total: int) -> DataError:
        near = getattr(self._locate, "near", lambda name: None)
        hints = [f"{shown(n)[1:-1]} (there is {there})" if (there := near(n)) else shown(n)[1:-1] for n in missing[:3]]  # fmt: skip
        return DataError(
            f"{len(missing)} of {total} pictures listed in {self._source} are missing: "
            f"{', '.join(hints)}{', ...' if len(missing) > 3 else ''}; put them beside the "
            f"JSON (or into images/), or take them out of its `images`"
        )


def _clean(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).as_posix()
