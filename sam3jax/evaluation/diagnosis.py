"""Why a score is what it is: curves of each phrase, calibration, confusions, and labels worth a look.

All of it follows from the truth and the predictions; everything is plain numbers that fit into JSON.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam3jax.evaluation.ground_truth import (
    Pair,
    Results,
    Truth,
    by_pair,
    overlaps,
    result_region,
    right_finds,
)

_SAME = 0.5  # IoU from which a detection is an instance
_APART = 0.1  # IoU below which a detection is on nothing that is annotated
_POINTS = 60  # of a curve
_BINS = 10  # of the calibration
_LISTED = 50  # labels, confusions
_NAMED = 5  # pictures of a confusion


def diagnose(
    truth: Truth,
    names: Mapping[int, str],
    predictions: Sequence[Mapping[str, Any]],
    thresholds: Mapping[str, float],
) -> dict[str, Any]:
    """What evaluation.json holds under `diagnosis`. truth: what was asked; names: category -> phrase;
    thresholds: phrase -> score; others count from .5.

    curves: phrase -> score, precision, recall and F1 at falling thresholds. calibration: detections by
    score, and the share of them that is right. confusion: how often what was found for one phrase is an
    instance of another. unlabelled: confident finds on nothing that is annotated, surest first. missed:
    instances by the score of the best find on them, lowest first.
    """
    kind = truth.kinds[-1]
    grouped = by_pair(predictions)
    ranked: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    totals: Counter[int] = Counter()
    unlabelled, missed = [], []
    for pair in truth.pairs:
        category, results = pair[1], sorted(grouped[pair], key=lambda r: -r["score"])
        instances, lenient, _ = truth.regions(pair, kind)
        totals[category] += len(instances)
        regions = [result_region(r, kind) for r in results]
        iou = overlaps(regions, instances, crowd=False)
        excused = overlaps(regions, lenient, crowd=True).max(axis=1, initial=0.0) >= _SAME
        right = right_finds(iou)
        ranked[category] += [
            (r["score"], bool(ok)) for r, ok, skip in zip(results, right, excused) if ok or not skip
        ]
        cut = thresholds.get(names[category], 0.5)
        alone = iou.max(axis=1, initial=0.0) < _APART
        unlabelled += [
            _find(pair, r) for r, lone, skip in zip(results, alone, excused)
            if lone and not skip and r["score"] >= cut
        ]  # fmt: skip
        best = np.array([r["score"] for r in results])[:, None] * (iou >= _SAME)
        for k, score in enumerate(best.max(axis=0, initial=0.0).tolist()):
            missed.append({"pair": pair, "region": instances[k], "score": score, "cut": cut})
    lost = sorted((m for m in missed if m["score"] < m["cut"]), key=lambda m: m["score"])[:_LISTED]
    return {
        "curves": {names[i]: _curve(ranked[i], totals[i]) for i in truth.categories if ranked[i]},
        "calibration": _calibration([d for own in ranked.values() for d in own]),
        "confusion": _confusion(truth, grouped, kind, names, thresholds),
        "unlabelled": _named(
            sorted(unlabelled, key=lambda u: -u["score"])[:_LISTED], names
        ),
        "missed": _named(
            [
                {"image_id": m["pair"][0], "category_id": m["pair"][1], "score": m["score"], "bbox": _box(m["region"])}
                for m in lost
            ],
            names,
        ),
    }  # fmt: skip


def _curve(ranked: Sequence[tuple[float, bool]], truths: int) -> dict[str, list[float]]:
    """score, precision, recall, F1 at at most _POINTS thresholds."""
    score, right = (np.array(column) for column in zip(*sorted(ranked, reverse=True)))
    found, hits = np.arange(1, len(score) + 1), np.cumsum(right)
    last = np.append(score[1:] != score[:-1], True)  # equal scores cannot be told apart
    kept = np.flatnonzero(last)
    if len(kept) > _POINTS:
        kept = kept[np.unique(np.linspace(0, len(kept) - 1, _POINTS).round().astype(int))]
    columns = {
        "score": score[kept], "precision": hits[kept] / found[kept],
        "recall": hits[kept] / max(truths, 1), "F1": 2 * hits[kept] / (found[kept] + truths),
    }  # fmt: skip
    return {name: np.round(values, 4).tolist() for name, values in columns.items()}


def _calibration(ranked: Sequence[tuple[float, bool]]) -> list[dict[str, float]]:
    """Of each tenth of the scores: their mean, the share that is right, the number."""
    out = []
    for low in np.arange(_BINS) / _BINS:
        here = [(s, ok) for s, ok in ranked if low <= s < low + 1 / _BINS or (s == 1 and low > 0.8)]
        if here:
            score, right = (float(np.mean(column)) for column in zip(*here))
            out.append({"score": round(score, 4), "right": round(right, 4), "n": len(here)})
    return out


def _confusion(
    truth: Truth,
    grouped: Mapping[Pair, Results],
    kind: Any,
    names: Mapping[int, str],
    thresholds: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Finds of one phrase that are an instance of another and none of their own, most frequent first."""
    pictures: dict[tuple[int, int], list[Any]] = defaultdict(list)
    regions: dict[Any, dict[int, list]] = defaultdict(dict)
    for pair in truth.pairs:
        instances, _, _ = truth.regions(pair, kind)
        if instances:
            regions[pair[0]][pair[1]] = instances
    for image, there in regions.items():
        for category in truth.categories:
            cut = thresholds.get(names[category], 0.5)
            found = [r for r in grouped.get((image, category), ()) if r["score"] >= cut]
            if not found or set(there) == {category}:
                continue
            drawn = [result_region(r, kind) for r in found]
            own = overlaps(drawn, there.get(category, []), crowd=False).max(axis=1, initial=0.0)
            for other, instances in there.items():
                if other != category:
                    best = overlaps(drawn, instances, crowd=False).max(axis=1, initial=0.0)
                    wrong = int(((best >= _SAME) & (own < _SAME)).sum())
                    pictures[category, other] += [image] * wrong
    rows = [
        {"asked": names[a], "is": names[b], "count": len(images), "images": list(dict.fromkeys(images))[:_NAMED]}
        for (a, b), images in pictures.items()
        if images
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["count"])[:_LISTED]


def _find(pair: Pair, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image_id": pair[0],
        "category_id": pair[1],
        "score": float(result["score"]),
        "bbox": [round(float(v), 1) for v in result["bbox"]],
    }


def _named(rows: Sequence[dict[str, Any]], names: Mapping[int, str]) -> list[dict[str, Any]]:
    return [{**row, "category": names[row["category_id"]]} for row in rows]


def _box(region: Any) -> list[float]:
    box = region if isinstance(region, list) else coco_mask.toBbox(region).tolist()
    return [round(float(v), 1) for v in box]
