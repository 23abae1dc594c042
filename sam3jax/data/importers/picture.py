"""What every reader of another format yields, and how it finds pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from sam3jax.data.ledger import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
SPLITS = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid", "test": "test"}  # fmt: skip


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


def picture_files(folder: Path) -> list[Path]:
    """The pictures below a folder, in order; not what macOS or editors left there."""
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES
        and p.is_file()
        and not any(part.startswith((".", "__MACOSX")) for part in p.relative_to(folder).parts)
    )


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path lies below a folder, links followed."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # a link to itself, a NUL in the name
        return False


def split_of(path: Path, root: Path) -> str:
    """The split that a folder or file name between `root` and the file names; train where none does."""
    for part in reversed(path.relative_to(root).parts):
        if (split := SPLITS.get(part.lower().partition(".")[0])) is not None:
            return split
    return "train"


def read_xml(file: Path) -> ElementTree.Element:
    """The root element. Raises DataError; entities, with which small files become huge, are refused."""
    data = file.read_bytes()
    if b"<!ENTITY" in data:
        raise DataError(f"{file} defines XML entities, which no export needs: refused")
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise DataError(f"{file} is not XML ({error}): export the annotations again") from error
