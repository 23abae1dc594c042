"""Evaluation: `python -m sam3jax.evaluate --run RUN`, and the same as a function for the trainer.

The command writes into the run folder (or --output)

    evaluation.json    metrics, per-category table, thresholds, score of each picture; with --compare
                       those of the base model and the differences, with --probe a second data set
    predictions.json   COCO results (base_predictions.json beside it with --compare)
    comparison/        with --compare: panels of the pictures where base and tuned differ most

of a run of clicks evaluation.json, clicks.json (a record of each object) and clicks/ (panels).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("evaluate"))

import jax

from sam3jax.checksums import record_files
from sam3jax.config import Config, with_settings
from sam3jax.data.coco import Dataset
from sam3jax.data.datasets import open_dataset, open_datasets
from sam3jax.data.pictures import DataError
from sam3jax.data.video_sets import names_videos, pictures_of, videos_named
from sam3jax.data.videos import VideoDataset
from sam3jax.errors import exit_status, plain
from sam3jax.evaluate_clicks import evaluate_clicks, output_folder
from sam3jax.evaluation.ask import detections_to_keep, evaluate_run
from sam3jax.evaluation.comparison import compare, summary, write_evaluation
from sam3jax.evaluation.metrics import Evaluation
from sam3jax.evaluation.steadiness import steadiness_of
from sam3jax.evaluation.tracks import evaluate_tracks
from sam3jax.files import write_json
from sam3jax.inference.detector import Detector
from sam3jax.options import parse
from sam3jax.training.mesh import local_mesh
from sam3jax.training.peers import joined_as
from sam3jax.video.predictor import VideoPredictor
from sam3jax.viewing.shown import Shown
from sam3jax.weights.run_folder import Run, read_run

COMMANDS = {"clicks": evaluate_clicks}  # of tasks that are not about phrases
_WORSE = 0.05  # of AP50: more than luck


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit status."""
    options = parse("evaluate", arguments)
    return exit_status(lambda: _joined(options))


def _joined(options: argparse.Namespace) -> None:
    with joined_as(options):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    run = read_run(options.run)
    run = replace(
        run, config=with_settings(run.config, options.overrides, ("evaluation", "data", "clicks"))
    )
    COMMANDS.get(run.config.task, _evaluate_phrases)(run, options)


def _evaluate_phrases(run: Run, options: argparse.Namespace) -> None:
    if options.clicks is not None:
        raise DataError(
            f"--clicks is for runs of clicks, and {run.path} is one of phrases: leave it out"
        )
    videos = None
    if names_videos(run.config, options.data):
        videos = videos_named(run.config, options.data, options.split)
        dataset = pictures_of(videos)
    else:
        dataset = _dataset(run.config, options.data, options.split)
    report = evaluate_command(run, dataset, options, videos)
    if report is not None:
        _print(report)


def evaluate_command(
    run: Run, dataset: Dataset, options: argparse.Namespace, videos: VideoDataset | None = None
) -> dict[str, Any] | None:
    """Evaluate as the options say and write the files; returns what evaluation.json holds.

    Of several processes the first one writes, and the others return None. videos: those whose frames `dataset` is; their tracks are measured too.
    """
    output = output_folder(run, options.output)
    probe = _probe(run.config, options.probe, options.probe_split) if options.probe else None
    config = run.config.evaluation
    keep = max(detections_to_keep(d, config) for d in (dataset, probe or dataset))
    ask = partial(evaluate_run, run, Detector(run.model, config, local_mesh(), limit=keep))

    def whole(base: bool) -> Evaluation:
        found = ask(dataset, base=base)
        if videos is None:
            return found
        steady = {"video/steadiness": steadiness_of(dataset.images, found.predictions)}
        return replace(found, metrics={**found.metrics, **steady, **_tracks(run, videos, base)})

    found = whole(options.base)
    before = whole(True) if options.compare else None
    also = [ask(probe, base=base) for base in (True, False)] if probe is not None else []
    if jax.process_index():
        return None
    about = {
        "run": str(run.path),
        "step": run.step,
        "weights": "base" if options.base else "tuned",
    }
    shown = Shown.by(config, None if options.base else run.thresholds)
    report = write_evaluation(output, dataset, found, before, about=about, shown=shown)
    if probe is not None:
        before, after = (summary(found, probe) for found in also)
        report["probe"] = {**after, "base": before, "compare": compare(before, after)}
        write_json(output / "evaluation.json", report)
        record_files(output, "evaluation.json")
    return report


def _tracks(run: Run, videos: VideoDataset, base: bool) -> dict[str, float]:
    """As `predict` finds them: the tuned model with the thresholds of its phrases."""
    thresholds = {} if base else run.thresholds
    predictor = VideoPredictor(
        run.model, run.asked(base), run.tokenizer, run.config.evaluation, thresholds
    )
    return evaluate_tracks(predictor, videos)


def _dataset(config: Config, data: str | None, split: str | None) -> Dataset:
    """What the options name; by default the run's own validation data."""
    own = config.data
    if data is not None:
        return open_dataset(config, data, split or own.valid_split)
    if split not in (None, own.valid_split):
        return open_dataset(config, own.train or "", split or own.train_split)
    dataset = open_datasets(config)[1]
    if dataset is None:
        raise DataError("the run has no validation data: give --data, or --split train")
    return dataset


def _probe(config: Config, path: str, split: str) -> Dataset:
    """A second data set; of videos their annotated frames."""
    if names_videos(config, path):
        return pictures_of(videos_named(config, path, split))
    return open_dataset(config, path, split)


def _print(report: Mapping[str, Any]) -> None:
    print(f"{report['weights']} (step {report['step']}) on {report['data']}")
    _print_metrics(report)
    if "compare" in report:
        if report["compare"]["pictures"]:
            print("pictures where base and tuned differ most (F1):")
        for p in report["compare"]["pictures"]:
            print(f"  {p['base']:.3f} -> {p['F1']:.3f}  {plain(p['file'])}")
    if probe := report.get("probe"):
        print(f"\nprobe: {probe['data']}")
        _print_metrics(probe)
        change = min(probe["compare"]["metrics"].get(f"{k}/AP50", 0.0) for k in ("bbox", "segm"))
        worse = f", worse than the base by more than {_WORSE}" if change < -_WORSE else ""
        print(f"probe AP50 {change:+.3f}{worse}")


def _print_metrics(report: Mapping[str, Any]) -> None:
    before = report.get("base", {}).get("metrics", {})
    for name, value in report["metrics"].items():
        change = f"  base {before[name]:.4f}  {value - before[name]:+.4f}" if name in before else ""
        print(f"  {name:<20} {value:.4f}{change}")
    rows = {row["category"]: row for row in report.get("base", {}).get("per_category", ())}
    kind = "segm" if "segm/AP" in report["metrics"] else "bbox"
    print(f"  {'category':<24} {'n':>5} {'AP':>6} {'AP50':>6} {'F1':>6} {'false':>6} {'cut':>5}")
    for row in report["per_category"]:
        cells = [row.get(n) for n in (f"{kind}/AP", f"{kind}/AP50", "F1", "false_alarms")]
        text = " ".join("     -" if c is None else f"{c:6.3f}" for c in cells)
        old = rows.get(row["category"], {}).get(f"{kind}/AP")
        change = f"  base AP {old:.3f}" if old is not None else ""
        line = f"  {plain(row['category'])[:24]:<24} {row['instances']:>5} {text}"
        print(f"{line} {row['best_threshold']:5.2f}{change}")
