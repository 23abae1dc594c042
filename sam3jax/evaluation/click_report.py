"""What evaluation.json holds of clicks: one evaluation, or base against tuned on the same objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam3jax.checksums import record_files
from sam3jax.data.records import Dataset
from sam3jax.evaluation import uncertainty
from sam3jax.evaluation.click_ask import ClickEvaluation
from sam3jax.evaluation.click_metrics import scores_of
from sam3jax.files import write_json


def write_click_evaluation(
    output: Path,
    dataset: Dataset,
    tuned: ClickEvaluation,
    base: ClickEvaluation | None = None,
    *,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write evaluation.json and clicks.json (one record an object; `click`: pixel of the first); returns the first.

    about: what goes on top of evaluation.json: run, step, weights.
    """
    report = {**about, "data": dataset.name, **_summary(tuned)}
    objects = [_named(record, dataset) for record in tuned.objects]
    if base is not None:
        report["base"] = _summary(base)
        before, after = base.metrics, tuned.metrics
        changes = {k: v - before[k] for k, v in after.items() if k in before}
        moved = uncertainty.changes(_drawn_again(base), _drawn_again(tuned))
        report["compare"] = {"metrics": changes, "uncertainty": moved}
        for record, old in zip(objects, base.objects, strict=True):
            record["base_ious"] = old["ious"]
    write_json(output / "evaluation.json", report)
    write_json(output / "clicks.json", objects)
    record_files(output, "evaluation.json", "clicks.json")
    return report


def _summary(found: ClickEvaluation) -> dict[str, Any]:
    names = ("predicted", "true", "masks")
    rows = [dict(zip(names, row, strict=True)) for row in found.calibration]
    return {
        "metrics": found.metrics, "mIoU_by_click": found.curve, "calibration": rows,
        "uncertainty": uncertainty.intervals(_drawn_again(found)),
        "measured": {"objects": len(found.objects), "pictures": len({r["image_id"] for r in found.objects})},
    }  # fmt: skip


def _drawn_again(found: ClickEvaluation) -> dict[str, np.ndarray]:
    pictures = [record["image_id"] for record in found.objects]
    return uncertainty.means(scores_of(found.objects).of_objects(), pictures)


def _named(record: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    picture = dataset.images[record["image_id"]]
    x, y = record["click"]
    first = [round(x * picture.width - 0.5, 1), round(y * picture.height - 0.5, 1)]
    return {**record, "image_id": picture.id, "file": str(picture.file), "click": first}


def print_clicks(file: Path) -> dict[str, Any]:
    """evaluation.json for a terminal, and as it is."""
    report = json.loads(file.read_text())
    print(f"{report['weights']} (step {report['step']}) on {report['data']}")
    before = report.get("base", {}).get("metrics", {})
    for name, value in report["metrics"].items():
        if name.endswith("/objects"):
            print(f"  {name:<28} {value:.0f}")
            continue
        change = f"  base {before[name]:.4f}  {value - before[name]:+.4f}" if name in before else ""
        print(f"  {name:<28} {value:.4f}{change}")
    print(f"  {'predicted IoU':>14} {'true':>6} {'masks':>6}")
    for row in report["calibration"]:
        print(f"  {row['predicted']:14.3f} {row['true']:6.3f} {row['masks']:6}")
    return report
