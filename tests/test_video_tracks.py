"""Tracking by detection: identities over motion, gaps and crossings; the delay; both directions."""

from __future__ import annotations

import numpy as np
import pytest

from sam3jax.evaluation.video import hota, identity_switches
from sam3jax.video.association import Rules, mask_iou
from sam3jax.video.chunks import FrameDetections
from sam3jax.video.tracks import Follower, follow

SIZE = (40, 60)


def square(x: float, y: float, edge: int = 10) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    x, y = round(x), round(y)
    return (rows >= y) & (rows < y + edge) & (columns >= x) & (columns < x + edge)


def detections(phrases: list[list[tuple[np.ndarray, float]]], keep: int = 5) -> FrameDetections:
    """[phrase][detection] (mask, probability), padded as the detector pads."""
    shape = (len(phrases), keep)
    logits, masks = np.full(shape, -1e4, np.float32), np.full((*shape, *SIZE), -5, np.float32)
    boxes = np.zeros((*shape, 4), np.float32)
    for p, found in enumerate(phrases):
        for n, (mask, prob) in enumerate(sorted(found, key=lambda pair: -pair[1])):
            logits[p, n] = np.log(prob / (1 - prob))
            masks[p, n] = np.where(mask, 5, -5)
            boxes[p, n] = n
    return FrameDetections(logits, boxes, boxes, masks, np.zeros(shape, np.int32))


def run(video: list, reverse: bool = False, **options) -> dict[int, list]:
    order = range(len(video) - 1, -1, -1) if reverse else range(len(video))
    frames = ((t, detections(video[t])) for t in order)
    found = list(follow(frames, reverse=reverse, **options))
    assert [t for t, _ in found] == list(order)
    return dict(found)


@pytest.mark.parametrize("reverse", [False, True])
def test_objects_keep_their_identity_over_motion_and_a_gap(reverse):
    """Two squares cross the picture; each is undetected for a few frames."""
    video, truth = [], []
    for t in range(30):
        a, b = square(1.5 * t, 4), square(45 - 1.5 * t, 24)
        truth.append([a, b])
        video.append([[(m, 0.9) for k, m in enumerate((a, b)) if not 12 + 5 * k <= t < 16 + 5 * k]])
    found = run(video, reverse)
    frames = []
    for t, objects in truth_in_order(truth, reverse):
        masks = [x.mask > 0 for x in found[t]]
        overlap = mask_iou(np.stack(objects), np.stack(masks)) if masks else np.zeros((2, 0))
        frames.append(([0, 1], [x.id for x in found[t]], overlap))
    assert identity_switches(frames) == (0, 2)
    assert hota(frames).result()["AssA"] > 0.85
    assert {x.id for t in found for x in found[t]} == {1, 2}
    assert not [x for t in (12, 13, 14, 15) for x in found[t] if x.mask[6, round(1.5 * t) + 4] > 0]


def truth_in_order(truth: list, reverse: bool):
    pairs = list(enumerate(truth))
    return reversed(pairs) if reverse else pairs


def test_a_flicker_is_removed_from_all_frames():
    """Seen once and never again: after eight frames it was never there."""
    video = [
        [[(square(5, 5), 0.9)] + ([(square(40, 20), 0.95)] if t == 2 else [])] for t in range(30)
    ]
    found = run(video)
    assert all(len(found[t]) == 1 for t in found)
    late = Rules(unmatched=15)
    assert sum(len(x) for x in run(video, rules=late).values()) == 31


def test_new_objects_need_a_high_score_after_the_first_frame():
    video = [[[(square(5, 5), 0.6)] + ([(square(40, 20), 0.65)] if t else [])] for t in range(6)]
    found = run(video)
    assert all(len(found[t]) == 1 for t in found)


def test_a_detection_without_a_pixel_is_nowhere():
    video = [[[(square(5, 5), 0.9), (np.zeros(SIZE, bool), 0.95)]]] * 5
    assert [len(x) for x in run(video).values()] == [1] * 5


def test_weak_detections_are_not_looked_at():
    video = [[[(square(5, 5), 0.45)]]] * 4
    assert not any(run(video).values())
    assert all(run(video, threshold=0.4).values())


def test_phrases_are_tracked_apart_and_ids_are_not_shared():
    video = [[[(square(5, 5), 0.9)], [(square(5, 5), 0.9)], []]] * 5
    found = run(video)
    assert [sorted((x.phrase, x.id) for x in found[t]) for t in found] == [[(0, 1), (1, 2)]] * 5


@pytest.mark.parametrize("frames", [0, 1])
def test_no_frame_and_one_frame(frames):
    found = run([[[(square(5, 5), 0.9)]]] * frames)
    assert [len(found[t]) for t in found] == [1] * frames


def test_memory_does_not_grow_with_the_video():
    """Four hundred objects, one after the other: what is remembered of those that ended is dropped."""
    follower, sizes = Follower(), []
    for t in range(1200):
        found = detections([[(square(5 + 20 * (t // 3 % 3), 5), 0.9)]])
        follower.step(t, found.masks[0, :1], np.array([0.9], np.float32))
        maps = [v for v in vars(follower.state).values() if hasattr(v, "__len__")]
        sizes.append(sum(map(len, maps)) + len(follower._seen))
    assert follower.state.next_id >= 3
    assert max(sizes[600:]) <= max(sizes[:600])
