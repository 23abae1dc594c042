"""Evaluation: `python -m sam3jax.evaluate --run RUN`, and the same as a function for the trainer.

The command writes into the run folder (or --output)

    evaluation.json    metrics, per-category table, thresholds, score of each picture; with --compare
                       those of the base model and the differences, with --probe a second data set
    predictions.json   COCO results (base_predictions.json beside it with --compare)
    thresholds.json    category -> score threshold, chosen on the run's own validation data only
    comparison/        with --compare: panels of the pictures where base and tuned differ most
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("evaluate"))

import jax
import numpy as np

from sam3jax.config import EvalConfig
from sam3jax.data.coco import Dataset
from sam3jax.data.datasets import open_dataset, open_datasets
from sam3jax.data.loader import EvalBatch, make_eval_loader
from sam3jax.data.pictures import DataError
from sam3jax.data.prompts import tokenize, vocabulary
from sam3jax.errors import exit_status
from sam3jax.evaluation.comparison import compare, summary, write_evaluation
from sam3jax.evaluation.metrics import Evaluation, Pair, measure
from sam3jax.files import make_folder, write_json
from sam3jax.inference.detector import (
    BatchDetector,
    Detector,
    LoadedRun,
    Variables,
    open_run,
    write_thresholds,
)
from sam3jax.inference.postprocess import Candidates, full_size
from sam3jax.options import parse

__all__ = ["Detector", "Evaluation", "detections_to_keep", "evaluate_dataset", "predict_dataset"]

_WORSE = 0.05  # of AP50: more than luck


def evaluate_dataset(
    detector: Detector,
    variables: Variables,
    loader: Iterable[EvalBatch],
    dataset: Dataset,
    config: EvalConfig,
    *,
    batches: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Ask a model every question of the loader and measure its answers against the data set.

    detector: `Detector(model, config, limit=detections_to_keep(dataset, config))`, made once.
    batches: look at no more than these; only what was asked is counted. thresholds: score of each
    category from which a detection counts, instead of config.threshold. advance: called per batch.
    """
    predictions: list[dict[str, Any]] = []
    asked: set[Pair] = set()
    for pairs, found in predict_dataset(detector, variables, loader, dataset, config, batches):
        asked |= pairs
        predictions += found
        advance()
    asked, predictions = _of_all_processes(asked, predictions)
    return measure(
        dataset, predictions, threshold=config.threshold, thresholds=thresholds, asked=asked
    )


def predict_dataset(
    detector: Detector,
    variables: Variables,
    loader: Iterable[EvalBatch],
    dataset: Dataset,
    config: EvalConfig,
    batches: int | None = None,
) -> Iterator[tuple[set[Pair], list[dict[str, Any]]]]:
    """For each batch what was asked, and the COCO results at the pictures' own size.

    The device works on the next batch while this one's masks are enlarged.
    """
    run = BatchDetector(detector, variables)
    waiting: tuple[EvalBatch, Candidates] | None = None
    for number, batch in enumerate(loader):
        if batches is not None and number >= batches:
            break
        running = (batch, run(batch.batch))
        if waiting is not None:
            yield _results(*waiting, dataset, config)
        waiting = running
    if waiting is not None:
        yield _results(*waiting, dataset, config)


def detections_to_keep(dataset: Dataset, config: EvalConfig) -> int:
    """Detections per picture and phrase: config.max_detections, or more where the data have more."""
    most = 0
    for image in dataset.images:
        categories = [a.category_id for a in image.annotations if not a.iscrowd]
        most = max(most, *(categories.count(i) for i in set(categories)), 0)
    return max(most, config.max_detections)


def _results(
    batch: EvalBatch, candidates: Candidates, dataset: Dataset, config: EvalConfig
) -> tuple[set[Pair], list[dict[str, Any]]]:
    candidates = jax.device_get(candidates)
    prompts = batch.category_ids.shape[1]
    rows, columns = np.nonzero(batch.batch.prompts.valid & batch.batch.image_valid[:, None])
    asked, results = set(), []
    for row, column in zip(rows.tolist(), columns.tolist()):
        image = dataset.images[batch.batch.image_id[row]]
        category = int(batch.category_ids[row, column])
        found = full_size(
            candidates,
            row * prompts + column,
            image.height,
            image.width,
            floor=config.score_floor,
            mask_threshold=config.mask_threshold,
        )
        asked.add((image.id, category))
        results += found.to_coco(image.id, category)
    return asked, results


def _of_all_processes(
    asked: set[Pair], predictions: list[dict[str, Any]]
) -> tuple[set[Pair], list[dict[str, Any]]]:
    """Every process asks about its own pictures; afterwards each knows all answers."""
    if jax.process_count() == 1:
        return asked, predictions
    from jax.experimental import multihost_utils

    own = np.frombuffer(json.dumps([sorted(asked, key=str), predictions]).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(own.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: own.size] = own
    parts = multihost_utils.process_allgather(padded)  # [processes, bytes]
    asked, predictions = set(), []
    for part, size in zip(parts, sizes.tolist(), strict=True):
        pairs, results = json.loads(part[:size].tobytes())
        asked |= {(image, category) for image, category in pairs}
        predictions += results
    return asked, predictions


def evaluate_run(
    run: LoadedRun, dataset: Dataset, *, base: bool = False, detector: Detector | None = None
) -> Evaluation:
    """A run's tuned weights, or those it started from, on a data set. Raises DataError.

    detector: shared between calls, so that the model is compiled once.
    """
    config = run.config
    phrases = vocabulary(config.data, dataset)
    tokens = tokenize(phrases, run.tokenizer)
    loader = make_eval_loader(dataset, phrases, tokens, config, targets=False)
    if detector is None:
        keep = detections_to_keep(dataset, config.evaluation)
        detector = Detector(run.model, config.evaluation, limit=keep)
    variables = run.base_variables if base else run.variables
    with _progress(f"{'base' if base else 'tuned'} on {dataset.name}", len(loader)) as advance:
        return evaluate_dataset(
            detector, variables, loader, dataset, config.evaluation, advance=advance
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit status."""
    options = parse("evaluate", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    run = open_run(options.run)
    dataset, own = _dataset(run, options.data, options.split)
    _print(evaluate_command(run, dataset, options, own_validation=own))


def evaluate_command(
    run: LoadedRun, dataset: Dataset, options: argparse.Namespace, *, own_validation: bool
) -> dict[str, Any]:
    """Evaluate as the options say and write the files; returns what evaluation.json holds."""
    output = make_folder(options.output or run.path)
    probe = open_dataset(run.config, options.probe, options.probe_split) if options.probe else None
    config = run.config.evaluation
    keep = max(detections_to_keep(d, config) for d in (dataset, probe or dataset))
    ask = partial(evaluate_run, run, detector=Detector(run.model, config, limit=keep))
    found = ask(dataset, base=options.base)
    before = ask(dataset, base=True) if options.compare else None
    about = {
        "run": str(run.path),
        "step": run.step,
        "weights": "base" if options.base else "tuned",
        "threshold": config.threshold,
    }
    report = write_evaluation(output, dataset, found, before, about=about)
    if probe is not None:
        before, after = (summary(ask(probe, base=base), probe) for base in (True, False))
        report["probe"] = {**after, "base": before, "compare": compare(before, after)}
        write_json(output / "evaluation.json", report)
    if own_validation and not options.base:
        write_thresholds(output, found.thresholds)
    return report


def _dataset(run: LoadedRun, data: str | None, split: str | None) -> tuple[Dataset, bool]:
    """The data set, and whether it is the run's own validation data."""
    own = run.config.data
    if data is not None:
        return open_dataset(run.config, data, split or own.valid_split), False
    if split in (None, own.valid_split):
        dataset = open_datasets(run.config)[1]
        if dataset is None:
            raise DataError("the run has no validation data: give --data, or --split train")
        return dataset, True
    return open_dataset(run.config, own.train, split), False


def _print(report: Mapping[str, Any]) -> None:
    print(f"{report['weights']} (step {report['step']}) on {report['data']}")
    _print_metrics(report)
    if "compare" in report:
        if report["compare"]["pictures"]:
            print("pictures where base and tuned differ most (F1):")
        for p in report["compare"]["pictures"]:
            print(f"  {p['base']:.3f} -> {p['F1']:.3f}  {p['file']}")
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
        line = f"  {row['category'][:24]:<24} {row['instances']:>5} {text}"
        print(f"{line} {row['best_threshold']:5.2f}{change}")


class _progress:
    """A progress bar on stderr that stays away from logs."""

    def __init__(self, title: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> Callable[[], None]:
        self._bar.start()
        return lambda: self._bar.advance(self._task)

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
