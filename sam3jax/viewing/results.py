"""Where results go: a folder in which nothing is replaced but what an earlier call wrote."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from sam3jax.files import FileError
from sam3jax.weights.base import is_run_folder

PREDICTIONS = "predictions.json"
_WRITER = "sam3jax predict"


def info(names: Iterable[str]) -> dict[str, object]:
    """What predictions.json says of the files beside it, for the next call to know them by."""
    return {"description": _WRITER, "files": sorted(names)}


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
