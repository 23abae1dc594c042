"""Is a phrase found where it is, and only there: SA-Co's cgF1, false alarms, thresholds, scores of pictures.

cgF1, pmF1 and IL_MCC are those of sam3/eval/cgf1_eval.py, where one picture asked for one category is
what SA-Co calls an image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from sam3jax.evaluation.ground_truth import (
    IouType,
    Pair,
    Results,
    Truth,
    by_pair,
    overlaps,
    result_region,
    right_finds,
)

IOUS = np.linspace(0.5, 0.95, 10)

_POOLED = 20.0  # instances that all categories together weigh in the threshold of one


@dataclass(frozen=True)
class Found:
    """One asked pair at a score threshold. tp, fp, fn are counts per IoU threshold [10]."""

    pair: Pair
    truths: int
    found: int
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray


def match_pairs(
    truth: Truth, predictions: Results, kind: IouType, thresholds: Mapping[int, float]
) -> list[Found]:
    """One-to-one matching of highest total IoU for each known pair, and its counts."""
    grouped = by_pair(predictions)
    found = []
    for pair, here in truth.pairs.items():
        if here and all(a.iscrowd for a in here):
            continue  # neither "it is there" nor "it is not" can be right or wrong
        kept = [r for r in grouped[pair] if r["score"] >= thresholds[pair[1]]]
        regions = [result_region(r, kind) for r in kept]
        instances, lenient, _ = truth.regions(pair, kind)
        iou = overlaps(regions, instances, crowd=False)  # [detections, instances]
        row, column = linear_sum_assignment(-iou)
        matched = np.zeros(len(regions))
        matched[row] = iou[row, column]
        excused = overlaps(regions, lenient, crowd=True).max(axis=1, initial=0.0)
        right = matched[None] >= IOUS[:, None]  # [10, detections]
        tp = right.sum(axis=1)
        fp = (~right & (excused[None] < IOUS[:, None])).sum(axis=1)
        counted = int((right[0] | (excused < IOUS[0])).sum())
        found.append(Found(pair, len(instances), counted, tp, fp, len(instances) - tp))
    return found


def tally(found: Sequence[Found]) -> np.ndarray:
    """A vector of counts: what `concept_metrics` and false alarms follow from; tallies of pictures add up."""
    nothing = np.zeros(len(IOUS), int)
    tp, fp, fn = (sum((getattr(f, name) for f in found), nothing) for name in ("tp", "fp", "fn"))
    fp_positive = sum((f.fp for f in found if f.truths), nothing)
    there = [
        sum((f.truths > 0) == truth and (f.found > 0) == said for f in found)
        for truth, said in ((True, True), (False, True), (False, False), (True, False))
    ]
    return np.concatenate([tp, fp, fn, fp_positive, there]).astype(float)


def concept_metrics(counts: np.ndarray) -> dict[str, Any]:
    """SA-Co's metrics from a `tally` [n] or several [..., n], with the small constants of the published evaluator.

    pmF1: micro F1 over the pairs whose concept is there, averaged over IoU .5 to .95. IL_MCC:
    Matthews correlation of "is it there". cgF1 = pmF1 * IL_MCC. precision and recall are at IoU .5.
    cgF1 and IL_MCC are undefined (nan) without a pair of either sort.
    """
    edges = np.arange(1, 5) * len(IOUS)
    tp, fp, fn, fp_positive, there = np.split(counts, edges, axis=-1)
    yes_yes, no_yes, no_no, yes_no = np.moveaxis(there, -1, 0)
    present, absent = yes_yes + yes_no > 0, no_yes + no_no > 0
    known = lambda value, defined: np.where(defined, value, np.nan)
    recall = tp / (tp + fn + 1e-4)
    precision = tp / (tp + fp_positive + 1e-4)
    micro = (2 * precision * recall / (precision + recall + 1e-4)).mean(-1)
    first = tp[..., 0]
    product = (yes_yes + no_yes) * (yes_yes + yes_no) * (no_no + no_yes) * (no_no + yes_no)
    correlation = (yes_yes * no_no - no_yes * yes_no) / (product**0.5 + 1e-6)
    return {
        "pmF1": known(micro, present),
        "precision": known(first / np.maximum(1, first + fp[..., 0]), present),
        "recall": known(first / np.maximum(1, first + fn[..., 0]), present),
        "IL_MCC": known(correlation, present & absent),
        "cgF1": known(micro * correlation, present & absent),
    }


def choose_thresholds(
    truth: Truth, predictions: Results, kind: IouType, *, default: float = 0.5
) -> dict[int, float]:
    """The score threshold of each category that gives its best F1 at IoU .5 on these data.

    Few instances say little: those of all categories together are added to each, to weigh as `_POOLED`.
    Half way between the weakest detection worth keeping and the next; `default` where no detection of
    any category is right. Matching is greedy by score, so that it does not depend on the threshold.
    """
    ranked: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    totals: dict[int, int] = defaultdict(int)
    grouped = by_pair(predictions)
    for pair in truth.pairs:
        instances, lenient, _ = truth.regions(pair, kind)
        totals[pair[1]] += len(instances)
        results = sorted(grouped[pair], key=lambda r: -r["score"])
        regions = [result_region(r, kind) for r in results]
        iou = overlaps(regions, instances, crowd=False)
        excused = overlaps(regions, lenient, crowd=True).max(axis=1, initial=0.0)
        for result, right, excuse in zip(results, right_finds(iou), excused):
            if right or excuse < IOUS[0]:
                ranked[pair[1]].append((result["score"], bool(right)))
    together = [detection for own in ranked.values() for detection in own]
    share = _POOLED / max(sum(totals.values()), 1)
    cuts = {}
    for i in truth.categories:
        weighted = [(*d, 1.0) for d in ranked[i]] + [(*d, share) for d in together]
        cuts[i] = _best_cut(weighted, totals[i] + _POOLED, default)
    return cuts


def _best_cut(ranked: list[tuple[float, bool, float]], truths: float, default: float) -> float:
    """ranked: score, whether it is right, weight."""
    if not any(right for _, right, _ in ranked):
        return default
    score, right, weight = (np.array(column) for column in zip(*sorted(ranked, reverse=True)))
    f1 = 2 * np.cumsum(right * weight) / (np.cumsum(weight) + truths)
    below = np.append(score[1:], 0.0)
    f1[score == below] = -1.0  # equal scores cannot be told apart
    best = int(f1.argmax())
    return float((score[best] + below[best]) / 2)


def silence(truth: Truth, found: Sequence[Found]) -> dict[str, float]:
    """How often something is found where nothing of the kind is.

    false_alarms: share of the absent (picture, category) pairs with a detection;
    false_alarms_empty: share of the pictures without any object that have one for some category.
    """
    absent = [f for f in found if not truth.pairs[f.pair]]
    metrics = {}
    if absent:
        metrics["false_alarms"] = float(np.mean([f.found > 0 for f in absent]))
    empty = {i: False for i, image in truth.images.items() if not image.annotations}
    for f in found:
        if f.pair[0] in empty:
            empty[f.pair[0]] |= f.found > 0
    if empty:
        metrics["false_alarms_empty"] = float(np.mean(list(empty.values())))
    return metrics


def category_row(found: Sequence[Found]) -> dict[str, Any]:
    tp, fp, fn = (int(sum(getattr(f, name)[0] for f in found)) for name in ("tp", "fp", "fn"))
    absent = [f for f in found if not f.truths]
    row: dict[str, Any] = {"instances": tp + fn, "pictures": len(found) - len(absent)}
    if tp + fn:
        row |= {
            "precision": tp / max(1, tp + fp),
            "recall": tp / (tp + fn),
            "F1": 2 * tp / (2 * tp + fp + fn),
        }
    if absent:
        row["false_alarms"] = float(np.mean([f.found > 0 for f in absent]))
    return row


def picture_scores(found: Sequence[Found]) -> dict[Any, float]:
    counts: dict[Any, np.ndarray] = defaultdict(lambda: np.zeros((2, len(IOUS))))
    for f in found:
        counts[f.pair[0]] += np.stack([2 * f.tp, 2 * f.tp + f.fp + f.fn])
    scores = {}
    for image_id, (right, everything) in counts.items():
        f1 = np.where(everything > 0, right / np.maximum(everything, 1), 1.0)
        scores[image_id] = float(f1.mean())
    return scores
