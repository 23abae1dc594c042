"""summary.json: what a run came to. With the report behind it, it says that the run is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sam3jax.checksums import changed, record_files
from sam3jax.config import Config
from sam3jax.files import write_json
from sam3jax.viewing.report import write_report

FILES = ("summary.json", "metrics.jsonl", "report.html")  # written last


def finish(run: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, then report.html, which shows it."""
    write_json(run / "summary.json", summary)
    record_files(run, "summary.json", "metrics.jsonl")
    write_report(run)


def finished(run: Path, step: int, config: Config, *, say: bool) -> dict[str, Any] | None:
    """The summary of a run that ended at its newest checkpoint, of `step`; None where it has more to do.

    It ended where all steps are done, or where it was given up for want of improvement. say: so to people.
    """
    summary, report = run / "summary.json", run / "report.html"
    try:
        if report.stat().st_mtime_ns < summary.stat().st_mtime_ns:
            return None
        found = json.loads(summary.read_text())
        given_up = bool(config.patience) and found.get("stopped_early") and found["steps"] == step
        ended = given_up or (step >= config.steps and found["steps"] >= config.steps)
        if not ended or changed(run, FILES):
            return None
        if say:
            more = "set `patience` to 0" if found.get("stopped_early") else "raise `steps`"
            print(f"{run} is finished: {step} of {config.steps} steps; {more} to train on")
        return found
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # not there, or not whole: it is written again
        return None
