"""How good masks are after 1, 2, 3, ... clicks. On the host, object by object.

The published protocol: the first click at the deepest point of the object, each further one at the
deepest point of the larger error. NoC@85 is the number of clicks until the IoU is .85, the budget
where it never is (Sofiiuk et al., https://arxiv.org/abs/2102.06583).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy import ndimage

SHOWN = (1, 2, 3, 5, 10, 20)  # clicks after which the mean IoU is told, as far as there are so many
LEVELS = (85, 90)  # percent of IoU that NoC waits for
BINS = 10
BOUNDARY = 0.008  # how far a contour may be off, of the picture's diagonal (DAVIS)


@dataclasses.dataclass
class ClickScores:
    """Numbers of all objects so far: true and predicted IoU [N, R] after each click, boundary F [N]."""

    ious: list[np.ndarray] = dataclasses.field(default_factory=list)
    predicted: list[np.ndarray] = dataclasses.field(default_factory=list)
    boundary: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(self, ious: np.ndarray, predicted: np.ndarray, boundary: np.ndarray) -> None:
        """ious, predicted [R, N] of N objects; boundary [N] of their last masks."""
        self.ious.append(np.asarray(ious, np.float64).T)
        self.predicted.append(np.asarray(predicted, np.float64).T)
        self.boundary.append(np.asarray(boundary, np.float64))

    def metrics(self) -> dict[str, float]:
        """Names as in a run's metrics; {} without an object."""
        if not sum(len(x) for x in self.ious):
            return {}
        ious, predicted = np.concatenate(self.ious), np.concatenate(self.predicted)
        out = {name: float(values.mean()) for name, values in self.of_objects().items()}
        out["clicks/calibration_error"] = calibration_error(predicted, ious)
        out["clicks/objects"] = float(len(ious))
        return out

    def of_objects(self) -> dict[str, np.ndarray]:
        """What each of at least one object adds to the metrics that are means over objects, [N] each."""
        ious, predicted = np.concatenate(self.ious), np.concatenate(self.predicted)
        out = {f"clicks/mIoU@{k}": ious[:, k - 1] for k in SHOWN if k <= ious.shape[1]}
        for level in LEVELS:
            out[f"clicks/NoC@{level}"] = clicks_needed(ious, level / 100)
            out[f"clicks/reached@{level}"] = (ious >= level / 100).any(1).astype(float)
        out["clicks/boundary_F"] = np.concatenate(self.boundary)
        out["clicks/predicted_IoU_error"] = np.abs(predicted - ious).mean(1)
        return out

    def curve(self) -> list[float]:
        """The mean IoU after each click; [] without an object."""
        return np.concatenate(self.ious).mean(0).tolist() if self.ious else []

    def calibration(self) -> list[tuple[float, float, int]]:
        """(mean predicted IoU, mean true IoU, masks) of each tenth of predicted IoU that has masks."""
        if not self.ious:
            return []
        return calibration(np.concatenate(self.predicted), np.concatenate(self.ious))


def scores_of(objects: Iterable[Mapping[str, Any]]) -> ClickScores:
    """The scores of records of objects: `ious` and `predicted` after each click, `boundary_F`."""
    scores = ClickScores()
    for record in objects:
        scores.add(
            np.array(record["ious"])[:, None],
            np.array(record["predicted"])[:, None],
            np.array([record["boundary_F"]]),
        )
    return scores


def clicks_needed(ious: np.ndarray, level: float) -> np.ndarray:
    """Clicks until `level` is reached, from [N, R]; R where it never is."""
    reached = ious >= level
    return np.where(reached.any(1), reached.argmax(1) + 1, ious.shape[1])


def calibration(predicted: np.ndarray, true: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean predicted, mean true, count) of each tenth of the predicted IoU that is not empty."""
    predicted, true = predicted.ravel(), true.ravel()
    which = np.minimum((predicted * BINS).astype(int), BINS - 1)
    return [
        (float(predicted[which == b].mean()), float(true[which == b].mean()), int(n))
        for b in range(BINS)
        if (n := (which == b).sum())
    ]


def calibration_error(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean distance of predicted from true IoU over the tenths, weighted by their masks."""
    rows = calibration(predicted, true)
    return sum(n * abs(p - t) for p, t, n in rows) / sum(n for *_, n in rows)


def boundary_f(mask: np.ndarray, target: np.ndarray) -> float:
    """F measure of two masks' contours, bool [Y, X]; a contour counts where the other is near.

    As DAVIS, with the exact distance for its disk. 1 where both are empty, 0 where one is.
    """
    reach = np.ceil(BOUNDARY * np.hypot(*mask.shape))
    ours, theirs = contour(mask), contour(target)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (np.asarray(ndimage.distance_transform_edt(~theirs))[ours] <= reach).mean()
    recall = (np.asarray(ndimage.distance_transform_edt(~ours))[theirs] <= reach).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels whose right, lower or lower right neighbour differs: the edge that DAVIS draws."""
    mask = mask.astype(bool)
    next_row = np.concatenate([mask[1:], mask[-1:]])
    right = lambda x: np.concatenate([x[:, 1:], x[:, -1:]], 1)
    return (mask ^ next_row) | (mask ^ right(mask)) | (mask ^ right(next_row))
