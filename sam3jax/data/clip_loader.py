"""Batches of clips: numpy arrays with static shapes, frames on the axis of images, clip by clip.

As in `loader`, a batch is a function of its number alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import grain
import numpy as np
from pycocotools import mask as rle_codec

from sam3jax.config import Config
from sam3jax.data import transforms
from sam3jax.data.augmentation import Change, draw_change
from sam3jax.data.clips import (
    Clip,
    Sampling,
    clip_shapes,
    draw_clip,
    phrases_of_videos,
    questions_of_clip,
)
from sam3jax.data.examples import (
    Arrays,
    empty_row,
    move_instance,
    put_instance,
    put_question,
    stack,
    to_prompts,
    to_targets,
)
from sam3jax.data.features import FeatureStore, checksums
from sam3jax.data.loader import TrainLoader
from sam3jax.data.pictures import DataError
from sam3jax.data.prompts import Question, Shapes
from sam3jax.data.streams import ENDLESS, Opaque, local_size, run_ahead
from sam3jax.data.videos import Video, VideoDataset
from sam3jax.types import ClipBatch

NO_OBJECT = -1  # object_id of a row of `boxes` and `masks` that holds nothing


def make_clip_loader(
    dataset: VideoDataset,
    phrases: tuple[str, ...],
    tokens: np.ndarray,
    config: Config,
    sampling: Sampling,
    *,
    features: FeatureStore | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainLoader:
    """Shuffled, augmented batches of config.batch_size frames, this process's clips of them.

    phrases: of the run; tokens [V, N], a row for each. features: what the trunk makes of the frames, read in
    their place; there are as many clips of a video as it holds views. Raises DataError.
    """
    if config.batch_size % sampling.frames:
        raise DataError(
            f"batch_size counts frames, and {config.batch_size} are no whole number of clips of "
            f"{sampling.frames}: use a multiple of clips.frames"
        )
    clips = config.batch_size // sampling.frames
    local = local_size(clips, process_count, "batch_size / clips.frames")
    order = grain.MapDataset.range(len(dataset.videos)).seed(config.seed).shuffle().repeat()
    batch_of = Opaque(
        _clip_batch,
        dataset=dataset,
        names=phrases_of_videos(dataset),
        order=order,
        text_ids={phrase: k for k, phrase in enumerate(phrases)},
        config=config,
        sampling=sampling,
        shapes=clip_shapes(dataset, config.data, sampling),
        features=features,
        stride=clips,
        offset=process_index * local,
        local=local,
        void=config.loss.reads_masks
        and any(f.void is not None for v in dataset.videos for f in v.labels),
    )
    identity = {"videos": len(dataset.videos), "frames": sampling.frames, "seed": config.seed}

    def stream(start: int) -> Iterator[ClipBatch]:
        for arrays in run_ahead(batch_of, start, ENDLESS, config.data.workers):
            yield clip_batch(arrays, tokens)

    pictures = None
    if features is not None:
        identity["views"] = features.views
        pictures = lambda number: clip_batch(batch_of(number, pixels=True), tokens)
    epoch = len(dataset.videos) * sampling.frames
    return TrainLoader(stream, config.batch_size, identity, epoch, pictures)


def clip_of(
    dataset: VideoDataset, row: int, turn: int, config: Config, sampling: Sampling
) -> tuple[Clip, Change | None]:
    """The clip of a video that a turn of the data shows, and how its pixels change."""
    place = (config.seed, turn, row)
    clip = draw_clip(
        dataset.videos[row], config.model.image_size, config.data, sampling,
        np.random.default_rng((*place, 1)),
    )  # fmt: skip
    return clip, draw_change(np.random.default_rng((*place, 2)), config.data)


def pixels_of(clip: Clip, change: Change | None) -> np.ndarray:
    """[F, Y, X, 3] uint8."""
    frames = zip(clip.frames, clip.transforms, strict=True)
    return np.stack([transforms.move_picture(t, clip.video.frames[k], change) for k, t in frames])


def clip_stamps(dataset: VideoDataset, views: int, config: Config, sampling: Sampling) -> list[int]:
    """`checksums` of what the first `views` clips of each video follow from."""

    def rows() -> Iterator[tuple[list[Path], str]]:
        for row, video in enumerate(dataset.videos):
            numbers = [clip_of(dataset, row, v, config, sampling)[0].frames for v in range(views)]
            files = [f for k in sorted({*chain(*numbers)}) for f in video.frames.sources(k)]
            yield list(dict.fromkeys(files)), f"{numbers} {video.width} {video.height}"

    return checksums(rows())


def clip_arrays(
    clip: Clip,
    questions: list[Question],
    objects: list[int],
    text_ids: dict[str, int],
    shapes: Shapes,
    *,
    number: int = 0,
    masks: bool = True,
    void: bool = False,
    change: Change | None = None,
    features: np.ndarray | None = None,
) -> Arrays:
    """The F rows of one clip. An object has the same row of `boxes` and `masks` in all frames.

    void: with the pixels of which nobody knows what they are.

    objects: the id of each object that `Question.targets` counts; number: of the clip in its batch. change: of
    the pixels of all frames. features: [F, y, x, D] in the place of pixels.
    """
    asked = list(dict.fromkeys(k for q in questions for k in q.targets))[: shapes.instances]
    slots = {k: slot for slot, k in enumerate(asked)}
    kinds = {k: q.category_id for q in questions for k in q.targets}
    images = pixels_of(clip, change) if features is None else features
    rows = []
    for step, (frame, transform) in enumerate(zip(clip.frames, clip.transforms, strict=True)):
        out = empty_row(shapes, transform) | {
            "images": images[step],
            "object_id": np.full(shapes.instances, NO_OBJECT, np.int32),
            "clip": np.int32(number),
            "frame": np.int32(frame),
            "stage": np.int32(step),
        }
        if void:
            out["void"] = _void(clip.video, frame, transform)
        here = {(a.id, a.category_id): a for a in clip.video.labels[frame].annotations}
        there: dict[int, int] = {}
        for k, slot in slots.items():
            out["object_id"][slot] = objects[k]
            annotation = here.get((objects[k], kinds[k]))
            if annotation is None:
                continue
            moved = move_instance(annotation, clip.video, transform, masks)
            if moved is not None:
                there[k] = slot
                put_instance(out, slot, moved)
        for p, question in enumerate(questions):
            put_question(out, p, question, there, text_ids)
        rows.append(out)
    return stack(rows)


def _void(video: Video, frame: int, transform: transforms.Transform) -> np.ndarray:
    """[Y, ceil(X / 8)] packed."""
    rle = video.labels[frame].void
    if rle is None:
        return transforms.pack_mask(np.zeros(transform.canvas[::-1], bool))
    return transforms.pack_mask(transforms.move_mask(transform, rle_codec.decode(rle) > 0))


def clip_batch(arrays: Arrays, tokens: np.ndarray) -> ClipBatch:
    """Rows of clips, one after the other -> the record that the step takes."""
    frames = len(arrays["images"])
    return ClipBatch(
        images=arrays["images"],
        tokens=np.asarray(tokens, np.int32),
        prompts=to_prompts(arrays),
        targets=to_targets(arrays),
        image_valid=np.ones(frames, bool),
        image_id=arrays["frame"],
        clip=arrays["clip"],
        frame=arrays["frame"],
        stage=arrays["stage"],
        object_id=arrays["object_id"],
    )


def _clip_batch(
    number: int,
    *,
    dataset: VideoDataset,
    names: dict[int, str],
    order: Any,  # a grain.MapDataset of rows
    text_ids: dict[str, int],
    config: Config,
    sampling: Sampling,
    shapes: Shapes,
    features: FeatureStore | None,
    stride: int,
    offset: int,
    local: int,
    void: bool,
    pixels: bool = False,
) -> Arrays:
    """pixels: frames also where there are features."""
    clips = []
    for place in range(offset, offset + local):
        position = number * stride + place
        epoch, row = position // len(dataset.videos), int(order[position])
        view = epoch if features is None else epoch % features.views
        clip, change = clip_of(dataset, row, view, config, sampling)
        questions, objects = questions_of_clip(
            clip, names, config.data, sampling,
            targets=shapes.targets, seed=config.seed, epoch=epoch, row=row,
        )  # fmt: skip
        clips.append(
            clip_arrays(
                clip, questions, objects, text_ids, shapes,
                number=place, masks=config.loss.reads_masks, void=void,
                change=change, features=None if features is None or pixels else features.read(row, view),
            )
        )  # fmt: skip
    return {key: np.concatenate([c[key] for c in clips]) for key in clips[0]}
