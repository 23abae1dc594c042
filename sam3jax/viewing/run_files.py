"""The files of a run that its report shows: read, and said where they are not as they were written."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3jax.checksums import RECORD, changed, is_whole_text
from sam3jax.data.pictures import DataError

_CONFIG = "config.yaml"
_SHOWN = (
    "evaluation.json",
    "predictions.json",
    "base_predictions.json",
    "summary.json",
    "metrics.jsonl",
)


def damage(folder: Path) -> list[str]:
    """Names of files that are gone or changed."""
    found = changed(folder, (*_SHOWN, _CONFIG))
    if found == [RECORD] and not any((folder / name).is_file() for name in _SHOWN):
        found = []  # nothing was written yet
    config = folder / _CONFIG
    whole = not config.is_file() or is_whole_text(config.read_text(errors="replace"))
    return found if whole or _CONFIG in found else [*found, _CONFIG]


def not_as_written(folder: Path, names: Sequence[str]) -> str:
    """The sentence for files of a folder that were changed."""
    return (
        f"{', '.join(names)} in {folder}: not as sam3jax wrote it; put it back, or write it again with sam3jax "
        "evaluate, or with the run's training command"
    )


def read_json(file: Path, default: Any) -> Any:
    """What a file holds, of the kind that `default` is; `default` where there is no file. Raises DataError."""
    if not file.is_file():
        return default
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}): run sam3jax.evaluate again") from error
    if not isinstance(found, type(default)):
        raise DataError(
            f"{file} holds a JSON {_KINDS.get(type(found), 'value')}, expected a {_KINDS[type(default)]}: run "
            "sam3jax.evaluate again"
        )
    return found


_KINDS = {dict: "object", list: "list", str: "text"}


def by_picture(results: Iterable[Mapping[str, Any]]) -> dict[Any, list[Mapping[str, Any]]]:
    """COCO results by the id of their picture."""
    grouped: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        grouped[result["image_id"]].append(result)
    return dict(grouped)
