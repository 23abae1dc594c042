"""Batches of clips: numpy arrays with static shapes, frames on the axis of images, clip by clip.

As in `loader`, a batch is a function of its number alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import grain
import numpy as np

from sam3jax.config import Config
from sam3jax.data import transforms
from sam3jax.data.clips import (
    Clip,
    Sampling,
    clip_shapes,
    draw_clip,
    phrases_of_videos,
    questions_of_clip,
)
from sam3jax.data.coco import decode_mask
from sam3jax.data.examples import Arrays
from sam3jax.data.loader import _ENDLESS, TrainLoader, _Rows
from sam3jax.data.pictures import DataError
from sam3jax.data.prompts import VISUAL, Question, Shapes
from sam3jax.data.streams import run_ahead
from sam3jax.data.videos import VideoDataset
from sam3jax.types import ClipBatch, Prompts, Targets

NO_OBJECT = -1  # object_id of a row of `boxes` and `masks` that holds nothing


def make_clip_loader(
    dataset: VideoDataset,
    phrases: tuple[str, ...],
    tokens: np.ndarray,
    config: Config,
    sampling: Sampling,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainLoader:
    """Shuffled, augmented batches of config.batch_size frames, this process's clips of them.

    phrases: of the run; tokens [V, N], a row for each. Raises DataError.
    """
    if config.batch_size % sampling.frames:
        raise DataError(
            f"batch_size counts frames, and {config.batch_size} are no whole number of clips of "
            f"{sampling.frames}: use a multiple of clips.frames"
        )
    clips = config.batch_size // sampling.frames
    rows = _Rows(clips, process_index, process_count, "batch_size / clips.frames")
    local = len(rows(0))
    order = grain.MapDataset.range(len(dataset.videos)).seed(config.seed).shuffle().repeat()
    batch_of = partial(
        _clip_batch,
        dataset=dataset,
        names=phrases_of_videos(dataset),
        order=order,
        text_ids={phrase: k for k, phrase in enumerate(phrases)},
        config=config,
        sampling=sampling,
        shapes=clip_shapes(dataset, config.data, sampling),
        stride=clips,
        offset=process_index * local,
        local=local,
    )
    identity = {"videos": len(dataset.videos), "frames": sampling.frames, "seed": config.seed}

    def stream(start: int) -> Iterator[ClipBatch]:
        for arrays in run_ahead(batch_of, start, _ENDLESS, config.data.workers):
            yield clip_batch(arrays, tokens)

    return TrainLoader(stream, config.batch_size, identity)


def clip_arrays(
    clip: Clip,
    questions: list[Question],
    objects: list[int],
    text_ids: dict[str, int],
    shapes: Shapes,
    *,
    number: int = 0,
    masks: bool = True,
) -> Arrays:
    """The F rows of one clip. An object has the same row of `boxes` and `masks` in all frames.

    objects: the id of each object that `Question.targets` counts; number: of the clip in its batch.
    """
    P, T, M, G = shapes.prompts, shapes.targets, shapes.instances, shapes.exemplars
    asked = list(dict.fromkeys(k for q in questions for k in q.targets))[:M]
    slots = {k: slot for slot, k in enumerate(asked)}
    kinds = {k: q.category_id for q in questions for k in q.targets}
    rows = []
    for step, (frame, transform) in enumerate(zip(clip.frames, clip.transforms, strict=True)):
        size_x, size_y = transform.canvas
        out: dict[str, Any] = {
            "images": transforms.move_picture(transform, clip.video.frames[frame]),
            "text_id": np.zeros(P, np.int32),
            "valid": np.zeros(P, bool),
            "box_prompts": np.zeros((P, G, 4), np.float32),
            "box_labels": np.zeros((P, G), np.int32),
            "box_valid": np.zeros((P, G), bool),
            "boxes": np.zeros((M, 4), np.float32),
            "masks": np.zeros((M, size_y, -(-size_x // 8)), np.uint8),
            "mask_valid": np.zeros(M, bool),
            "object_id": np.full(M, NO_OBJECT, np.int32),
            "index": np.full((P, T), M, np.int32),
            "num_targets": np.zeros(P, np.int32),
            "is_exhaustive": np.ones(P, bool),
            "clip": np.int32(number),
            "frame": np.int32(frame),
            "stage": np.int32(step),
        }
        here = {(a.id, a.category_id): a for a in clip.video.labels[frame].annotations}
        there: set[int] = set()
        for k, slot in slots.items():
            out["object_id"][slot] = objects[k]
            annotation = here.get((objects[k], kinds[k]))
            moved = None if annotation is None else _moved(annotation, clip, transform, masks)
            if moved is None:
                continue
            there.add(k)
            out["boxes"][slot], mask = moved
            if mask is not None:
                out["masks"][slot], out["mask_valid"][slot] = transforms.pack_mask(mask), True
        for p, question in enumerate(questions):
            targets = [slots[k] for k in question.targets if k in there]
            shown = [slots[k] for k in question.exemplars if k in there][:G]
            if question.phrase == VISUAL and not shown:
                continue  # a question without a phrase and without a box asks nothing
            out["text_id"][p] = text_ids[question.phrase]
            out["valid"][p] = True
            out["index"][p, : len(targets)] = targets
            out["num_targets"][p] = len(targets)
            out["is_exhaustive"][p] = question.exhaustive
            out["box_prompts"][p, : len(shown)] = out["boxes"][shown]
            out["box_labels"][p, : len(shown)] = 1
            out["box_valid"][p, : len(shown)] = True
        rows.append(out)
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def clip_batch(arrays: Arrays, tokens: np.ndarray) -> ClipBatch:
    """Rows of clips, one after the other -> the record that the step takes."""
    frames = len(arrays["images"])
    return ClipBatch(
        images=arrays["images"],
        tokens=np.asarray(tokens, np.int32),
        prompts=Prompts(
            text_id=arrays["text_id"],
            valid=arrays["valid"],
            boxes=arrays["box_prompts"],
            box_labels=arrays["box_labels"],
            box_valid=arrays["box_valid"],
        ),
        targets=Targets(
            boxes=arrays["boxes"],
            masks=arrays["masks"],
            mask_valid=arrays["mask_valid"],
            index=arrays["index"],
            num_targets=arrays["num_targets"],
            is_exhaustive=arrays["is_exhaustive"],
        ),
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
    stride: int,
    offset: int,
    local: int,
) -> Arrays:
    clips = []
    for place in range(offset, offset + local):
        position = number * stride + place
        epoch, row = position // len(dataset.videos), int(order[position])
        rng = np.random.default_rng((config.seed, epoch, row, 1))
        size = config.model.image_size
        clip = draw_clip(dataset.videos[row], size, config.data, sampling, rng)
        questions, objects = questions_of_clip(
            clip, names, config.data, sampling,
            targets=shapes.targets, seed=config.seed, epoch=epoch, row=row,
        )  # fmt: skip
        clips.append(
            clip_arrays(
                clip, questions, objects, text_ids, shapes,
                number=place, masks=config.loss.reads_masks,
            )
        )  # fmt: skip
    return {key: np.concatenate([c[key] for c in clips]) for key in clips[0]}


def _moved(annotation, clip: Clip, transform: transforms.Transform, masks: bool):
    """(box, mask or None) on the canvas, or None where nothing of the object is left."""
    video = clip.video
    box = transforms.move_boxes(transform, np.array(annotation.bbox))
    if box[2] <= 0 or box[3] <= 0:
        return None
    cut = transform.crop != (0, 0, video.width, video.height)
    if annotation.segmentation is None or not (masks or cut):
        return box, None
    mask = transforms.move_mask(transform, decode_mask(annotation, video.height, video.width))
    if not mask.any():
        return None if cut else (box, None)  # outside the crop, or thinner than a pixel
    return (transforms.box_of_mask(mask) if cut else box), (mask if masks else None)
