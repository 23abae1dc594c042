"""What every reader of another format yields, and how it finds files and reads text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from sam3jax.data.folders import is_hidden, is_picture
from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.numbers import whole
from sam3jax.data.pictures import other_size, read_header

SPLITS = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid", "test": "test", "testing": "test"}  # fmt: skip
# train, val2017, obj_train_data, test_set; not test_tube.
_SPLIT_FOLDER = re.compile(
    rf"(?:obj[_-])?({'|'.join(SPLITS)})(?:[_-]?(?:set|data|images|split|\d+))*"
)


@dataclass
class Instance:
    """One object: a box (left, top, width, height), or polygons, or an RLE with its box."""

    label: str
    box: tuple[float, float, float, float] | None = None
    polygons: Sequence[Sequence[float]] = ()
    rle: dict[str, Any] | None = None
    area: float | None = None
    crowd: bool = False

    def bounds(self) -> tuple[float, float, float, float]:
        """The box, or that of the polygons."""
        if self.box is not None:
            return self.box
        points = np.concatenate([np.reshape(p, (-1, 2)) for p in self.polygons])
        left, top = points.min(0).tolist()
        right, bottom = points.max(0).tolist()
        return left, top, right - left, bottom - top


@dataclass
class Picture:
    """One picture of one split, `width` x `height` pixels as displayed.

    content: gives the bytes of a picture that is no file of its own; `file` is then only a name.
    """

    file: Path
    width: int
    height: int
    split: str
    instances: list[Instance] = field(default_factory=list)
    content: Callable[[], bytes] | None = None


def picture_of(file: Path, split: str, width: Any = None, height: Any = None) -> Picture:
    """A picture without objects yet; width, height: as its annotations state them, if they do.

    Raises DataError where the file has another size, turned or not.
    """
    header = read_header(file)
    columns, rows = whole(width), whole(height)
    if not columns or not rows:
        return Picture(file, *header.displayed, split)
    if (columns, rows) not in (header.size, header.displayed):
        raise other_size(file, header.displayed, (columns, rows))
    return Picture(file, columns, rows, split)


def files_below(folder: Path, *suffixes: str) -> list[Path]:
    """The files below a folder with one of the endings, in order; not what macOS or editors left there."""
    return [p for p in _below(folder) if p.suffix.lower() in suffixes]


def picture_files(folder: Path) -> list[Path]:
    """The pictures below a folder, in order."""
    return [p for p in _below(folder) if is_picture(p)]


def _below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not any(is_hidden(Path(part)) for part in parts) and path.is_file():
            yield path


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path lies below a folder, links followed."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # a link to itself, a NUL in the name
        return False


def split_of(path: Path, root: Path) -> str:
    """The split that a folder between `root` and the file names; train where none does."""
    parts = path.relative_to(root).parts[:-1]
    return next(filter(None, map(named_split, reversed(parts))), "train")


def named_split(folder: str) -> str | None:
    """The split that the name of a folder or a list says: val2017 is valid."""
    match = _SPLIT_FOLDER.fullmatch(folder.lower())
    return SPLITS[match[1]] if match else None


class ByName:
    """Files under the ends of their paths, as names from other machines need it.

    drop: folders that do not count, such as those that all pictures lie in.
    """

    def __init__(
        self, files: Sequence[Path], root: Path, drop: frozenset[str] = frozenset()
    ) -> None:
        self._drop = drop
        self._there: dict[str, list[tuple[tuple[str, ...], Path]]] = {}
        self._found: dict[Path, tuple[str, ...]] = {}
        for file in files:
            key = self._key(file.relative_to(root).as_posix())
            self._there.setdefault(key[-1], []).append((key, file))

    def find(self, name: str) -> Path | None:
        """The file of that path, else the one that has most folders at the end in common with it.

        None where there is none, or several. Raises DataError for a file that has another name already.
        """
        key = self._key(name)
        there = self._there.get(key[-1], []) if key else []
        same = [f for k, f in there if k == key]
        most = max((_tail(k, key) for k, _ in there), default=0)
        fits = same or [f for k, f in there if _tail(k, key) == most]
        if len(fits) != 1:
            return None
        if (other := self._found.setdefault(fits[0], key)) != key:
            raise DataError(
                f"{'/'.join(key)} and {'/'.join(other)} are two pictures, and the only file of that name is "
                f"{fits[0]}: put each into its folder"
            )
        return fits[0]

    def _key(self, name: str) -> tuple[str, ...]:
        parts = [p for p in PurePosixPath(name.replace("\\", "/")).parts if p not in ("/", "..")]
        return (*(p for p in parts[:-1] if p.lower() not in self._drop), *parts[-1:])


def _tail(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """How many parts at the end two paths have in common."""
    pairs = zip(reversed(a), reversed(b))
    return next((k for k, (u, v) in enumerate(pairs) if u != v), min(len(a), len(b)))


def read_text(file: Path, ledger: Ledger) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a mark; else as older Windows writes it, which is said."""
    data = file.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        ledger.add("text is not UTF-8: read as Windows-1252", file.name)
        return data.decode("cp1252", "replace")


def class_names(folder: Path, names: Sequence[str], ledger: Ledger) -> dict[int, str]:
    """Number -> name, of the first of the files: one name a line, empty lines count; {} without a file."""
    for file in (folder / name for name in names):
        if file.is_file():
            lines = read_text(file, ledger).split("\n")
            return {k: line.strip() for k, line in enumerate(lines) if line.strip()}
    return {}


def read_xml(file: Path) -> ElementTree.Element:
    """The root element. Raises DataError; entities, with which small files become huge, are refused."""
    data = file.read_bytes()
    if b"<!ENTITY" in data.replace(b"\0", b""):
        raise DataError(f"{file} defines XML entities, which no export needs: refused")
    try:
        return ElementTree.fromstring(data)
    except (
        ElementTree.ParseError,
        ValueError,
        LookupError,
    ) as error:  # of an encoding, the last two
        raise DataError(f"{file} is not XML ({error}): export the annotations again") from error
