"""What a video remembers of its tracks, and what changes on each frame: who is new, who is removed.

Answers to _process_hotstart, run_tracker_update_planning_phase and
_suppress_overlapping_based_on_recent_occlusion (sam3.model.sam3_video_base). States are never
changed: each function returns the next one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np

from sam3jax.video.association import NEVER, RELEASED, REMOVED, Association, Rules, suppress

GONE = -1e4  # score of a removed object
K = TypeVar("K")


@dataclass(frozen=True)
class TrackState:
    """Everything that the rules remember.

    ids: the tracks alive, oldest first. next_id: of the next new object; ids are never used twice.
    first_frame, keep_alive, score: by id, also of removed tracks. unmatched: id -> in how many frames
    no detection confirmed it; never set back. shared: (older, younger) -> how many detections both
    claimed.
    last_occluded: id -> frame in which it was last hidden or silenced.
    """

    ids: tuple[int, ...] = ()
    next_id: int = 0
    first_frame: Mapping[int, int] = field(default_factory=dict)
    keep_alive: Mapping[int, int] = field(default_factory=dict)
    score: Mapping[int, float] = field(default_factory=dict)
    unmatched: Mapping[int, int] = field(default_factory=dict)
    shared: Mapping[tuple[int, int], int] = field(default_factory=dict)
    last_occluded: Mapping[int, int] = field(default_factory=dict)
    removed: frozenset[int] = frozenset()


class Plan(NamedTuple):
    """What changes on a frame: detections that become tracks, their ids, tracks that go or are hidden."""

    new: np.ndarray
    new_ids: np.ndarray
    removed: frozenset[int]
    hidden: frozenset[int]
    dropped: int  # new objects beyond rules.most_objects


def plan(
    state: TrackState,
    frame: int,
    found: Association,
    scores: np.ndarray,
    rules: Rules = RELEASED,
    reverse: bool = False,
) -> tuple[TrackState, Plan]:
    """Who is new and who is removed on this frame, and the state after it. scores [N] of detections.

    A young track is removed at once when it was unmatched in `rules.unmatched` frames (they need not
    be consecutive), or when it shared `rules.duplicate` detections with a track that appeared before.
    """
    new = found.new
    if rules.most_objects is not None:
        room = max(rules.most_objects - len(state.ids), 0)
        if len(new) > room:  # the strongest stay
            new = new[np.argsort(scores[new])[::-1][:room]]
    dropped = len(found.new) - len(new)
    new_ids = state.next_id + np.arange(len(new))
    starts = dict.fromkeys(new_ids.tolist(), frame)
    first = {**starts, **state.first_frame}
    alive = _keep_alive(state, found, starts, rules)
    unmatched = _counted(state.unmatched, found.unmatched.tolist())
    shared = _counted(state.shared, _claims(found, first, reverse))

    limit = frame + rules.hot_start if reverse else frame - rules.hot_start
    young = lambda i: first[i] < limit if reverse else first[i] > limit
    removed = {i for i, n in unmatched.items() if n >= rules.unmatched and young(i)}
    hidden = {
        i for i in unmatched if rules.hide_unmatched and alive[i] <= 0 and i not in removed
    } - state.removed
    removed |= {i for (_, i), n in shared.items() if n >= rules.duplicate and young(i)}
    removed -= state.removed
    after = replace(
        state,
        ids=tuple(i for i in (*state.ids, *new_ids.tolist()) if i not in removed),
        next_id=state.next_id + len(new),
        first_frame=first,
        keep_alive=alive,
        score={
            **state.score,
            **dict(zip(new_ids.tolist(), scores[new].tolist())),
            **dict.fromkeys(removed, GONE),
        },
        unmatched=unmatched,
        shared=shared,
        removed=state.removed | removed,
    )
    return after, Plan(new, new_ids, frozenset(removed), frozenset(hidden), dropped)


def silence(
    state: TrackState,
    after: TrackState,
    frame: int,
    masks: np.ndarray,
    removed: frozenset[int],
    rules: Rules = RELEASED,
    reverse: bool = False,
) -> tuple[TrackState, np.ndarray]:
    """Which tracks of the frame are silenced [N] bool, and the state that remembers it.

    state: before the frame; after: what `plan` made of it; masks [N, Y, X] bool of `state.ids`.
    An object removed now, and never hidden before, gives way to every other that was.
    """
    last = np.array(
        [state.last_occluded.get(i, REMOVED if i in removed else NEVER) for i in state.ids],
        np.int64,
    )
    silenced = suppress(masks, last, rules, reverse)
    hidden = silenced | ~masks.any((1, 2))
    last = np.where(hidden, frame, last)
    remembered = dict(zip(state.ids, last.tolist()))
    for i in removed:
        remembered.pop(i, None)
    return replace(after, last_occluded=remembered), silenced


def forget(state: TrackState, ids: Collection[int]) -> TrackState:
    """The state without anything about these tracks, which have ended; a long video has many."""
    if not ids:
        return state
    without = lambda by_id: {i: v for i, v in by_id.items() if i not in ids}
    return replace(
        state,
        ids=tuple(i for i in state.ids if i not in ids),
        first_frame=without(state.first_frame),
        keep_alive=without(state.keep_alive),
        score=without(state.score),
        unmatched=without(state.unmatched),
        shared={pair: n for pair, n in state.shared.items() if not set(pair) & set(ids)},
        last_occluded=without(state.last_occluded),
        removed=state.removed - set(ids),
    )


def _keep_alive(
    state: TrackState, found: Association, starts: Mapping[int, int], rules: Rules
) -> dict[int, int]:
    """A counter for each track: up where a detection overlaps it, down where none confirms it."""
    alive = {**state.keep_alive, **dict.fromkeys(starts, rules.keep_alive_start)}
    for i in {int(i) for ids in found.tracks_of.values() for i in ids}:
        alive[i] = min(rules.keep_alive_most, alive[i] + 1)
    for i in found.unmatched.tolist():
        alive[i] = max(rules.keep_alive_least, alive[i] - 1)
    return alive


def _claims(found: Association, first: Mapping[int, int], reverse: bool) -> list[tuple[int, int]]:
    """(older, younger) for each detection that several tracks overlap, once a detection."""
    pairs: list[tuple[int, int]] = []
    oldest = max if reverse else min
    for ids in found.tracks_of.values():
        if len(ids) > 1:
            chief = oldest(ids.tolist(), key=lambda i: first[i])
            pairs += [(chief, i) for i in ids.tolist() if i != chief]
    return pairs


def _counted(counts: Mapping[K, int], keys: Iterable[K]) -> dict[K, int]:
    out = dict(counts)
    for key in keys:
        out[key] = out.get(key, 0) + 1
    return out
