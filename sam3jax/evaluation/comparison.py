"""What evaluation.json holds: one evaluation, or base against tuned on the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sam3jax.checksums import record_files
from sam3jax.data.coco import Dataset
from sam3jax.evaluation.diagnosis import diagnose
from sam3jax.evaluation.metrics import Evaluation
from sam3jax.evaluation.uncertainty import changes, intervals
from sam3jax.files import write_json
from sam3jax.viewing import draw
from sam3jax.viewing.shown import Shown

_SHOWN = 8  # pictures of a comparison


def write_evaluation(
    output: Path,
    dataset: Dataset,
    tuned: Evaluation,
    base: Evaluation | None = None,
    *,
    about: Mapping[str, Any],
    shown: Shown,
) -> dict[str, Any]:
    """Write evaluation.json, predictions and, with `base`, the comparison; returns the first.

    about: what goes on top of evaluation.json: run, step, weights. shown: which finds of the model `predict`
    would show; the base, which has no thresholds of its own, is drawn at the common one.
    """
    report = {**about, "shown": asdict(shown), **summary(tuned, dataset)}
    drawn = tuned.resample()
    report["uncertainty"] = intervals(drawn)
    if tuned.truth is not None:
        known = tuned.truth, dataset.categories, tuned.predictions
        report["diagnosis"] = diagnose(
            *known,
            {n: shown.thresholds.get(n, shown.threshold) for n in dataset.categories.values()},
        )
    write_json(output / "predictions.json", with_source_ids(tuned.predictions, dataset))
    if base is not None:
        report["base"] = summary(base, dataset)
        report["compare"] = compare(report["base"], report)
        report["compare"]["uncertainty"] = changes(base.resample(), drawn)
        write_json(output / "base_predictions.json", with_source_ids(base.predictions, dataset))
        chosen = report["compare"]["pictures"]
        draw_comparison(
            dataset, chosen, base.predictions, tuned.predictions, shown, output / "comparison"
        )  # fmt: skip
    write_json(output / "evaluation.json", report)
    written = ("evaluation.json", "predictions.json", "base_predictions.json")
    record_files(output, *(written if base is not None else written[:2]))
    return report


def with_source_ids(
    results: Sequence[Mapping[str, Any]], dataset: Dataset
) -> list[Mapping[str, Any]]:
    """COCO results; where the file's own ids were numbered, `source_ids` holds them beside the numbers."""
    kinds = {kind: found for kind, found in dataset.source_ids.items() if found}
    if not kinds:
        return list(results)

    def one(result: Mapping[str, Any]) -> Mapping[str, Any]:
        numbers = {kind: result[f"{kind}_id"] for kind in kinds}
        own = {kind: kinds[kind][n] for kind, n in numbers.items() if n in kinds[kind]}
        return {**result, "source_ids": own} if own else result

    return [one(result) for result in results]


def summary(evaluation: Evaluation, dataset: Dataset) -> dict[str, Any]:
    """What evaluation.json holds of one evaluation; pictures worst first."""
    files = {image.id: str(image.file) for image in dataset.images}
    pictures = sorted(evaluation.pictures.items(), key=lambda item: item[1])
    return {
        "data": dataset.name,
        "metrics": evaluation.metrics,
        "per_category": evaluation.per_category,
        "thresholds": evaluation.thresholds,
        "pictures": [{"id": i, "file": files[i], "F1": score} for i, score in pictures],
    }


def compare(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """Two summaries of the same data: tuned minus base, by metric, category and picture."""

    def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
        names = [n for n in after if isinstance(after[n], float) and n in before]
        return {name: after[name] - before[name] for name in names}

    rows = {row["category"]: row for row in base["per_category"]}
    scores = {picture["id"]: picture["F1"] for picture in base["pictures"]}
    pictures = [
        {**p, "base": scores[p["id"]], "difference": p["F1"] - scores[p["id"]]}
        for p in tuned["pictures"]
        if scores.get(p["id"], p["F1"]) != p["F1"]
    ]
    return {
        "metrics": difference(base["metrics"], tuned["metrics"]),
        "per_category": {
            row["category"]: difference(rows[row["category"]], row)
            for row in tuned["per_category"]
            if row["category"] in rows
        },
        "pictures": sorted(pictures, key=lambda p: -abs(p["difference"]))[:_SHOWN],
    }


def draw_comparison(
    dataset: Dataset,
    chosen: Sequence[Mapping[str, Any]],
    base: Sequence[Mapping[str, Any]],
    tuned: Sequence[Mapping[str, Any]],
    shown: Shown,
    folder: Path,
) -> None:
    """truth | base | tuned, of the pictures in `chosen`, as PNG; those of an earlier comparison go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9]_*.png"):
        old.unlink()
    records = {image.id: image for image in dataset.images}
    for number, picture in enumerate(chosen, start=1):
        record = records[picture["id"]]
        image = record.open()
        parts = [("truth", draw.true_instances(record, dataset.categories))]
        for name, results, score, seen in (
            ("base", base, picture["base"], replace(shown, thresholds={})),
            ("tuned", tuned, picture["F1"], shown),
        ):
            here = [r for r in results if r["image_id"] == record.id]
            found = draw.found_instances(here, dataset.categories, seen)
            parts.append((f"{name}: F1 {score:.2f}", found))
        sheet = draw.panels(image, parts, title=record.file.name)
        sheet.save(folder / f"{number:02}_{record.file.stem[:60]}.png")
