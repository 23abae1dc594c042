"""How far metrics could be off, had other pictures of the kind been drawn: the bootstrap over pictures.

Pictures are drawn again with replacement (Efron, https://doi.org/10.1214/aos/1176344552). What is found in
a picture does not depend on the others, so a drawn set needs no new matching: only how often each
picture counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pycocotools.cocoeval import COCOeval

_DRAWS = 200
_LEAST = 40  # draws, where there are very many detections
_WORK = 1e8  # detections x IoU thresholds x draws: about a second
_MIDDLE = (0.025, 0.975)

RECALLS = np.linspace(0.0, 1.0, 101)  # COCO's

Interval = tuple[float, float]


@dataclass(frozen=True)
class Judged:
    """The detections of one category, strongest first, as COCOeval matched them.

    scores [D]; image [D]: place of the picture; right, wrong [T, D] bool for each IoU threshold: neither where
    a detection is excused, and those excused at every threshold are left out; instances [N]: those that
    count, in each of N pictures.
    """

    scores: np.ndarray
    image: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    instances: np.ndarray


def judged(evaluator: COCOeval) -> list[list[Judged]]:
    """Of each range of areas, each category of an evaluator behind `evaluate()`."""
    p = evaluator.params
    areas = range(len(p.areaRng))
    return [[_judged(evaluator, k, area) for k in range(len(p.catIds))] for area in areas]


def _judged(evaluator: COCOeval, category: int, area: int) -> Judged:
    p = evaluator.params
    images = len(p.imgIds)
    first = (category * len(p.areaRng) + area) * images
    rows = [(n, r) for n, r in enumerate(evaluator.evalImgs[first : first + images]) if r]
    instances = np.zeros(images, int)
    for n, row in rows:
        instances[n] = int((np.asarray(row["gtIgnore"]) == 0).sum())
    scores = np.concatenate([np.asarray(r["dtScores"], float) for _, r in rows] or [np.zeros(0)])
    place = np.repeat([n for n, _ in rows], [len(r["dtScores"]) for _, r in rows]).astype(int)
    none = np.zeros((len(p.iouThrs), 0))
    matches, ignored = (
        np.concatenate([np.asarray(r[key]) for _, r in rows] or [none], axis=1)
        for key in ("dtMatches", "dtIgnore")
    )
    counts = ignored == 0
    order = np.argsort(-scores, kind="mergesort")
    order = order[counts.any(0)[order]]
    right, wrong = (matches != 0) & counts, (matches == 0) & counts
    return Judged(scores[order], place[order], right[:, order], wrong[:, order], instances)


class Averages(NamedTuple):
    """AP and AR at each IoU threshold in each drawn set, [W, T]; nan where no category has an instance."""

    precision: np.ndarray
    recall: np.ndarray


def averages(categories: Sequence[Judged], weights: np.ndarray, recalls: np.ndarray) -> Averages:
    """AP and AR where picture n counts weights[:, n] times; weights [W, N].

    As COCOeval accumulates: precision made falling, read at `recalls`, mean over the categories that have
    an instance.
    """
    thresholds = len(categories[0].right) if categories else 0
    precisions, found = np.zeros((2, len(weights), thresholds))
    number = np.zeros((len(weights), 1))
    for c in categories:
        there = weights @ c.instances  # [W]
        number[:, 0] += there > 0
        if not len(c.scores):
            continue
        for w in np.flatnonzero(there):
            times = weights[w, c.image]
            hits, misses = np.cumsum(c.right * times, axis=1), np.cumsum(c.wrong * times, axis=1)
            found[w] += hits[:, -1] / there[w]
            precision = hits / np.maximum(hits + misses, 1e-300)
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            for t in range(thresholds):
                place = np.searchsorted(hits[t] / there[w], recalls, side="left")
                place = place[place < precision.shape[1]]
                precisions[w, t] += precision[t, place].sum() / len(recalls)
    with np.errstate(invalid="ignore"):
        return Averages(*(np.where(number > 0, x / number, np.nan) for x in (precisions, found)))


def draws_of(images: int, detections: int = 0) -> np.ndarray:
    """How often each picture counts in each drawn set [W, images]; the first sets are the same at every call."""
    number = int(np.clip(_WORK / max(10 * detections, 1), _LEAST, _DRAWS))
    shares = np.full(images, 1 / images)
    return np.random.default_rng(0).multinomial(images, shares, size=number)


def means(values: Mapping[str, np.ndarray], picture: Sequence[Any]) -> dict[str, np.ndarray]:
    """The mean of each metric in each drawn set, [W]. values: [N] of objects; picture [N]: which each is in."""
    names, place = np.unique(np.asarray(picture), return_inverse=True)
    weights = draws_of(len(names))[:, place].astype(float)
    weights /= weights.sum(1, keepdims=True)
    return {name: weights @ np.asarray(x, float) for name, x in values.items()}


def intervals(values: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """The middle 95 % of each metric over drawn sets; those where it is defined must be most of them."""
    known = {name: v[np.isfinite(v)] for name, v in values.items()}
    return {
        name: tuple(np.quantile(v, _MIDDLE).tolist())
        for name, v in known.items()
        if len(v) >= max(2, len(values[name]) // 2)
    }


def changes(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`intervals` of after minus before, on the same drawn sets."""
    both = {n: min(len(before[n]), len(after[n])) for n in after if n in before}
    return intervals({name: after[name][:n] - before[name][:n] for name, n in both.items()})
