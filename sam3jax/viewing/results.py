"""Where results go: a folder in which nothing is replaced but what an earlier call wrote."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from sam3jax.errors import DISK_FULL
from sam3jax.files import FileError, disk_full, write_json
from sam3jax.weights.base import is_run_folder

PREDICTIONS = "predictions.json"
_WRITER = "sam3jax predict"


def info(names: Iterable[str]) -> dict[str, object]:
    """What predictions.json says of the files beside it, for the next call to know them by."""
    return {"description": _WRITER, "files": sorted(names)}


class Record(AbstractContextManager):
    """predictions.json, written picture by picture: memory does not grow with their number.

    It is whole, or as `info` alone left it: so a call cut short can be repeated.
    """

    def __init__(self, folder: Path, names: Iterable[str], categories: Sequence[str]) -> None:
        self._file = folder / PREDICTIONS
        head = {"info": info(names), "images": [], "categories": [], "annotations": []}
        write_json(self._file, head)
        named = [{"id": k, "name": name} for k, name in enumerate(categories, start=1)]
        # Without names: nothing of the user's is replaced, nothing is left behind.
        self._parts = [
            tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder)  # noqa: SIM115
            for _ in ("images", "annotations")
        ]
        self._head, self._count = {**head, "categories": named}, [0, 0]

    def image(self, image: Mapping[str, Any]) -> None:
        """A picture that was looked at."""
        self._add(0, image)

    def annotation(self, annotation: Mapping[str, Any]) -> None:
        """A find; its id is given here."""
        self._add(1, {"id": self._count[1] + 1, **annotation})

    def _add(self, which: int, entry: Mapping[str, Any]) -> None:
        self._parts[which].write(f"{',' if self._count[which] else ''}\n{json.dumps(entry)}")
        self._count[which] += 1

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._join()
        finally:
            for part in self._parts:
                with suppress(OSError):  # a full disk, told once already
                    part.close()

    def _join(self) -> None:
        whole = self._file.with_name(f"{PREDICTIONS}.part")
        try:
            with whole.open("w", encoding="utf-8") as file:
                for key in ("info", "categories"):
                    file.write(
                        f'{"{" if key == "info" else ","}"{key}": {json.dumps(self._head[key])}'
                    )
                for key, part in zip(("images", "annotations"), self._parts, strict=True):
                    file.write(f',\n"{key}": [')
                    part.seek(0)
                    shutil.copyfileobj(part, file)
                    file.write("]")
                file.write("}\n")
                file.flush()
                os.fsync(file.fileno())
            whole.replace(self._file)
        except OSError as error:
            whole.unlink(missing_ok=True)
            raise disk_full(self._file) if error.errno in DISK_FULL else error from error


def clear_stale(output: str | Path, names: Collection[str], inputs: Iterable[Path]) -> None:
    """Remove overlays of an earlier call that this one does not replace: they would pass for its own."""
    folder, read = Path(output), {path.resolve() for path in inputs}
    for name in _written(folder):
        file = folder / name
        mine = file.parent == folder and name != PREDICTIONS and name not in names
        if mine and file.suffix == ".png" and file.is_file() and file.resolve() not in read:
            file.unlink()


def check_results(output: str | Path, names: Collection[str], inputs: Iterable[Path]) -> None:
    """Raises FileError where predictions.json and files of these names may not be written into a folder.

    Refused: a run folder, an input, and whatever has the name of a result and was not written by an earlier call.
    """
    folder = Path(output)
    if is_run_folder(folder):
        raise FileError(
            f"{output} is a run folder: its own files would be replaced; give another --output"
        )
    taken = {p.name.casefold(): p for p in folder.iterdir()} if folder.is_dir() else {}
    ours = {name.casefold() for name in _written(folder)}
    read = {path.resolve() for path in inputs}
    for name in (PREDICTIONS, *names):
        there = taken.get(name.casefold())
        if there is not None and (name.casefold() not in ours or there.resolve() in read):
            what = "is one of the inputs" if there.resolve() in read else "was there before"
            raise FileError(f"{there} {what} and would be replaced: give another --output")


def _written(folder: Path) -> list[str]:
    """Names of the files that an earlier call wrote."""
    try:
        found = json.loads((folder / PREDICTIONS).read_text())["info"]
        return [PREDICTIONS, *map(str, found["files"])] if found["description"] == _WRITER else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
