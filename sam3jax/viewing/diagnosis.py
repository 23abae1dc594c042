"""The parts of a report that say why: curves of phrases, calibration, confusions, labels worth a look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from sam3jax.data.coco import Dataset
from sam3jax.data.pictures import DataError
from sam3jax.viewing import draw
from sam3jax.viewing.charts import curves

_TOGETHER = 8  # lines of a chart
_CHARTS = 3  # of each kind
_SHOWN = 8  # labels of each kind
_ROWS = 12  # of the table of confusions

Table = Callable[[Sequence[str], Sequence[Sequence[Any]]], str]
Inline = Callable[[Sequence[draw.Instance], Any], str]


def phrases(found: Mapping[str, Any], table: Table) -> str:
    """Charts of precision against recall, of F1 and of calibration, and what is taken for what."""
    own = found.get("curves", {})
    parts = []
    names = list(own)[: _CHARTS * _TOGETHER]
    for start in range(0, len(names), _TOGETHER):
        group = names[start : start + _TOGETHER]
        lines = lambda x, y, group=group: {
            name: list(zip(own[name][x], own[name][y], strict=True)) for name in group
        }
        parts += [
            curves(lines("recall", "precision"), title="precision against recall", x="recall", shares=True),
            curves(lines("score", "F1"), title="F1 by threshold", x="threshold", shares=True),
        ]  # fmt: skip
    if bins := found.get("calibration", []):
        said = {
            "right": [(b["score"], b["right"]) for b in bins],
            "if scores were shares": [(0.0, 0.0), (1.0, 1.0)],
        }
        parts.append(curves(said, title="share of finds that are right", x="score", shares=True))
    charts = "".join(f'<figure class="chart">{svg}</figure>' for svg in parts)
    out = f'<div class="charts">{charts}</div>' if charts else ""
    if rows := found.get("confusion", [])[:_ROWS]:
        cells = [[row["asked"], row["is"], f"{row['count']:,}"] for row in rows]
        out += table(["found for", "is an instance of", "how often"], cells)
    return out


def labels(found: Mapping[str, Any], dataset: Dataset | None, inline: Inline) -> str:
    """Confident finds on nothing that is annotated, and instances that no find is on: pictures of the first."""
    if dataset is None:
        return ""
    records = {record.id: record for record in dataset.images}
    kinds = (
        ("unlabelled", "Found with confidence, and not annotated", "a label that is missing, or a false find"),
        ("missed", "Annotated, and not found", "a label that is wrong, or a hard instance"),
    )  # fmt: skip
    out = []
    for key, title, meaning in kinds:
        shown: list[str] = []
        seen = set()
        for row in found.get(key, []):
            record = records.get(row["image_id"])
            if record is None or len(shown) == _SHOWN:
                continue
            # The next frame of a video shows the same again.
            video = getattr(record, "video", None)
            if video is not None and (video, row["category"]) in seen:
                continue
            seen.add((video, row["category"]))
            score = row["score"] if key == "unlabelled" else None
            x, y, w, h = row["bbox"]
            instance = draw.Instance(row["category"], (x, y, x + w, y + h), None, score)
            try:
                picture = inline([instance], record.open())
            except DataError:
                continue
            sure = "" if score is None else f" {score:.2f}"
            caption = f"{record.file.name} (id {record.id}): {row['category']}{sure}"
            shown.append(
                f'<figure><img loading="lazy" alt="{escape(row["category"])}" src="{picture}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
        if shown:
            number = len(found[key])
            out.append(
                f"<h3>{escape(title)}</h3>"
                f'<p class="note">Either {escape(meaning)}. {number} are listed in evaluation.json.</p>'
                f'<div class="parts">{"".join(shown)}</div>'
            )
    return Markup("".join(out))


def certainty(evaluation: Mapping[str, Any]) -> str:
    """How far the mean F1 of pictures could be off, had other pictures been drawn."""
    tuned = {p["id"]: p["F1"] for p in evaluation.get("pictures", ())}
    base = {p["id"]: p["F1"] for p in evaluation.get("base", {}).get("pictures", ())}
    if len(tuned) < 2:
        return ""
    low, high = interval(list(tuned.values()))
    mean = np.mean(list(tuned.values()))
    text = (
        f"F1 of a picture, mean of {len(tuned):,}: {mean:.3f} (95 % of resampled sets: {low:.3f} to "
        f"{high:.3f})"
    )
    change = [tuned[i] - base[i] for i in tuned if i in base]
    if len(change) > 1:
        low, high = interval(change)
        sure = "" if low > 0 or high < 0 else "; it may be chance"
        text += (
            f". Change against the base: {np.mean(change):+.3f} ({low:+.3f} to {high:+.3f}{sure})"
        )
    return f"{text}."


def interval(values: Sequence[float], draws: int = 1000) -> tuple[float, float]:
    """The middle 95 % of the means of sets drawn from these values with replacement (bootstrap).

    Of more than 5,000 values the normal limit, which says the same.
    """
    known = np.asarray(values, float)
    if len(known) > 5000:
        spread = 1.96 * float(known.std()) / len(known) ** 0.5
        return float(known.mean()) - spread, float(known.mean()) + spread
    rng = np.random.default_rng(0)
    means = known[rng.integers(0, len(known), (draws, len(known)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
