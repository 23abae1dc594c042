"""Ask a model for the objects of whole videos, and measure them: HOTA, J&F, identity switches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle_codec

from sam3jax.data.videos import Video, VideoDataset
from sam3jax.evaluation.video import Frame, Hota, VideoScores, hota, identity_switches
from sam3jax.video.objects import VideoFrame
from sam3jax.video.predictor import VideoPredictor

Rle = Any  # compressed run lengths; a mapping to everyone but pycocotools' stubs
Masks = dict[int, Rle]  # by object or track


def evaluate_tracks(predictor: VideoPredictor, videos: VideoDataset) -> dict[str, float]:
    """Metrics of tracks: video/HOTA, DetA, AssA, LocA, J, F, J&F, switches (of an identity, per object).

    A video is asked what is known of it: every category, or where it names its negatives those and
    what is there. Only annotated frames count; void pixels are neither right nor wrong. HOTA's counts
    are added over videos and phrases, without the phrases that a video may hold more of than is
    annotated; J and F are means over objects.
    """
    counts, switches, objects = Hota(), 0, 0
    region = np.zeros(2)  # sums of J and F
    for video in videos.videos:
        known = asked_of(video, videos)
        if not known or not video.annotated:
            continue
        found = {f.number: f for f in predictor.objects(video.frames, list(known.values()))}
        for category, phrase in known.items():
            pairs = [_masks(video, n, found.get(n), category, phrase) for n in video.annotated]
            frames = [_overlaps(*pair) for pair in pairs]
            if category not in video.not_exhaustive_ids:
                counts = counts + hota(frames)
            changed, seen = identity_switches(frames)
            switches, objects = switches + changed, objects + seen
            scores = _regions(pairs)
            region += seen * np.array([scores.get("J", 0.0), scores.get("F", 0.0)])
    j, f = (region / max(objects, 1)).tolist()
    named = {**counts.result(), "J": j, "F": f, "J&F": (j + f) / 2}
    named["switches"] = switches / max(objects, 1)
    return {f"video/{name}": value for name, value in named.items()}


def asked_of(video: Video, videos: VideoDataset) -> dict[int, str]:
    """Category -> phrase of what is known to be in the video or not."""
    known = videos.categories
    if video.negative_ids is None:
        return dict(known)
    there = video.categories() | video.negative_ids
    return {i: phrase for i, phrase in known.items() if i in there}


def _masks(
    video: Video, number: int, found: VideoFrame | None, category: int, phrase: str
) -> tuple[Masks, Masks]:
    """Objects and tracks of one phrase in one frame, void pixels taken out of both.

    Objects that are boxes alone are left out, and tracks that are in void alone.
    """
    labels = video.labels[number]
    true = {
        a.id: a.segmentation
        for a in labels.annotations
        if a.category_id == category and not a.iscrowd and isinstance(a.segmentation, Mapping)
    }
    tracks = {o.id: o.mask for o in found.objects if o.phrase == phrase} if found else {}
    if labels.void is None:
        return true, tracks
    keep = rle_codec.decode(labels.void) == 0
    true, tracks = ({i: _only(m, keep) for i, m in of.items()} for of in (true, tracks))
    return true, {i: m for i, m in tracks.items() if rle_codec.area(m)}


def _only(mask: Rle, keep: np.ndarray) -> Rle:
    return rle_codec.encode(np.asfortranarray(rle_codec.decode(mask) * keep))


def _overlaps(true: Masks, tracks: Masks) -> Frame:
    """(true ids, found ids, mask IoU [n, m])."""
    overlap = np.zeros((len(true), len(tracks)))
    if true and tracks:
        crowd = [0] * len(tracks)
        overlap = np.asarray(rle_codec.iou(list(true.values()), list(tracks.values()), crowd))
    return list(true), list(tracks), overlap


def _regions(frames: Sequence[tuple[Masks, Masks]]) -> dict[str, float]:
    scores = VideoScores()
    for pair in frames:
        true, tracks = ({i: rle_codec.decode(m) > 0 for i, m in of.items()} for of in pair)
        scores.add(true, tracks)
    return scores.result()
