"""The half of `evaluate` for runs of the task clicks: every object, click by click."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax

from sam3jax.config import Config
from sam3jax.data.click_loader import with_objects
from sam3jax.data.ledger import DataError
from sam3jax.data.records import Dataset
from sam3jax.data.video_sets import pictures_named, read_pictures
from sam3jax.evaluation.click_report import print_clicks
from sam3jax.evaluation.progress import progress
from sam3jax.files import FileError, make_folder
from sam3jax.tasks.clicks import Clicks, ClicksData
from sam3jax.training.mesh import backend_of, local_mesh, put_replicated
from sam3jax.weights.base import is_run_folder
from sam3jax.weights.run_folder import Run


def output_folder(run: Run, output: str | None) -> Path:
    """Where results go, refused before minutes are spent: FileError where nothing can be written, or for
    another run's folder, whose own evaluation would be replaced."""
    folder = Path(output or run.path)
    if is_run_folder(folder) and folder.resolve() != run.path.resolve():
        raise FileError(f"{output} is another run's folder: give another --output")
    return make_folder(folder)


def evaluate_clicks(run: Run, options: argparse.Namespace) -> dict[str, Any] | None:
    """Evaluate as the options say, write evaluation.json, clicks.json and panels; returns the first.

    Of several processes the first one writes, and the others return None. Raises DataError.
    """
    if options.probe is not None:
        raise DataError("--probe is for runs on phrases: give the second data set to --data")
    config = _whole(run.config, options.clicks)
    dataset = _dataset(config, options.data, options.split)
    output = output_folder(run, options.output)
    mesh = local_mesh()
    task = Clicks(config, backend_of(mesh))
    process = dict(process_index=jax.process_index(), process_count=jax.process_count())
    validate = task.validation(ClicksData(dataset, dataset), mesh, **process)
    assert validate is not None

    def ask(base: bool):
        _, kept = task.prepare({}, dict(run.asked(base)), ClicksData(dataset, dataset))
        with progress(f"{'base' if base else 'tuned'} on {dataset.name}") as advance:
            return validate(put_replicated(kept, mesh), None, advance)

    found = ask(options.base)
    before = ask(True) if options.compare else None
    if jax.process_index():
        return None
    which = "base" if options.base else "tuned"
    found.write(output, before, {"run": str(run.path), "step": run.step, "weights": which})
    for name, panel in found.panels():
        panel.save(make_folder(output / "clicks") / f"{name}.png")
    return print_clicks(output / "evaluation.json")


def _whole(config: Config, clicks: int | None) -> Config:
    """All batches, and as many clicks as asked for."""
    budget = config.clicks.valid_clicks if clicks is None else clicks
    return config.model_copy(
        update={
            "evaluation": config.evaluation.model_copy(update={"batches": None}),
            "clicks": config.clicks.model_copy(update={"valid_clicks": budget}),
        }
    )


def _dataset(config: Config, data: str | None, split: str | None) -> Dataset:
    """What the options name; by default the run's own validation data."""
    own = config.data
    if data is not None:
        return with_objects(pictures_named(config, data, split or own.valid_split))
    if split not in (None, own.valid_split):
        return with_objects(pictures_named(config, own.train or "", split or own.train_split))
    dataset = read_pictures(config)[1]
    if dataset is None:
        raise DataError("the run has no validation data: give --data, or --split train")
    return with_objects(dataset)
