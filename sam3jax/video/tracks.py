"""Plain tracking by detection: identities across frames where no memory is needed.

The published rules (`association`, `planning`) want a mask of each track in the new frame, which their
tracker propagates by memory. Here it is the detection that lies where the track was heading, one to
one; a track without one has no mask in this frame. A tracker with memory takes the place of
`Follower.propagate` and leaves the rest as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from sam3jax.video.association import RELEASED, Rules, associate, mask_iou
from sam3jax.video.chunks import FrameDetections
from sam3jax.video.planning import TrackState, forget, plan, silence

_OUTSIDE = -10.0  # mask logit where nothing is


@dataclass(frozen=True)
class Tracked:
    """One object in one frame. phrase: its number; id: the same in all frames, never used twice.

    score 0..1; box_xyxy [4] in 0..1; mask [Y', X'] logits at the model's mask size.
    """

    id: int
    phrase: int
    score: float
    box_xyxy: np.ndarray
    mask: np.ndarray


class _Seen(NamedTuple):
    """Where a track was last detected: frame, mask [Y, X] bool, centre and velocity in pixels."""

    frame: int
    mask: np.ndarray
    centre: np.ndarray
    velocity: np.ndarray


class Follower:
    """The tracks of one phrase. Frames come in order, forwards or backwards."""

    def __init__(self, rules: Rules = RELEASED, reverse: bool = False, patience: int = 15) -> None:
        """patience: frames without a detection after which a track has ended."""
        self.rules, self.reverse, self.patience = rules, reverse, patience
        self.state = TrackState()
        self._seen: dict[int, _Seen] = {}

    def step(
        self, frame: int, masks: np.ndarray, scores: np.ndarray
    ) -> tuple[dict[int, int], frozenset[int]]:
        """mask logits [N, Y, X] and scores [N] of the frame's detections.

        Returns ({track id: its detection}, ids removed now: they are to be hidden in all frames).
        """
        before = self.state
        inside = masks > 0
        matched = self.propagate(frame, inside)
        found_by = {track: n for n, track in matched.items()}
        empty = np.full(masks.shape[1:], _OUTSIDE, masks.dtype)
        # A track that nothing was found for is where it was heading; that counts against young ones.
        tracks = [
            masks[found_by[i]] if i in found_by else np.where(self._heading(i, frame), 1, empty)
            for i in before.ids
        ]
        tracks = np.stack(tracks) if tracks else np.zeros((0, *masks.shape[1:]), masks.dtype)
        ids = np.array(before.ids, np.int64)
        pairs = associate(masks, scores, tracks, ids, self.rules)
        after, changes = plan(before, frame, pairs, scores, self.rules, self.reverse)
        seen = np.array([i in found_by for i in before.ids], bool)
        after, silenced = silence(
            before, after, frame, (tracks > 0) & seen[:, None, None], changes.removed,
            self.rules, self.reverse,
        )  # fmt: skip
        quiet = {i for i, off in zip(before.ids, silenced) if off} | changes.removed
        shown = {i: n for i, n in found_by.items() if i not in quiet}
        shown |= {int(i): int(n) for i, n in zip(changes.new_ids, changes.new)}
        for i, n in {**found_by, **shown}.items():
            self._remember(i, frame, inside[n])
        lost = {i for i in after.ids if abs(frame - self._seen[i].frame) > self.patience}
        ended = lost | changes.removed
        self.state = forget(after, ended)
        for i in ended:
            self._seen.pop(i, None)
        return shown, changes.removed

    def propagate(self, frame: int, detections: np.ndarray) -> dict[int, int]:
        """Detection -> track, one to one, by the overlap with where each track was heading."""
        ids = self.state.ids
        if not ids or not len(detections):
            return {}
        heading = np.stack([self._heading(i, frame) for i in ids])
        iou = mask_iou(detections, heading)
        rows, columns = linear_sum_assignment(-iou)
        return {int(n): ids[m] for n, m in zip(rows, columns) if iou[n, m] >= self.rules.match_iou}

    def _heading(self, track: int, frame: int) -> np.ndarray:
        """Its last mask, moved on at its last speed."""
        seen = self._seen[track]
        x, y = np.rint(seen.velocity * abs(frame - seen.frame)).astype(int)
        return _shifted(seen.mask, int(x), int(y))

    def _remember(self, track: int, frame: int, mask: np.ndarray) -> None:
        centre, old = _centre(mask), self._seen.get(track)
        velocity = np.zeros(2)
        if old is not None:
            moved = (centre - old.centre) / max(abs(frame - old.frame), 1)
            velocity = moved if not old.velocity.any() else (old.velocity + moved) / 2
        self._seen[track] = _Seen(frame, mask, centre, velocity)


def follow(
    detections: Iterable[tuple[int, FrameDetections]],
    *,
    threshold: float | Sequence[float] = 0.5,
    rules: Rules = RELEASED,
    reverse: bool = False,
) -> Iterator[tuple[int, list[Tracked]]]:
    """The objects of each frame, from the detections of each frame, in the same order.

    Comes `rules.hot_start` frames late: an object that the rules remove meanwhile was never there.
    threshold: score above which a detection is looked at, one or one a phrase; the rules' scores move with
    it (`Rules.above`). Memory does not grow with the video.
    """
    followers: dict[int, Follower] = {}
    numbers: dict[tuple[int, int], int] = {}
    waiting: deque[tuple[int, list[Tracked]]] = deque()
    given = 0
    for frame, found in detections:
        shown: list[Tracked] = []
        for phrase in range(len(found.logits)):
            least = threshold[phrase] if isinstance(threshold, Sequence) else threshold
            follower = followers.setdefault(phrase, Follower(rules.above(least), reverse))
            scores = _sigmoid(np.asarray(found.logits[phrase], np.float32))
            masks = np.asarray(found.masks[phrase], np.float32)
            # A detection without a pixel is nowhere, so there is nothing to follow.
            chosen = np.flatnonzero((scores > least) & (masks > 0).any((1, 2)))
            masks = masks[chosen]
            tracks, removed = follower.step(frame, masks, scores[chosen])
            gone = {numbers.pop((phrase, i)) for i in removed if (phrase, i) in numbers}
            if gone:
                waiting = deque((f, [t for t in ts if t.id not in gone]) for f, ts in waiting)
            for i, n in tracks.items():
                if (phrase, i) not in numbers:
                    given += 1
                    numbers[phrase, i] = given
                box = np.asarray(found.boxes_xyxy[phrase, chosen[n]])
                shown.append(
                    Tracked(numbers[phrase, i], phrase, float(scores[chosen[n]]), box, masks[n])
                )
            alive = set(follower.state.ids)
            for key in [k for k in numbers if k[0] == phrase and k[1] not in alive]:
                del numbers[key]
        waiting.append((frame, shown))
        if len(waiting) > rules.hot_start:
            yield waiting.popleft()
    yield from waiting


def _shifted(mask: np.ndarray, x: int, y: int) -> np.ndarray:
    """The mask moved right by x and down by y pixels; what leaves the picture is gone."""
    out = np.zeros_like(mask)
    rows, columns = mask.shape
    if abs(x) >= columns or abs(y) >= rows:
        return out
    out[max(y, 0) : rows + min(y, 0), max(x, 0) : columns + min(x, 0)] = mask[
        max(-y, 0) : rows + min(-y, 0), max(-x, 0) : columns + min(-x, 0)
    ]
    return out


def _centre(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -80, 80)))
