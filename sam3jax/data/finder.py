"""file_name of a COCO entry -> the file on this disk, or why there is none.

Names may come from another machine: folders at their front are dropped one by one until a file is
found. Only regular files inside the data folder count. Pictures end up in reports that people share,
so a name or a link that leads out of the folder is refused, unless `data.allow_outside` is set.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from sam3jax.data.ledger import DataError, shown

_WALKED = 200_000  # files that are looked through for near names
_PICTURES = frozenset(("jpg", "png", "webp", "bmp", "tif", "tiff", "gif", "heic", "avif", "jfif"))
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts before the names of uploads
_FILE, _LINK, _OTHER = "file", "link", "other"


class Finder:
    """Finds pictures in `folders`, most likely first. Directories are listed once: a stat for each
    picture is slow on a network."""

    def __init__(self, folders: list[Path], root: Path, *, allow_outside: bool = False) -> None:
        self._folders, self._root, self._allow_outside = folders, root, allow_outside
        self._real_root = os.path.realpath(root)
        self._listings: dict[Path, dict[str, str]] = {}
        self._inside: dict[Path, bool] = {}
        self._near: dict[str, list[str]] | None = None

    def __call__(self, file_name: str) -> Path | None:
        """The file of that name; None where there is none. Raises DataError for one outside."""
        path = PurePosixPath(file_name.replace("\\", "/"))
        if path.is_absolute():
            if self._allow_outside and (found := self._look(Path(path.parent), path.name)):
                return found
            parts = path.parts[1:]
        else:
            parts = path.parts
        for start in range(len(parts)):
            relative = PurePosixPath(*parts[start:])
            if relative.name in ("", ".."):
                return None
            for folder in self._folders:
                inner = folder / relative.parent if len(relative.parts) > 1 else folder
                if found := self._look(inner, relative.name):
                    return found
        if path.is_absolute() and path.name and self._look(Path(path.parent), path.name):
            raise outside(str(path), self._root)
        return None

    def near(self, file_name: str) -> str | None:
        """Files whose name differs in capitals, Unicode form, escapes, ending or folder only, for a message."""
        if self._near is None:
            self._near = defaultdict(list)
            for number, file in enumerate(_walk(self._root)):
                if number > _WALKED:
                    break
                place, key = file.relative_to(self._root).as_posix(), _plain(file.name)
                self._near[key].append(place)
                if key.rpartition(".")[2] in _PICTURES:
                    self._near[key.rpartition(".")[0]].append(place)
        key = _plain(PurePosixPath(file_name.replace("\\", "/")).name)
        found = self._near.get(key) or self._near.get(key.rpartition(".")[0] or key) or ()
        return " or ".join(shown(name) for name in found[:2]) or None

    def _look(self, folder: Path, name: str) -> Path | None:
        kind = self._listed(folder).get(name)
        if kind is None:
            return None
        file = folder / name
        if kind == _OTHER:
            if not os.path.isdir(file):
                raise DataError(
                    f"picture {file} is no regular file (a pipe, a device or a broken link): replace it, "
                    f"or take it out of the JSON"
                )
            return None
        if not self._allow_outside:
            inside = self._is_inside(folder)
            if kind == _LINK:
                inside = self._within(os.path.realpath(file))
            if not inside:
                raise outside(str(file), self._root)
        return file

    def _listed(self, folder: Path) -> dict[str, str]:
        if folder not in self._listings:
            found: dict[str, str] = {}
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        found[entry.name] = _kind(entry)
            except (OSError, ValueError):  # no such folder, not ours to read, a NUL in the name
                pass
            self._listings[folder] = found
        return self._listings[folder]

    def _is_inside(self, folder: Path) -> bool:
        if folder not in self._inside:
            self._inside[folder] = self._within(os.path.realpath(folder))
        return self._inside[folder]

    def _within(self, real: str) -> bool:
        return os.path.commonpath([real, self._real_root]) == self._real_root


def outside(file: str, root: Path) -> DataError:
    """The sentence for a picture that a name or a link leads out of the data folder to."""
    return DataError(
        f"picture {file} lies outside the data folder {root}: move it there, point data.train to a "
        f"folder that holds both, or allow it with data.allow_outside=true (pictures are shown in reports)"
    )


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_file():
            return _LINK if entry.is_symlink() else _FILE
    except OSError:  # a link to itself
        pass
    return _OTHER


def _walk(root: Path):
    for folder, _, files in os.walk(root):
        for name in files:
            yield Path(folder) / name


def _plain(name: str) -> str:
    """Equal for names that people and file systems take for the same."""
    plain = unicodedata.normalize("NFKC", unquote(name)).strip().casefold()
    stem, dot, suffix = _UPLOADED.sub("", plain).rpartition(".")
    if not dot:
        return " ".join(suffix.split())
    return f"{' '.join(stem.split())}.{'jpg' if suffix == 'jpeg' else suffix}"
