"""What is found in a video, in the video's own pixels: frame by frame, object by object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sam3jax.inference.full_size import enlarge_masks
from sam3jax.video.tracks import Tracked


@dataclass(frozen=True)
class VideoObject:
    """One object in one frame. box_xyxy in pixels; mask: a compressed COCO RLE of the frame's size."""

    id: int
    phrase: str
    score: float
    box_xyxy: tuple[float, float, float, float]
    mask: dict[str, Any]


@dataclass(frozen=True)
class VideoFrame:
    """All objects of one frame, strongest first."""

    number: int
    width: int
    height: int
    objects: tuple[VideoObject, ...]


def full_size_frames(
    tracks: Iterable[tuple[int, list[Tracked]]],
    phrases: Sequence[str],
    width: int,
    height: int,
    mask_threshold: float = 0.5,
) -> Iterator[VideoFrame]:
    """Tracked objects at the model's size -> the same in pixels of the video."""
    scale = np.array([width, height, width, height], np.float32)
    for number, found in tracks:
        found = sorted(found, key=lambda t: -t.score)
        masks: list[dict[str, Any]] = []
        if found:
            logits = np.stack([t.mask for t in found])
            masks = enlarge_masks(logits, height, width, threshold=mask_threshold)
        objects = [
            VideoObject(t.id, phrases[t.phrase], t.score, tuple((t.box_xyxy * scale).tolist()), m)
            for t, m in zip(found, masks, strict=True)
        ]
        yield VideoFrame(number, width, height, tuple(objects))
