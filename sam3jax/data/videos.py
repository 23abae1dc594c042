"""Videos and what is annotated in them, as immutable records. `video_folders` reads them.

`Annotation.id` is the object's number in its video, the same in all frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pycocotools import mask as rle_codec

from sam3jax.data.coco import Annotation
from sam3jax.data.describe import entry_lines
from sam3jax.data.frames import Film, FrameFiles, Still
from sam3jax.data.ledger import Ledger
from sam3jax.data.names import renamed
from sam3jax.data.pictures import Reading

VOID = 255  # of palette masks: a pixel of which nobody knows what it is


@dataclass(frozen=True, slots=True, eq=False)
class FrameLabels:
    """What is known of a frame.

    annotated: False where nobody looked: not an empty frame. void: pixels that are neither target nor
    error, a compressed RLE; None: no such pixel.
    """

    annotations: tuple[Annotation, ...] = ()
    annotated: bool = True
    void: Mapping[str, Any] | None = None


NOT_ANNOTATED = FrameLabels(annotated=False)


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """One video. labels: one for each frame.

    negative_ids, not_exhaustive_ids: categories, for the whole video, as in `ImageRecord`.
    """

    id: int
    name: str
    frames: FrameFiles | Film | Still
    labels: tuple[FrameLabels, ...]
    negative_ids: frozenset[int] | None = None
    not_exhaustive_ids: frozenset[int] = frozenset()

    @property
    def width(self) -> int:
        return self.frames.width

    @property
    def height(self) -> int:
        return self.frames.height

    @property
    def annotated(self) -> tuple[int, ...]:
        """Numbers of the annotated frames."""
        return tuple(k for k, frame in enumerate(self.labels) if frame.annotated)

    def objects(self) -> dict[int, list[int]]:
        """Object -> numbers of the frames in which it is seen."""
        found: dict[int, list[int]] = {}
        for number, frame in enumerate(self.labels):
            for annotation in frame.annotations:
                found.setdefault(annotation.id, []).append(number)
        return found

    def categories(self) -> set[int]:
        """Categories of its objects."""
        return {a.category_id for frame in self.labels for a in frame.annotations}


@dataclass(frozen=True, slots=True, eq=False)
class VideoDataset:
    """One split. problems: one sentence and a count for each kind of oddity. stated_masks: of annotations,
    also those that cannot be read; None where all could."""

    name: str
    videos: tuple[Video, ...]
    categories: Mapping[int, str]
    problems: Mapping[str, int] = field(default_factory=dict)
    stated_masks: int | None = None


def rename_phrases(dataset: VideoDataset, phrases: Mapping[str, str]) -> VideoDataset:
    """The same data under other phrases, as far as they name its categories; those given the same phrase
    become one."""
    ledger = Ledger(dataset.problems)
    own, merged = renamed(dataset.categories, phrases, ledger)
    if own == dict(dataset.categories):
        return dataset

    def renumbered(video: Video) -> Video:
        new = lambda ids: None if ids is None else frozenset(merged[i] for i in ids)
        labels = tuple(
            replace(f, annotations=tuple(replace(a, category_id=merged[a.category_id]) for a in f.annotations))
            for f in video.labels
        )  # fmt: skip
        unknown = new(video.not_exhaustive_ids) or frozenset()
        return replace(video, labels=labels, negative_ids=new(video.negative_ids), not_exhaustive_ids=unknown)  # fmt: skip

    videos = dataset.videos
    if any(merged[i] != i for i in merged):
        videos = tuple(map(renumbered, videos))
    return replace(dataset, videos=videos, categories=own, problems=ledger)


def read_as(dataset: VideoDataset, reading: Reading) -> VideoDataset:
    """The same data with frames that are pictures read in this way."""

    def video_as(video: Video) -> Video:
        frames = video.frames
        if not isinstance(frames, FrameFiles):
            return video
        return replace(video, frames=FrameFiles(frames.files, frames.rate, reading))

    return replace(dataset, videos=tuple(map(video_as, dataset.videos)))


def annotation_of_mask(mask: np.ndarray, object_id: int, category_id: int) -> Annotation | None:
    """The annotation of the True pixels of [Y, X]; None where there is none."""
    if not mask.any():
        return None
    rle = rle_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    return annotation_of_rle(rle, object_id, category_id)


def annotation_of_rle(
    rle: Mapping[str, Any], object_id: int, category_id: int, iscrowd: bool = False
) -> Annotation:
    """The annotation of a compressed RLE that holds at least one pixel."""
    left, top, width, height = rle_codec.toBbox(rle).tolist()
    area = float(rle_codec.area(rle))
    return Annotation(object_id, category_id, (left, top, width, height), rle, iscrowd, area)


def describe_videos(dataset: VideoDataset) -> list[str]:
    """Lines for people: how much there is, how long objects are seen, what was left out."""
    frames = sum(len(v.labels) for v in dataset.videos)
    seen = sum(len(v.annotated) for v in dataset.videos)
    tracks = [len(numbers) for v in dataset.videos for numbers in v.objects().values()]
    lines = [
        f"{dataset.name}: {len(dataset.videos):,} videos, {frames:,} frames ({seen:,} annotated), "
        f"{len(tracks):,} objects in {len(dataset.categories):,} categories"
    ]
    if tracks:
        lines.append(
            f"an object is seen in {min(tracks)} to {max(tracks)} frames, {np.median(tracks):.0f} in "
            f"the median"
        )
    return [*lines, *entry_lines(dataset.problems)]
