"""The videos that a configuration names, and their annotated frames as a data set of pictures.

A COCO folder of pictures is taken too: each picture is a video of one frame.
Validation, the vocabulary and the checks of pictures read the second: one set of rules for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from sam3jax.config import Config, DataConfig
from sam3jax.data.clips import Sampling, frame_record, phrases_of_videos, usable
from sam3jax.data.datasets import check_training, read_dataset_of, read_datasets, reading_of
from sam3jax.data.describe import entry_lines
from sam3jax.data.folders import find_splits, has_split
from sam3jax.data.frames import Frames, Still
from sam3jax.data.ledger import DataError
from sam3jax.data.moving_shapes import moving_shapes_dataset
from sam3jax.data.names import check_phrases
from sam3jax.data.records import Dataset, ImageRecord
from sam3jax.data.video_folders import has_split as has_video_split
from sam3jax.data.video_folders import looks_like_videos, read_videos
from sam3jax.data.videos import (
    FrameLabels,
    Video,
    VideoDataset,
    annotation_of_rle,
    read_as,
    rename_phrases,
)

_SHAPES = "shapes"  # what data.train says for generated videos


@dataclass(frozen=True, slots=True, eq=False)
class FrameRecord(ImageRecord):
    """A picture that is frame number `frame` of video number `video` of its data set."""

    frames: Frames | None = None
    video: int = 0

    @property
    def sources(self) -> list[Path]:
        """The files that the frame follows from."""
        assert self.frames is not None
        return self.frames.sources(self.frame)

    def open(self) -> Image.Image:
        """The frame, mode RGB. Raises DataError."""
        assert self.frames is not None
        return Image.fromarray(np.ascontiguousarray(self.frames[self.frame]))


def open_videos(config: Config) -> tuple[VideoDataset, VideoDataset | None, list[str]]:
    """The training and the validation videos of a run, and lines about what is used of them.

    None where there is no validation split. Raises DataError for what cannot be trained on.
    """
    data = config.data
    if data.train is None:
        raise DataError("no training data: set data.train to a folder of videos, or to shapes")
    if data.repeat_threshold:
        raise DataError(
            "data.repeat_threshold is for pictures; videos are all shown equally often: set it to 0"
        )
    read, valid = _both(config, data.train)
    check_phrases(data.phrases, read, *(() if valid is None else (valid,)))
    valid = None if valid is None else rename_phrases(valid, data.phrases)
    train, lines = usable(rename_phrases(read, data.phrases), sampling_of(config))
    if not train.videos:
        why = "; ".join(entry_lines(read.problems))
        raise DataError(
            f"{train.name} has no video with an annotated frame, so there is nothing to train"
            f"{f' ({why.strip()})' if why else ''}"
        )
    check_training(config, *(pictures_of(d) for d in (train, valid) if d is not None))
    return train, valid, lines


def _both(config: Config, path: str) -> tuple[VideoDataset, VideoDataset | None]:
    """The training and the validation videos as they are."""
    data = config.data
    train = _read(config, path, data.train_split)
    if data.valid is not None:
        return train, _read(config, data.valid, data.valid_split)
    asked = path == _SHAPES or data.valid_split != DataConfig().valid_split
    if asked or _has_split(path, data.valid_split):
        return train, _read(config, path, data.valid_split)
    return train, None


def read_pictures(config: Config) -> tuple[Dataset, Dataset | None]:
    """`read_datasets`, where the annotated frames of videos are pictures too. Raises DataError."""
    path = config.data.train
    if path is None or not looks_like_videos(path):
        return read_datasets(config)
    train, valid = _both(config, path)
    return pictures_of(train), None if valid is None else pictures_of(valid)


def pictures_named(config: Config, path: str, split: str) -> Dataset:
    """One split of pictures, or of annotated frames. Raises DataError."""
    if looks_like_videos(path):
        return pictures_of(_read(config, path, split))
    return read_dataset_of(config, path, split)


def open_frames(config: Config) -> tuple[Dataset, Dataset | None]:
    """`open_videos` as `pictures_of` each."""
    train, valid, _ = open_videos(config)
    return pictures_of(train), None if valid is None else pictures_of(valid)


def names_videos(config: Config, path: str | None) -> bool:
    """Whether `path`, by default the run's own data, is of videos; to a run of clips everything is."""
    path = path or config.data.train
    return config.task == "clips" or (path is not None and looks_like_videos(path))


def videos_named(config: Config, path: str | None, split: str | None) -> VideoDataset:
    """The videos that `path` and `split` name; by default the validation's.

    Raises DataError.
    """
    data = config.data
    if path is None and split in (None, data.valid_split):
        _, valid, _ = open_videos(config)
        if valid is None:
            raise DataError("the run has no validation data: give --data, or --split train")
        return valid
    own = data.train_split if path is None else data.valid_split
    return rename_phrases(_read(config, path or data.train or "", split or own), data.phrases)


def sampling_of(config: Config) -> Sampling:
    """How clips are cut."""
    c = config.clips
    return Sampling(c.frames, c.max_stride, c.reverse, c.motion, c.max_objects, c.min_stride)


def pictures_of(dataset: VideoDataset) -> Dataset:
    """Every annotated frame of every video as a picture; its id is its place in that order.

    Void pixels are a crowd of every phrase: what is found there is neither right nor wrong.
    """
    records = frame_records(dataset)
    stated = dataset.stated_masks
    if stated is None:
        stated = sum(a.segmentation is not None for r in records for a in r.annotations)
    problems = dataset.problems
    return Dataset(dataset.name, records, dataset.categories, problems, stated_masks=stated)


def frame_records(dataset: VideoDataset) -> tuple[FrameRecord, ...]:
    """Every annotated frame of every video."""
    return tuple(_frames(dataset, tuple(phrases_of_videos(dataset))))


def _frames(dataset: VideoDataset, categories: tuple[int, ...]) -> Iterator[FrameRecord]:
    id = 0
    for row, video in enumerate(dataset.videos):
        for number in video.annotated:
            plain, void = frame_record(video, number), video.labels[number].void
            crowds = () if void is None else categories
            annotations = (
                *plain.annotations,
                *(annotation_of_rle(void, -1, i, iscrowd=True) for i in crowds if void is not None),
            )
            yield FrameRecord(
                id=id,
                file=Path(f"{video.name}_{number:05d}"),
                width=video.width,
                height=video.height,
                annotations=annotations,
                negative_ids=plain.negative_ids,
                not_exhaustive_ids=plain.not_exhaustive_ids,
                frame=number,
                frames=video.frames,
                video=row,
            )
            id += 1


def videos_of(pictures: Dataset) -> VideoDataset:
    """Every picture as a video of one frame: clips of it are made by motion."""

    def video(record: ImageRecord) -> Video:
        labels = (FrameLabels(record.annotations),)
        known = (record.negative_ids, record.not_exhaustive_ids)
        return Video(record.id, record.file.name, Still(record), labels, *known)

    videos = tuple(map(video, pictures.images))
    return VideoDataset(pictures.name, videos, pictures.categories, pictures.problems)


def _read(config: Config, path: str, split: str) -> VideoDataset:
    data = config.data
    if path == _SHAPES:
        return moving_shapes_dataset(split, data, config.clips.generated_frames)
    if _is_pictures(path):
        return videos_of(read_dataset_of(config, path, split))
    dataset = read_as(read_videos(path, split, allow_outside=data.allow_outside), reading_of(data))
    if data.limit is not None:
        dataset = replace(dataset, videos=dataset.videos[: data.limit])
    return dataset


def _is_pictures(path: str) -> bool:
    """Whether there is a COCO data set of pictures, and no video."""
    if looks_like_videos(path):
        return False
    try:
        return bool(find_splits(path))
    except DataError:
        return False  # what is missing for videos is said


def _has_split(path: str, split: str) -> bool:
    """Whether a folder has a part of this name, as `_read` looks for it."""
    return has_split(path, split) if _is_pictures(path) else has_video_split(path, split)
