"""What the trunk makes of each picture, kept on disk: `cache_trunk`.

A folder holds one kind of features, named by everything that they follow from but the pictures:

    features.bin   [entries, y, x, D], of clips [entries, F, y, x, D], in the compute dtype, mapped into memory
    stamps.bin     [entries] a checksum of the picture's file; 0 where nothing is stored yet
    about.json     what the folder is of

Entry `row * views + view` is view `view` of picture or video `row`. A stamp is written behind its features, so a
folder that was cut off is continued, and a picture whose file changes is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  makes numpy know bfloat16
import numpy as np

from sam3jax.data.ledger import DataError
from sam3jax.data.records import Dataset
from sam3jax.files import make_folder, write_text

_FREE = 2e9  # bytes that are left on the disk
_digest = partial(hashlib.blake2b, digest_size=16)


@dataclass
class FeatureStore:
    """Features [y, x, D] of `views` views of each of `pictures` pictures, or [F, y, x, D] of videos; opened by `open`.

    Before that, and where an entry is missing, zeros are read: their shape is all that a plan needs.
    """

    views: int
    pictures: int
    shape: tuple[int, ...]
    dtype: str
    folder: Path | None = None
    _features: Any = None

    @property
    def line(self) -> str:
        """What it holds, for people."""
        rows, views = ("videos", "clips") if len(self.shape) == 4 else ("pictures", "views")
        held = f"{self.pictures} {rows} x {self.views} {views}"
        return f"trunk features {held}, {self.size / 1e9:.1f} GB on the disk"

    @property
    def size(self) -> int:
        """Bytes of all features."""
        return self.views * self.pictures * math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def read(self, row: int, view: int) -> np.ndarray:
        """Features of a picture's view, of `shape`."""
        if self.folder is None:
            return np.zeros(self.shape, self.dtype)
        return np.array(self._mapped()[row * self.views + view])

    def open(self, place: Path, about: dict[str, Any]) -> None:
        """The folder below `place` that is of `about`, made where there is none. Raises DataError, FileError."""
        text = json.dumps(about, sort_keys=True, default=str)
        folder = place / hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        count = self.views * self.pictures
        make_folder(folder)
        free = shutil.disk_usage(folder).free
        there = 512 * sum(f.stat().st_blocks for f in folder.glob("features.bin"))
        if self.size - there > free - _FREE:
            raise DataError(
                f"cache_trunk needs {self.size / 1e9:.1f} GB in {place}, of which {there / 1e9:.1f} GB are there and "
                f"{free / 1e9:.1f} GB free: set SAM3JAX_CACHE to a larger disk, or ask for fewer views"
            )
        for name, size in (("features.bin", self.size), ("stamps.bin", 8 * count)):
            with (folder / name).open("ab") as file:
                file.truncate(size)  # a hole, filled as features come
        write_text(folder / "about.json", text)
        self.folder = folder

    def missing(self, stamps: Sequence[int]) -> list[int]:
        """Entries that are not stored, or of a file that has changed. stamps: of each picture's file."""
        wanted = np.repeat(np.asarray(stamps, np.uint64), self.views)
        return np.flatnonzero(self._stamps() != wanted).tolist()

    def write(self, entries: Sequence[int], features: np.ndarray, stamps: Sequence[int]) -> None:
        """Store features [n, ...] of n entries; stamps [n]: of their files."""
        known = self._stamps("r+")
        known[list(entries)] = 0
        mapped = self._mapped("r+")
        mapped[list(entries)] = features
        mapped.flush()
        known[list(entries)] = np.asarray(stamps, np.uint64)
        known.flush()

    def _mapped(self, mode: Any = "r") -> np.memmap:
        if self._features is None or mode != "r":
            assert self.folder is not None
            shape = (self.views * self.pictures, *self.shape)
            self._features = np.memmap(self.folder / "features.bin", self.dtype, mode, shape=shape)
        return self._features

    def _stamps(self, mode: Any = "r") -> np.memmap:
        assert self.folder is not None
        return np.memmap(self.folder / "stamps.bin", np.uint64, mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_features": None}  # each process maps the file itself


def checksums(rows: Iterable[tuple[Iterable[Path], str]]) -> list[int]:
    """One a row, never 0: of the content of its files, each read once, and of a text. Raises DataError."""
    known: dict[Path, bytes] = {}

    def digest(file: Path) -> bytes:
        if file not in known:
            try:
                with file.open("rb") as content:
                    known[file] = hashlib.file_digest(content, _digest).digest()
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error}") from error
        return known[file]

    found = []
    for files, text in rows:
        whole = b"".join(map(digest, files)) + text.encode()
        stamp = int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest(), "little")
        found.append(stamp or 1)
    return found


def stamps_of(dataset: Dataset) -> list[int]:
    """`checksums` of what each picture follows from. Raises DataError."""
    return checksums((i.sources, f"{i.frame} {i.width} {i.height}") for i in dataset.images)
