"""J, F and HOTA against other implementations, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from sam3jax.evaluation.video import (
    Hota,
    VideoScores,
    boundary_accuracy,
    hota,
    identity_switches,
    region_similarity,
    steadiness,
)


def blobs(rng: np.random.Generator, shape=(60, 80)) -> np.ndarray:
    return ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(2, 6)) > rng.normal(0, 0.03)


def slow_f(truth: np.ndarray, found: np.ndarray) -> float:
    """DAVIS's definition, pixel by pixel: a contour pixel differs from its right, lower or both."""

    def contour(mask):
        rows, columns = mask.shape
        out = np.zeros_like(mask)
        for y in range(rows):
            for x in range(columns):
                last_row, last_column = y == rows - 1, x == columns - 1
                if last_row and last_column:
                    continue
                if last_row:
                    out[y, x] = mask[y, x] != (mask[y, x + 1])
                elif last_column:
                    out[y, x] = mask[y, x] != mask[y + 1, x]
                else:
                    here = mask[y, x]
                    out[y, x] = here != mask[y, x + 1] or here != mask[y + 1, x] or here != mask[y + 1, x + 1]  # fmt: skip
        return out

    radius = math.ceil(0.008 * math.hypot(*truth.shape))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = x**2 + y**2 <= radius**2
    a, b = contour(truth), contour(found)
    if not a.any() and not b.any():
        return 1.0
    if not a.any() or not b.any():
        return 0.0
    precision = (b & ndimage.binary_dilation(a, disk)).sum() / b.sum()
    recall = (a & ndimage.binary_dilation(b, disk)).sum() / a.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(12))
def test_boundary_accuracy_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    truth = blobs(rng)
    found = blobs(rng) if seed % 3 == 0 else np.roll(truth, rng.integers(0, 4, 2), (0, 1))
    truth[:, :2] |= seed % 2 == 0  # touches the edge
    assert boundary_accuracy(truth, found) == pytest.approx(slow_f(truth, found), abs=1e-12)


def test_masks_that_are_equal_empty_or_void():
    mask = blobs(np.random.default_rng(0))
    nothing = np.zeros_like(mask)
    for score in (region_similarity, boundary_accuracy):
        assert score(mask, mask) == 1
        assert score(nothing, nothing) == 1
        assert score(mask, nothing) == 0
        assert score(nothing, mask) == 0
    # What lies on void pixels is no error, whatever it is.
    void = np.zeros_like(mask)
    void[:, 40:] = True
    other = mask.copy()
    other[:, 40:] ^= True
    assert region_similarity(mask, other, void) == 1
    assert boundary_accuracy(mask, other, void) == 1
    assert region_similarity(mask, other) < 1


def test_tracks_are_matched_to_objects_once_for_the_whole_video():
    rng = np.random.default_rng(1)
    a, b = blobs(rng), blobs(rng)
    scores = VideoScores()
    scores.add({1: a, 2: b}, {7: b, 8: a})
    scores.add({1: a}, {8: a})
    scores.add({1: a, 2: b}, {8: a})
    result = scores.result()
    # Object 1 is right in all frames; object 2 in two: found, rightly absent, missed.
    assert result["J"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["J&F"] == pytest.approx(result["J"])
    swapped = VideoScores()
    swapped.add({1: a, 2: b}, {1: a, 2: b})
    swapped.add({1: a, 2: b}, {1: b, 2: a})
    assert swapped.result()["J"] < 0.9
    assert VideoScores().result() == {}


def random_video(rng: np.random.Generator) -> list:
    frames = []
    for _ in range(int(rng.integers(1, 25))):
        true = rng.permutation(6)[: rng.integers(0, 5)]
        found = rng.permutation(9)[: rng.integers(0, 6)] + 100
        overlap = np.where(rng.random((len(true), len(found))) < 0.5, rng.random((len(true), len(found))), 0)  # fmt: skip
        for r, i in enumerate(true):  # mostly its own track
            overlap[r, found == 100 + i] = rng.uniform(0.4, 1)
        frames.append((true.tolist(), found.tolist(), overlap))
    return frames


def trackeval_hota(videos: list) -> dict[str, float]:
    pytest.importorskip("trackeval", reason="HOTA's reference is TrackEval")
    from trackeval.metrics import HOTA

    metric = HOTA()
    results = {}
    for k, frames in enumerate(videos):
        true = sorted({i for t, _, _ in frames for i in t})
        found = sorted({i for _, f, _ in frames for i in f})
        results[k] = metric.eval_sequence(
            {
                "num_gt_dets": sum(len(t) for t, _, _ in frames),
                "num_tracker_dets": sum(len(f) for _, f, _ in frames),
                "num_gt_ids": len(true),
                "num_tracker_ids": len(found),
                "gt_ids": [np.array([true.index(i) for i in t], int) for t, _, _ in frames],
                "tracker_ids": [np.array([found.index(i) for i in f], int) for _, f, _ in frames],
                "similarity_scores": [o for _, _, o in frames],
            }
        )
    together = metric.combine_sequences(results)
    return {k: float(np.mean(together[k])) for k in ("HOTA", "DetA", "AssA", "LocA")}


@pytest.mark.parametrize("seed", range(20))
def test_hota_equals_trackeval(seed):
    rng = np.random.default_rng(seed)
    videos = [random_video(rng) for _ in range(1 + seed % 3)]
    ours = Hota()
    for frames in videos:
        ours += hota(frames)
    theirs = trackeval_hota(videos)
    assert ours.result() == pytest.approx(theirs, abs=1e-9)


def test_hota_of_perfect_and_of_empty_tracks():
    frames = [([1, 2], [8, 9], np.eye(2))] * 5
    assert hota(frames).result()["HOTA"] == pytest.approx(1)
    assert hota([([1], [], np.zeros((1, 0)))]).result()["HOTA"] == 0
    assert hota([([], [1], np.zeros((0, 1)))]).result()["HOTA"] == 0
    assert hota([]).result()["HOTA"] == 0


def test_switches_and_steadiness_by_hand():
    one = np.ones((1, 1))
    frames = [([1], [5], one), ([1], [], np.zeros((1, 0))), ([1], [6], one), ([1], [6], one), ([2], [6], one)]  # fmt: skip
    assert identity_switches(frames) == (1, 2)
    assert steadiness([[0.5, 0.5], [1.0, 0.0, 0.4]]) == pytest.approx(1 - (0 + 1 + 0.4) / 3)
    assert steadiness([]) == steadiness([[0.3]]) == 1
