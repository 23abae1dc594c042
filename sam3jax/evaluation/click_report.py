"""What evaluation.json holds of clicks: one evaluation, or base against tuned on the same objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3jax.data.records import Dataset
from sam3jax.evaluation.click_ask import ClickEvaluation
from sam3jax.files import write_json


def write_click_evaluation(
    output: Path,
    dataset: Dataset,
    tuned: ClickEvaluation,
    base: ClickEvaluation | None = None,
    *,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write evaluation.json and clicks.json (one record an object); returns the first.

    about: what goes on top of evaluation.json: run, step, weights.
    """
    report = {**about, "data": dataset.name, **_summary(tuned)}
    objects = [_named(record, dataset) for record in tuned.objects]
    if base is not None:
        report["base"] = _summary(base)
        before, after = base.metrics, tuned.metrics
        changes = {k: v - before[k] for k, v in after.items() if k in before}
        report["compare"] = {"metrics": changes}
        for record, old in zip(objects, base.objects, strict=True):
            record["base_ious"] = old["ious"]
    write_json(output / "evaluation.json", report)
    write_json(output / "clicks.json", objects)
    return report


def _summary(found: ClickEvaluation) -> dict[str, Any]:
    names = ("predicted", "true", "masks")
    rows = [dict(zip(names, row, strict=True)) for row in found.calibration]
    return {"metrics": found.metrics, "mIoU_by_click": found.curve, "calibration": rows}


def _named(record: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    picture = dataset.images[record["image_id"]]
    return {**record, "image_id": picture.id, "file": str(picture.file)}
