"""The part of a report that is about clicks: curves by click, calibration, the worst objects, panels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import escape
from PIL import Image

from sam3jax.viewing.charts import curves
from sam3jax.viewing.run_files import read_json

_WORST = 10  # objects in the table
_PANELS = 4

Table = Callable[[Sequence[str], Sequence[Sequence[Any]]], str]


def clicks(
    folder: Path, evaluation: Mapping[str, Any], table: Table, jpeg: Callable[[Image.Image], str]
) -> str:
    """What clicks.json, evaluation.json and the newest panels of a run say; "" where it is no run of clicks."""
    if "mIoU_by_click" not in evaluation:
        return ""
    charts = "".join(f'<figure class="chart">{svg}</figure>' for svg in _charts(evaluation))
    panels = "".join(_panels(folder, jpeg))
    shown = f'<h3>After each click</h3><div class="wide panels">{panels}</div>' if panels else ""
    return f'<div class="charts">{charts}</div>{shown}{_worst(folder, table)}'


def _charts(evaluation: Mapping[str, Any]) -> list[str]:
    both = {"base": evaluation.get("base", {}), evaluation.get("weights", "tuned"): evaluation}
    by_click = {
        name: list(enumerate(found["mIoU_by_click"], 1))
        for name, found in both.items()
        if found.get("mIoU_by_click")
    }
    said = {
        name: [(row["predicted"], row["true"]) for row in found["calibration"]]
        for name, found in both.items()
        if found.get("calibration")
    }
    said["if it were right"] = [(0.0, 0.0), (1.0, 1.0)]
    return [
        curves(by_click, title="mean IoU by click", x="clicks"),
        curves(said, title="true IoU by predicted IoU", x="predicted", shares=True),
    ]


def _panels(folder: Path, jpeg: Callable[[Image.Image], str]) -> list[str]:
    steps = sorted(p for p in folder.glob("predictions/*") if p.is_dir())
    files = sorted(steps[-1].glob("*.png"), key=lambda f: (len(f.stem), f.stem)) if steps else []
    out = []
    for file in files[:_PANELS]:
        with Image.open(file) as image:
            alt = f"panel {file.stem}"
            out.append(
                f'<figure><img loading="lazy" alt="{escape(alt)}" src="{jpeg(image)}"></figure>'
            )
    return out


def _worst(folder: Path, table: Table) -> str:
    """Objects whose last mask is worst: hard ones, or wrong annotations."""
    found = [o for o in read_json(folder / "clicks.json", []) if "click" in o]
    found = sorted(found, key=lambda o: _last(o["ious"]))[:_WORST]
    if not found:
        return ""
    count, compared = len(found[0]["ious"]), "base_ious" in found[0]
    head = ["picture", "first click", "IoU at 1", f"at {count}", *(["base"] if compared else [])]
    rows = [
        [
            Path(o["file"]).name, "{:.0f}, {:.0f}".format(*o["click"]), f"{o['ious'][0]:.2f}", f"{_last(o['ious']):.2f}",
            *([f"{_last(o['base_ious']):.2f}"] if compared else []),
        ]
        for o in found
    ]  # fmt: skip
    note = '<p class="note">Hard objects, or annotations that are wrong. clicks.json has all of them.</p>'
    return f"<h3>Worst after the last click</h3>{note}{table(head, rows)}"


def _last(ious: Sequence[float]) -> float:
    return ious[-1] if ious and math.isfinite(ious[-1]) else 0.0
