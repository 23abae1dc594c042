"""validation.json of a checkpoint: what its validation found. Checked when it is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sam3jax.checksums import is_whole, sealed
from sam3jax.config import ConfigError
from sam3jax.files import write_json

VALIDATION = "validation.json"


def write_validation(folder: Path, run: str | None, validation: dict[str, Any]) -> None:
    """folder: of the checkpoint; run: identity of its run."""
    whose = {"run": run, "step": int(folder.name)}
    write_json(folder / VALIDATION, sealed({**whose, **validation}))


def read_validation(folder: Path, run: str | None) -> dict[str, Any] | None:
    """{"metrics", "thresholds", "score"} of a checkpoint's folder, None where it was not validated.

    run: identity of the checkpoint's run, None where it has none.
    Raises ConfigError for a file that is damaged, or belongs to another run or step.
    """
    file = folder / VALIDATION
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise _wrong(file, f"cannot be read ({error})") from error
    if (why := _what_is_wrong(found)) is not None:
        raise _wrong(file, why)
    if found.get("step", int(folder.name)) != int(folder.name) or found.get("run", run) != run:
        whose = f"step {found.get('step')} of run {found.get('run')}"
        raise _wrong(file, f"is of {whose}, expected step {folder.name} of run {run}")
    if is_whole(found) is False:
        raise _wrong(file, "was changed after it was written (its checksum differs)")
    return found


def _wrong(file: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{file} {why}: put it back, or remove it, then this step counts as not validated and every threshold is "
        "evaluation.threshold"
    )


def _what_is_wrong(found: Any) -> str | None:
    if not isinstance(found, dict):
        return (
            f"holds {type(found).__name__}, expected an object with metrics, thresholds and score"
        )
    for name, kind in (("metrics", "numbers"), ("thresholds", "scores from 0 to 1")):
        values = found.get(name)
        if not isinstance(values, dict):
            return f"holds no {name} (name: number)"
        for key, value in values.items():
            if not _is_number(value) or (name == "thresholds" and not 0 <= value <= 1):
                return f"holds {value!r} in {name} for {key!r}, expected {kind}"
    if not _is_number(found.get("score")) or not math.isfinite(found["score"]):
        return f"holds the score {found.get('score')!r}, expected a number"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
