"""Clips: which frames of a video are learnt from together, and what is asked of them.

A clip is F annotated frames at one stride, forwards or backwards, with the same phrases asked in
every frame and one geometric transform for all of them. A still picture becomes a clip by motion:
there the transform's crop drifts. All choices follow from (seed, epoch, row): no state, the same in
any worker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam3jax.config import DataConfig
from sam3jax.data import prompts as asking
from sam3jax.data import transforms
from sam3jax.data.coco import Annotation, ImageRecord
from sam3jax.data.prompts import Question, Shapes
from sam3jax.data.transforms import Transform
from sam3jax.data.videos import Video, VideoDataset


class Sampling(NamedTuple):
    """How clips are cut. frames: of a clip; min_stride, max_stride: annotated frames from one to the next.

    reverse: probability of going backwards. motion: of a still picture, as a share of its edges.
    max_objects: of a clip.
    """

    frames: int = 4
    max_stride: int = 5
    reverse: float = 0.5
    motion: float = 0.15
    max_objects: int = 300
    min_stride: int = 1


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip: frame numbers of its video in order, and the transform of each frame."""

    video: Video
    frames: tuple[int, ...]
    transforms: tuple[Transform, ...]


def draw_clip(
    video: Video, size: int, config: DataConfig, sampling: Sampling, rng: np.random.Generator
) -> Clip:
    """A random clip of a video, moved onto a `size` x `size` canvas.

    The number of draws does not depend on the video or the settings.
    """
    stride_draw, start_draw, coin = rng.random(3)
    drift = rng.uniform(-1, 1, 2)
    place = video.annotated
    most = max((len(place) - 1) // max(sampling.frames - 1, 1), 1)
    least = min(sampling.min_stride, most)
    stride = least + int(stride_draw * (min(sampling.max_stride, most) - least + 1))
    span = (sampling.frames - 1) * stride + 1
    first = int(start_draw * max(len(place) - span + 1, 1))
    numbers = [place[_to_and_fro(first + k * stride, len(place))] for k in range(sampling.frames)]
    if coin < sampling.reverse:
        numbers.reverse()
    transform = transforms.draw_transform(rng, video.width, video.height, size, config)
    moved = [transform] * sampling.frames
    if len(place) == 1 and sampling.frames > 1:
        moved = _drifting(transform, sampling.frames, drift * sampling.motion, video)
    return Clip(video, tuple(numbers), tuple(moved))


def questions_of_clip(
    clip: Clip,
    names: dict[int, str],
    config: DataConfig,
    sampling: Sampling,
    *,
    targets: int,
    seed: int,
    epoch: int,
    row: int,
) -> tuple[list[Question], list[int]]:
    """What is asked in every frame, and the objects that answer: `Question.targets` point into them.

    An object is asked for if it is in any frame of the clip; absent categories are absent in all.
    """
    record, objects = _union(clip, sampling.max_objects)
    questions = asking.training_questions(
        record, names, config, targets=targets, seed=seed, epoch=epoch, row=row
    )
    return list(questions), objects


def evaluation_clips(video: Video, frames: int, size: int) -> list[Clip]:
    """The whole video in consecutive clips of annotated frames; the last one repeats its last frame."""
    place = video.annotated
    square = transforms.square(video.width, video.height, size)
    clips = []
    for first in range(0, len(place), frames):
        numbers = [place[min(first + k, len(place) - 1)] for k in range(frames)]
        clips.append(Clip(video, tuple(numbers), (square,) * frames))
    return clips


def usable(dataset: VideoDataset, sampling: Sampling) -> tuple[VideoDataset, list[str]]:
    """The videos that clips can be cut from, and what people should know about the others."""
    videos = tuple(v for v in dataset.videos if v.annotated)
    lines = []
    if lost := len(dataset.videos) - len(videos):
        lines.append(f"{lost} videos without an annotated frame are left out")
    lengths = np.array([len(v.annotated) for v in videos])
    if still := int((lengths == 1).sum()):
        lines.append(f"{still} videos of one annotated frame become clips by motion of the picture")
    if short := int(((lengths > 1) & (lengths < sampling.frames)).sum()):
        lines.append(
            f"{short} videos have fewer than {sampling.frames} annotated frames: they are run to and "
            f"fro; lower clips.frames to avoid that"
        )
    span = (sampling.frames - 1) * sampling.max_stride + 1
    if slow := int(((lengths >= sampling.frames) & (lengths < span)).sum()):
        lines.append(
            f"{slow} videos are too short for stride {sampling.max_stride} and are used at smaller ones"
        )
    return replace(dataset, videos=videos), lines


def clip_shapes(dataset: VideoDataset, config: DataConfig, sampling: Sampling) -> Shapes:
    """Static sizes that hold every clip. T and M count objects of a whole video, a bound for any clip."""
    used = sorted({i for video in dataset.videos for i in video.categories()})
    most = min(config.positives or config.max_prompts, config.max_prompts)
    prompts = targets = instances = 1
    for video in dataset.videos:
        counts: dict[int, set[int]] = {}
        for frame in video.labels:
            for a in frame.annotations:
                if not a.iscrowd:
                    counts.setdefault(a.category_id, set()).add(a.id)
        sizes = sorted(min(len(c), config.max_targets or len(c)) for c in counts.values())[::-1]
        # A clip may show less than its video: then more of its categories are absent.
        absent = len(used) + len(config.negative_phrases)
        prompts = max(prompts, min(config.max_prompts, len(sizes) + absent))
        targets = max(targets, *sizes, 1)
        instances = max(instances, sum(sizes[:most]))
    return Shapes(prompts, targets, min(instances, sampling.max_objects), config.exemplars)


def phrases_of_videos(dataset: VideoDataset) -> dict[int, str]:
    """Category id -> phrase, of those with at least one object, in increasing order of id."""
    used = sorted({i for video in dataset.videos for i in video.categories()})
    return {i: dataset.categories[i] for i in used}


def frame_record(video: Video, number: int) -> ImageRecord:
    """One annotated frame as a picture; its pixels are `video.frames[number]`, not its file."""
    return ImageRecord(
        id=number,
        file=Path(video.name),
        width=video.width,
        height=video.height,
        annotations=video.labels[number].annotations,
        negative_ids=video.negative_ids,
        not_exhaustive_ids=video.not_exhaustive_ids,
    )


def _union(clip: Clip, most: int) -> tuple[ImageRecord, list[int]]:
    """A picture with every object that any frame of the clip shows, once; and their ids."""
    first: dict[tuple[int, int], Annotation] = {}
    for number in sorted(set(clip.frames)):
        for a in clip.video.labels[number].annotations:
            first.setdefault((a.id, a.category_id), a)
    chosen, dropped = list(first.values())[:most], list(first.values())[most:]
    record = frame_record(clip.video, clip.frames[0])
    partly = record.not_exhaustive_ids | {a.category_id for a in dropped}
    record = replace(record, annotations=tuple(chosen), not_exhaustive_ids=partly)
    return record, [a.id for a in chosen]


def _to_and_fro(step: int, length: int) -> int:
    """0, 1, ..., length - 1, length - 2, ..., 0, 1, ..."""
    if length == 1:
        return 0
    period = 2 * (length - 1)
    step %= period
    return step if step < length else period - step


def _drifting(
    transform: Transform, frames: int, drift: np.ndarray, video: Video
) -> list[Transform]:
    """The same transform with a crop that moves by `drift` (shares of the edges) over the clip."""
    left, top, width, height = transform.crop
    extent = np.array([video.width, video.height])
    # The crop shrinks where it has no room to move.
    size = np.minimum([width, height], extent * (1 - np.abs(drift)))
    start = np.clip(
        [left, top], np.maximum(-drift, 0) * extent, extent - size - np.maximum(drift, 0) * extent
    )
    out = []
    for k in range(frames):
        # Clipped again: rounding may leave the picture by a hair, which Pillow refuses.
        x, y = np.clip(start + drift * extent * k / (frames - 1), 0, extent - size)
        out.append(replace(transform, crop=(float(x), float(y), float(size[0]), float(size[1]))))
    return out
