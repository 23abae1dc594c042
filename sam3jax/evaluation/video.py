"""How good masks are in video: J and F of objects, HOTA of tracks, and how steady scores are.

J and F as DAVIS counts them (Perazzi et al. 2016): overlap of regions, and agreement of boundaries
within 0.8 % of the picture's diagonal. HOTA as in Luiten et al. 2021. Masks are bool arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment

_TOLERANCE = 0.008  # of the diagonal, between boundaries
ALPHAS = np.arange(0.05, 0.99, 0.05)  # overlaps at which HOTA is taken
_EPSILON = np.finfo(float).eps


def region_similarity(
    truth: np.ndarray, found: np.ndarray, void: np.ndarray | None = None
) -> float:
    """J: intersection over union of two masks [Y, X]; 1 where both are empty. void: not counted."""
    truth, found = _without(truth, void), _without(found, void)
    union = np.count_nonzero(truth | found)
    return np.count_nonzero(truth & found) / union if union else 1.0


def boundary_accuracy(
    truth: np.ndarray, found: np.ndarray, void: np.ndarray | None = None
) -> float:
    """F: harmonic mean of the shares of each boundary that lies near the other. void: not counted."""
    truth, found = boundary(_without(truth, void)), boundary(_without(found, void))
    if not truth.any() or not found.any():
        return float(truth.any() == found.any())
    reach = math.ceil(_TOLERANCE * math.hypot(*truth.shape))
    precision = (np.asarray(distance_transform_edt(~truth))[found] <= reach).mean()
    recall = (np.asarray(distance_transform_edt(~found))[truth] <= reach).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """One pixel wide: pixels that differ from the one to the right, below, or both."""
    right, below, both = (np.zeros_like(mask) for _ in range(3))
    right[:, :-1], below[:-1], both[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    out = (mask ^ right) | (mask ^ below) | (mask ^ both)
    out[-1], out[:, -1] = mask[-1] ^ right[-1], mask[:, -1] ^ below[:, -1]
    out[-1, -1] = False
    return out


class VideoScores:
    """J & F of one video, frame by frame; tracks are matched to objects at the end.

    Add frames that are annotated. Matched is what gives the best mean, one to one; an object without a
    track counts 0 in every frame.
    """

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int], np.ndarray] = {}  # sums of J and of F
        self._objects: set[int] = set()
        self._frames = 0
        self._tracks: set[int] = set()
        self._there: list[tuple[frozenset[int], frozenset[int]]] = []

    def add(
        self,
        truth: Mapping[int, np.ndarray],
        found: Mapping[int, np.ndarray],
        void: np.ndarray | None = None,
    ) -> None:
        """truth: object -> mask [Y, X]; found: track -> mask. Absent ones are left out."""
        self._frames += 1
        for i, mask in truth.items():
            self._objects.add(i)
            for t, other in found.items():
                j = region_similarity(mask, other, void)
                # Far-off pairs are most pairs; their boundaries need not be looked at.
                f = boundary_accuracy(mask, other, void) if j else 0.0
                self._pairs[i, t] = self._pairs.get((i, t), 0.0) + np.array([j, f])
        self._tracks |= set(found)
        self._there.append((frozenset(truth), frozenset(found)))

    def result(self) -> dict[str, float]:
        """J, F, J&F: means over objects of means over frames."""
        objects, tracks = sorted(self._objects), sorted(self._tracks)
        if not objects:
            return {}
        sums = np.zeros((2, len(objects), max(len(tracks), 1)))
        for (i, t), value in self._pairs.items():
            sums[:, objects.index(i), tracks.index(t)] = value
        for there, shown in self._there:  # both absent: right, as DAVIS counts it
            for a, i in enumerate(objects):
                for b, t in enumerate(tracks):
                    if i not in there and t not in shown:
                        sums[:, a, b] += 1
        means = sums / self._frames
        rows, columns = linear_sum_assignment(-means.mean(0))
        j, f = (means[k, rows, columns].sum() / len(objects) for k in range(2))
        return {"J": float(j), "F": float(f), "J&F": float((j + f) / 2)}


@dataclass
class Hota:
    """Counts behind HOTA; those of several videos may be added. Arrays of one value an alpha."""

    hits: np.ndarray = field(default_factory=lambda: np.zeros(len(ALPHAS)))
    misses: np.ndarray = field(default_factory=lambda: np.zeros(len(ALPHAS)))
    false: np.ndarray = field(default_factory=lambda: np.zeros(len(ALPHAS)))
    overlap: np.ndarray = field(default_factory=lambda: np.zeros(len(ALPHAS)))
    association: np.ndarray = field(default_factory=lambda: np.zeros(len(ALPHAS)))  # times hits

    def __add__(self, other: Hota) -> Hota:
        return Hota(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def result(self) -> dict[str, float]:
        """HOTA, DetA, AssA, LocA: means over alphas."""
        hits = np.maximum(1, self.hits)
        detection = self.hits / np.maximum(1, self.hits + self.misses + self.false)
        association = self.association / hits
        location = np.where(self.hits > 0, self.overlap / hits, 1.0)
        return {
            "HOTA": float(np.sqrt(detection * association).mean()),
            "DetA": float(detection.mean()),
            "AssA": float(association.mean()),
            "LocA": float(location.mean()),
        }


Frame = tuple[Sequence[int], Sequence[int], np.ndarray]  # true ids, found ids, overlaps [n, m]


def hota(frames: Iterable[Frame]) -> Hota:
    """HOTA's counts of one video. Ids of tracks and objects are integers of any kind."""
    frames = list(frames)
    objects = {i: k for k, i in enumerate(sorted({i for true, _, _ in frames for i in true}))}
    tracks = {i: k for k, i in enumerate(sorted({i for _, found, _ in frames for i in found}))}
    true_count, found_count = np.zeros(len(objects)), np.zeros(len(tracks))
    potential = np.zeros((len(objects), len(tracks)))
    rows = []
    for true, found, overlap in frames:
        a = np.array([objects[i] for i in true], int)
        b = np.array([tracks[i] for i in found], int)
        overlap = np.asarray(overlap, float).reshape(len(a), len(b))
        both = overlap.sum(0)[None] + overlap.sum(1)[:, None] - overlap
        share = np.where(both > _EPSILON, overlap / np.maximum(both, _EPSILON), 0.0)
        potential[np.ix_(a, b)] += share
        true_count[a] += 1
        found_count[b] += 1
        rows.append((a, b, overlap))
    total = true_count[:, None] + found_count - potential
    alignment = potential / np.maximum(total, _EPSILON)  # of whole tracks, before any matching
    out = Hota()
    matches = np.zeros((len(ALPHAS), len(objects), len(tracks)))
    for a, b, overlap in rows:
        r, c = linear_sum_assignment(-(alignment[np.ix_(a, b)] * overlap))
        for k, alpha in enumerate(ALPHAS):
            good = overlap[r, c] >= alpha - _EPSILON
            hits = int(good.sum())
            out.hits[k] += hits
            out.misses[k] += len(a) - hits
            out.false[k] += len(b) - hits
            out.overlap[k] += overlap[r[good], c[good]].sum()
            matches[k, a[r[good]], b[c[good]]] += 1
    for k in range(len(ALPHAS)):
        union = np.maximum(1, true_count[:, None] + found_count - matches[k])
        out.association[k] = (matches[k] * (matches[k] / union)).sum()
    return out


def identity_switches(frames: Iterable[Frame], threshold: float = 0.5) -> tuple[int, int]:
    """(how often an object is found as another track than before, number of objects)."""
    last: dict[int, int] = {}
    objects: set[int] = set()
    switches = 0
    for true, found, overlap in frames:
        objects |= set(true)
        overlap = np.asarray(overlap, float).reshape(len(true), len(found))
        for r, c in zip(*linear_sum_assignment(-overlap)):
            if overlap[r, c] >= threshold:
                switches += last.get(true[r], found[c]) != found[c]
                last[true[r]] = found[c]
    return switches, len(objects)


def steadiness(scores: Iterable[Sequence[float]]) -> float:
    """Temporal consistency: 1 minus the mean change of an object's score from frame to frame.

    scores: for each object, its scores in consecutive frames in which it is seen; 0 where it was not
    found. 1 where there is nothing to compare.
    """
    changes = [np.abs(np.diff(np.asarray(s, float))) for s in scores]
    together = np.concatenate([*changes, np.zeros(0)])
    return float(1 - together.mean()) if together.size else 1.0


def _without(mask: np.ndarray, void: np.ndarray | None) -> np.ndarray:
    mask = np.asarray(mask, bool)
    return mask if void is None else mask & ~void
