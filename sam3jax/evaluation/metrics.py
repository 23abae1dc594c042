"""How good predictions are: all metrics of a data set's predictions, from lists.

Predictions are COCO results (dictionaries with image_id, category_id, bbox, score, segmentation);
the truth is a `Dataset`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from sam3jax.data.coco import Dataset
from sam3jax.evaluation.average_precision import AREAS, coco_metrics
from sam3jax.evaluation.concepts import (
    Found,
    category_row,
    choose_thresholds,
    concept_metrics,
    match_pairs,
    picture_scores,
    silence,
    tally,
)
from sam3jax.evaluation.ground_truth import Pair, Truth
from sam3jax.evaluation.uncertainty import RECALLS, Judged, averages, draws_of


@dataclass(frozen=True)
class Evaluation:
    """Everything that is said about predictions.

    metrics: name -> value; what the data leave undefined (AP of small objects where there are none,
    cgF1 where every concept is in every picture) is absent. per_category: one row per category.
    thresholds: category name -> score that gives its best F1 on these data. pictures: image id ->
    F1 of the picture over all its phrases, averaged over IoU thresholds; 1.0 for right silence. truth: what
    was asked, with its regions already drawn. resample(): metric -> values in drawn sets of the pictures, the
    same sets for every model; see `uncertainty`.
    """

    metrics: dict[str, float]
    per_category: list[dict[str, Any]]
    predictions: list[dict[str, Any]]
    thresholds: dict[str, float] = field(default_factory=dict)
    pictures: dict[Any, float] = field(default_factory=dict)
    truth: Truth | None = None
    resample: Callable[[], dict[str, np.ndarray]] = dict


def measure(
    dataset: Dataset,
    predictions: Iterable[Mapping[str, Any]],
    *,
    threshold: float = 0.5,
    thresholds: Mapping[str, float] | None = None,
    asked: Collection[Pair] | None = None,
) -> Evaluation:
    """All metrics of predictions on a data set, or on the pairs in `asked` only.

    `threshold` is the score from which a detection counts in cgF1 and false alarms; `thresholds`
    (category name -> score) replaces it category by category. AP knows no threshold.
    """
    truth = Truth(dataset, asked)
    kept = [dict(p) for p in predictions if (p["image_id"], p["category_id"]) in truth.pairs]
    cuts = {i: (thresholds or {}).get(n, threshold) for i, n in dataset.categories.items()}
    metrics: dict[str, float] = {}
    rows: dict[Any, dict[str, Any]] = {
        i: {"category": dataset.categories[i]} for i in truth.categories
    }
    matches: dict[str, list[list[Judged]]] = {}
    for kind in truth.kinds:
        overall, of_each, matches[kind] = coco_metrics(truth, kept, kind)
        metrics |= {f"{kind}/{name}": value for name, value in overall.items()}
        for category, values in of_each.items():
            rows[category] |= {f"{kind}/{name}": value for name, value in values.items()}
    kind = truth.kinds[-1]
    found = match_pairs(truth, kept, kind, cuts)
    of_all = concept_metrics(tally(found))
    metrics |= {n: float(v) for n, v in of_all.items() if np.isfinite(v)} | silence(truth, found)
    best = choose_thresholds(truth, kept, kind, default=threshold)
    by_category: dict[int, list[Found]] = defaultdict(list)
    for one in found:
        by_category[one.pair[1]].append(one)
    for category, row in rows.items():
        row |= category_row(by_category[category])
        row |= {"threshold": cuts[category], "best_threshold": best[category]}
    named = {dataset.categories[i]: value for i, value in best.items()}
    resample = partial(_resampled, truth, found, matches)
    return Evaluation(
        metrics, list(rows.values()), kept, named, picture_scores(found), truth, resample
    )


def _resampled(
    truth: Truth, found: Sequence[Found], matches: Mapping[str, list[list[Judged]]]
) -> dict[str, np.ndarray]:
    """Metric -> its value in each drawn set of the pictures."""
    places = {image: n for n, image in enumerate(truth.images)}
    if len(places) < 2:
        return {}
    detections = sum(len(c.scores) for areas in matches.values() for cs in areas for c in cs)
    weights = draws_of(len(places), detections)
    values: dict[str, np.ndarray] = {}
    for kind, areas in matches.items():
        for suffix, categories in zip(AREAS, areas, strict=True):
            if np.count_nonzero(sum(c.instances for c in categories)) < 2:
                continue  # one picture's instances, however often it is drawn, say nothing of others
            by_iou = averages(categories, weights, RECALLS)
            values[f"{kind}/AP{suffix}"] = by_iou.precision.mean(1)
            values[f"{kind}/AR{suffix}"] = by_iou.recall.mean(1)
            if not suffix:
                values |= {f"{kind}/AP{n}": by_iou.precision[:, k] for n, k in ((50, 0), (75, 5))}
    by_picture: dict[int, list[Found]] = defaultdict(list)
    for one in found:
        by_picture[places[one.pair[0]]].append(one)
    counts = np.stack([tally(by_picture[n]) for n in range(len(places))])
    values |= concept_metrics(weights @ counts)
    alarms, absent, disturbed = np.zeros((3, len(places)))
    for one in found:
        n = places[one.pair[0]]
        disturbed[n] = max(disturbed[n], one.found > 0)
        if not truth.pairs[one.pair]:
            absent[n] += 1
            alarms[n] += one.found > 0
    empty = np.array([not image.annotations for image in truth.images.values()])
    values["false_alarms"] = _share(weights @ alarms, weights @ absent)
    values["false_alarms_empty"] = _share(weights @ (disturbed * empty), weights @ empty)
    return values


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
