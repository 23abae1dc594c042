"""Which detections of a frame are which tracks: the published rules, on plain numpy arrays.

Answers to _associate_det_trk and _get_objects_to_suppress_based_on_most_recently_occluded
(sam3.model.sam3_video_base). Nothing here keeps state; see `planning` for what a video remembers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

NEVER = -1  # last occlusion of an object that was always seen
REMOVED = 100_000  # last occlusion of an object that was removed on this frame; above any frame
SILENT = -10.0  # logit of a mask that is silenced


@dataclass(frozen=True)
class Rules:
    """The released settings. Scores are probabilities, overlaps are IoUs of masks."""

    new_score: float = 0.7  # a detection that starts a track
    match_iou: float = 0.1  # a detection that is no new object
    track_iou: float = 0.5  # a detection that confirms a track
    confident_score: float = 0.8  # a detection that may renew a track's memory
    confident_iou: float = 0.8
    hot_start: int = (
        15  # frames in which a young track may still be removed; also the output's delay
    )
    unmatched: int = 8  # frames without a detection after which a young track is removed
    duplicate: int = 8  # shared detections after which the younger of two tracks is removed
    overlap: float = 0.7  # of two tracks, above which the one occluded later is silenced
    keep_alive_start: int = 30
    keep_alive_most: int = 30
    keep_alive_least: int = -1
    hide_unmatched: bool = False  # also hide old tracks whose keep-alive has run out
    most_objects: int | None = None

    def above(self, threshold: float) -> Rules:
        """The same rules where a detection counts from `threshold`, and not from .5 as released.

        Scores keep their place between the threshold and 1: of a model with another calibration, .7 is
        as far above its threshold as the released .7 is above .5.
        """
        place = lambda score: threshold + (score - 0.5) * (1 - threshold) / 0.5
        scores = {n: place(getattr(self, n)) for n in ("new_score", "confident_score")}
        return replace(self, **scores)


RELEASED = Rules()


class Association(NamedTuple):
    """What detections and tracks of one frame are to each other.

    new [n] indices of detections; unmatched, empty: ids of tracks; tracks_of: detection -> ids of the
    tracks it overlaps; confident: track id -> the detection that may renew it.
    """

    new: np.ndarray
    unmatched: np.ndarray
    tracks_of: dict[int, np.ndarray]
    confident: dict[int, int]
    empty: np.ndarray


def associate(
    detections: np.ndarray,
    scores: np.ndarray,
    tracks: np.ndarray,
    ids: np.ndarray,
    rules: Rules = RELEASED,
) -> Association:
    """detections [N, y, x] and tracks [M, Y, X] are mask logits (> 0 is inside); scores [N]; ids [M].

    Without any track every detection is new, whatever its score. A track whose mask is empty counts
    as neither matched nor unmatched. Between `match_iou` and `track_iou` both hold: the track is
    unmatched, and the detection is not new.
    """
    ids = np.asarray(ids, np.int64)
    nobody = np.zeros(0, np.int64)
    if not len(tracks):
        return Association(np.arange(len(detections)), nobody, {}, {}, nobody)
    inside = (tracks > 0).any((1, 2))
    if not len(detections):
        return Association(nobody, ids[inside], {}, {}, ids[~inside])
    if detections.shape[1:] != tracks.shape[1:]:
        smaller = min(detections.shape[1:], tracks.shape[1:], key=np.prod)
        detections, tracks = resized(detections, smaller), resized(tracks, smaller)
    inside = (tracks > 0).any((1, 2))
    iou = mask_iou(detections > 0, tracks > 0)  # [N, M]
    unmatched = inside & ~(iou >= rules.track_iou).any(0)
    new = (scores >= rules.new_score) & ~(iou >= rules.match_iou).any(1)
    sure = (scores >= rules.confident_score) & ~new & (iou.max(1) >= rules.confident_iou)
    nearest = iou.argmax(1)
    return Association(
        new=np.flatnonzero(new),
        unmatched=ids[unmatched],
        tracks_of={n: ids[row >= rules.match_iou] for n, row in enumerate(iou)},
        confident={int(ids[nearest[n]]): int(n) for n in np.flatnonzero(sure)},
        empty=ids[~inside],
    )


def suppress(
    masks: np.ndarray, last_occluded: np.ndarray, rules: Rules = RELEASED, reverse: bool = False
) -> np.ndarray:
    """Which of overlapping tracks are silenced. masks [N, Y, X] bool -> [N] bool.

    last_occluded [N]: the frame in which each was last hidden, NEVER or REMOVED. Of a pair the one
    occluded later goes, provided that the other was ever occluded.
    """
    if len(masks) < 2:
        return np.zeros(len(masks), bool)
    last = np.asarray(last_occluded)
    pairs = mask_iou(masks, masks) >= rules.overlap
    np.fill_diagonal(pairs, False)
    mine, other = last[:, None], last[None]
    later = mine < other if reverse else mine > other
    return np.asarray((pairs & later & (other > NEVER)).any(1))


def mask_iou(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """masks [N, Y, X], others [M, Y, X] bool -> IoU [N, M] float32, 0 where both are empty."""
    a, b = (m.reshape(len(m), -1).astype(np.float32) for m in (masks, others))
    both = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1) - both
    return both / np.maximum(union, np.float32(1))


def resized(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """logits [N, Y, X] at another size: bilinear, half-pixel centres, not antialiased."""
    if logits.shape[1:] == tuple(size):
        return logits
    low_y, high_y, part_y = _taps(size[0], logits.shape[1])
    low_x, high_x, part_x = _taps(size[1], logits.shape[2])
    part_y = part_y[:, None]
    upper, lower = logits[:, low_y], logits[:, high_y]
    row = lambda rows: rows[..., low_x] * (1 - part_x) + rows[..., high_x] * part_x
    return row(upper) * (1 - part_y) + row(lower) * part_y


def _taps(size: int, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new cell the two old ones around it and its part of the way to the second."""
    scale = np.float32(cells) / np.float32(size)
    source = np.maximum(
        (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), 0
    )
    low = np.minimum(source.astype(np.int64), cells - 1)
    return low, np.minimum(low + 1, cells - 1), source - low.astype(np.float32)
