"""How far metrics could be off, had other pictures of the kind been drawn: the bootstrap over pictures.

Pictures are drawn again with replacement (Efron, https://doi.org/10.1214/aos/1176344552). What is found in
a picture does not depend on the others, so a drawn set needs no new matching: only how often each
picture counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    a detection is excused; instances [N]: those that count, in each of N pictures.
    """

    scores: np.ndarray
    image: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    instances: np.ndarray


def judged(evaluator: COCOeval) -> list[Judged]:
    """Of each category of an evaluator behind `evaluate()`, for instances of any size."""
    p = evaluator.params
    images, areas = len(p.imgIds), len(p.areaRng)
    found = []
    for k in range(len(p.catIds)):
        first = k * areas * images  # all sizes come first
        rows = [(n, r) for n, r in enumerate(evaluator.evalImgs[first : first + images]) if r]
        instances = np.zeros(images, int)
        for n, row in rows:
            instances[n] = int((np.asarray(row["gtIgnore"]) == 0).sum())
        scores = np.concatenate(
            [np.asarray(r["dtScores"], float) for _, r in rows] or [np.zeros(0)]
        )
        order = np.argsort(-scores, kind="mergesort")
        place = np.repeat([n for n, _ in rows], [len(r["dtScores"]) for _, r in rows]).astype(int)
        none = np.zeros((len(p.iouThrs), 0))
        matches, ignored = (
            np.concatenate([np.asarray(r[key]) for _, r in rows] or [none], axis=1)[:, order]
            for key in ("dtMatches", "dtIgnore")
        )
        right, counts = matches != 0, ignored == 0
        found.append(
            Judged(scores[order], place[order], right & counts, ~right & counts, instances)
        )
    return found


def average_precision(
    categories: Sequence[Judged], weights: np.ndarray, recalls: np.ndarray
) -> np.ndarray:
    """AP at each IoU threshold [W, T] where picture n counts weights[:, n] times; weights [W, N].

    As COCOeval accumulates: precision made falling, read at `recalls`, mean over the categories that have
    an instance; nan where none has.
    """
    thresholds = len(categories[0].right) if categories else 0
    total = np.zeros((len(weights), thresholds))
    number = np.zeros((len(weights), 1))
    for c in categories:
        there = weights @ c.instances  # [W]
        number[:, 0] += there > 0
        for w in np.flatnonzero(there):
            times = weights[w, c.image]
            hits, misses = np.cumsum(c.right * times, axis=1), np.cumsum(c.wrong * times, axis=1)
            precision = hits / np.maximum(hits + misses, 1e-300)
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            for t in range(thresholds):
                place = np.searchsorted(hits[t] / there[w], recalls, side="left")
                place = place[place < precision.shape[1]]
                total[w, t] += precision[t, place].sum() / len(recalls)
    with np.errstate(invalid="ignore"):
        return np.where(number > 0, total / number, np.nan)


def draws_of(images: int, detections: int = 0) -> np.ndarray:
    """How often each picture counts in each drawn set [W, images]; the first sets are the same at every call."""
    number = int(np.clip(_WORK / max(10 * detections, 1), _LEAST, _DRAWS))
    shares = np.full(images, 1 / images)
    return np.random.default_rng(0).multinomial(images, shares, size=number)


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
