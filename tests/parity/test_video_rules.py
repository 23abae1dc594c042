"""Schedule, NMS, association, plans and suppression against the published code."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="the torch oracle needs torch")
pytest.importorskip("sam3", reason="the torch oracle needs the sam3 package")

from sam3jax.video.association import RELEASED, Rules, associate, resized, suppress
from sam3jax.video.nms import lower, nms
from sam3jax.video.planning import TrackState, plan, silence
from sam3jax.video.schedule import chunks
from tests import video_reference as reference

device_nms = jax.jit(nms, static_argnames=("prob_threshold", "iou_threshold"))


def rectangles(rng: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    """Mask logits [N, Y, X] of random rectangles, some of them empty."""
    y, x = np.mgrid[: size[0], : size[1]]
    out = np.empty((count, *size), np.float32)
    for mask in out:
        top, left = rng.integers(0, size[0]), rng.integers(0, size[1])
        height, width = rng.integers(0, size[0] // 2 + 1), rng.integers(1, size[1] // 2 + 1)
        inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        mask[:] = np.where(inside, 1, -1) * rng.uniform(0.5, 6, size)
    return out


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("frames", [1, 4, 9, 12, 14])
def test_schedule_equals_the_published_one(frames, width, reverse):
    ours = list(chunks(frames, width, reverse))
    assert [f for c in ours for f in c.frames(reverse)] == list(range(frames))[
        :: -1 if reverse else 1
    ]
    for rank in range(width):
        theirs = reference.schedule(frames, width, rank, reverse)
        assert theirs["computed"] == [c.rows(width)[rank] for c in ours]
        assert all(frame == got for frame, got in theirs["calls"])
    kept, at = reference.schedule(frames, width, 0, reverse)["kept"], 0
    for number, chunk in enumerate(ours):  # this chunk and the next one, nothing else
        alive = sorted(f for c in ours[number : number + 2] for f in c.frames())
        for _ in chunk.frames():
            assert kept[at] == alive
            at += 1


@pytest.mark.parametrize("seed", range(40))
def test_nms_equals_the_published_one(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 15))
    masks = rectangles(rng, count, (9, 13))
    probs = rng.uniform(0.2, 1, count).astype(np.float32)
    if seed % 2:
        probs = np.round(probs, 1)  # ties, and probabilities equal to the threshold
    thresholds = ((0.5, 0.1), (0.4, 0.5), (0.5, 0.0))[seed % 3]
    want = reference.nms(probs, masks, *thresholds)
    keep = device_nms(probs, masks > 0, prob_threshold=thresholds[0], iou_threshold=thresholds[1])
    np.testing.assert_array_equal(keep, want)
    logits = np.log(probs / np.maximum(1 - probs, 1e-3))
    np.testing.assert_array_equal(lower(logits, keep), logits - np.float32(1e4) * ~want)


def test_nms_of_prompts_is_that_of_each_alone():
    rng = np.random.default_rng(3)
    masks = np.stack([rectangles(rng, 7, (9, 13)) for _ in range(3)]) > 0
    probs = rng.uniform(0.2, 1, (3, 7)).astype(np.float32)
    together = device_nms(probs, masks)
    for p in range(3):
        np.testing.assert_array_equal(together[p], device_nms(probs[p], masks[p]))


def test_nms_looks_at_the_threshold_as_strict():
    masks = np.zeros((2, 1, 10), bool)
    masks[0, 0, :10], masks[1, 0, :1] = True, True  # IoU .1 exactly
    assert device_nms(np.array([0.9, 0.8], np.float32), masks).tolist() == [True, True]
    masks[1, 0, :2] = True
    assert device_nms(np.array([0.9, 0.8], np.float32), masks).tolist() == [True, False]
    assert device_nms(np.array([0.5, 0.6], np.float32), masks[:, :, ::-1]).tolist() == [False, True]


@pytest.mark.parametrize("seed", range(60))
def test_association_equals_the_published_one(seed):
    rng = np.random.default_rng(seed)
    sizes = [(12, 16), (12, 16), (7, 9), (17, 23)]
    n, m = (int(rng.integers(0, 6)) for _ in range(2))
    tracks = rectangles(rng, m, sizes[0])
    detections = rectangles(rng, n, sizes[0])
    for k in range(min(n, m)):  # half of them look like a track
        if rng.random() < 0.7:
            detections[k] = np.roll(tracks[rng.integers(m)], rng.integers(-2, 3), 1)
    detections = np.ascontiguousarray(resized(detections, sizes[seed % 4]))
    scores = np.round(rng.uniform(0.5, 1, n), 1).astype(np.float32)
    ids = rng.permutation(20)[:m].astype(np.int64)
    rules = RELEASED if seed % 3 else Rules(new_score=0.6, match_iou=0.3, track_iou=0.6)
    ours = associate(detections, scores, tracks, ids, rules)
    new, unmatched, tracks_of, confident, empty = reference.associate(
        detections, scores, tracks, ids, rules
    )
    np.testing.assert_array_equal(ours.new, new)
    np.testing.assert_array_equal(ours.unmatched, unmatched)
    np.testing.assert_array_equal(ours.empty, empty)
    assert ours.confident == confident
    assert {k: v.tolist() for k, v in ours.tracks_of.items()} == {
        k: v.tolist() for k, v in tracks_of.items()
    }


@pytest.mark.parametrize("seed", range(30))
def test_suppression_equals_the_published_one(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 7))
    masks = rectangles(rng, count, (9, 13)) > 0
    for k in range(count):
        if rng.random() < 0.7:
            masks[k] = np.roll(masks[0], rng.integers(2), 1)
    last = rng.choice([-1, 3, 4, 5, 100_000], count).astype(np.int64)
    for reverse in (False, True):
        want = reference.suppress(masks, last, RELEASED, reverse)
        np.testing.assert_array_equal(suppress(masks, last, RELEASED, reverse), want)


RULES = {
    "released": RELEASED,
    "strict": Rules(hot_start=6, unmatched=2, duplicate=3, keep_alive_start=2, hide_unmatched=True),
    "few objects": Rules(hot_start=8, unmatched=3, duplicate=2, most_objects=4),
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_plans_of_a_video_equal_the_published_ones(name, reverse):
    """Videos in which tracks drift, fade, split and overlap, and detections come and go."""
    happened: Counter[str] = Counter()
    for seed in range(6):
        happened += follow(RULES[name], np.random.default_rng((seed, reverse)), reverse)
    expected = {"new", "removed", "silenced"}
    expected |= {"hidden"} if RULES[name].hide_unmatched else set()
    expected |= {"dropped"} if RULES[name].most_objects else set()
    assert set(happened) == expected, "the case has lost its point"


def follow(rules: Rules, rng: np.random.Generator, reverse: bool) -> Counter[str]:
    """Forty frames through both planners, equal on each; how often what happened."""
    planner, state = reference.Planner(rules), TrackState()
    size, seen = (10, 14), {}
    happened: Counter[str] = Counter()
    steady = rng.uniform(0.3, 0.8)  # the share of tracks that are detected
    for step in range(40):
        frame = 39 - step if reverse else step
        tracks = [_moved(rng, seen.get(i), size) for i in state.ids]
        if len(tracks) > 1 and rng.random() < 0.4:  # one drifts onto another
            tracks[rng.integers(len(tracks))] = tracks[rng.integers(len(tracks))]
        tracks = np.stack(tracks) if tracks else np.zeros((0, *size), np.float32)
        found = [
            np.roll(t, rng.integers(2), 1)
            for t in tracks
            if rng.random() < steady and (t > 0).any()
        ]
        found += list(rectangles(rng, int(rng.integers(0, 3)) if len(tracks) < 9 else 0, size))
        if rng.random() < 0.1:
            found = []
        detections = np.stack(found) if found else np.zeros((0, *size), np.float32)
        scores = rng.uniform(0.5, 1, len(detections)).astype(np.float32)
        want = planner.step(frame, detections, scores, tracks, reverse)

        matches = associate(detections, scores, tracks, np.array(state.ids, np.int64), rules)
        after, ours = plan(state, frame, matches, scores, rules, reverse)
        after, silenced = silence(state, after, frame, tracks > 0, ours.removed, rules, reverse)
        assert ours.new.tolist() == want["new"]
        assert ours.new_ids.tolist() == want["new_ids"]
        assert ours.removed == want["removed"]
        assert ours.hidden == want["hidden"]
        assert ours.dropped == want["dropped"]
        assert list(after.ids) == want["ids"]
        assert silenced.tolist() == want["silenced"]
        assert dict(after.last_occluded) == want["last_occluded"]
        assert dict(after.keep_alive) == want["keep_alive"]
        assert after.score == pytest.approx(want["score"])
        happened += Counter(
            new=len(ours.new),
            removed=len(ours.removed),
            silenced=int(silenced.sum()),
            hidden=len(ours.hidden),
            dropped=ours.dropped,
        )
        seen = dict(zip(state.ids, tracks))
        seen |= {int(i): detections[n] for i, n in zip(ours.new_ids, ours.new)}
        state = after
    return happened


def _moved(rng: np.random.Generator, mask: np.ndarray | None, size: tuple[int, int]) -> np.ndarray:
    draw = rng.random()
    if mask is None or draw < 0.06:
        return np.full(size, -1, np.float32)
    if draw < 0.1:
        return rectangles(rng, 1, size)[0]
    return np.roll(mask, rng.integers(-1, 2), rng.integers(2))
