"""One row of a batch: the picture on its canvas, the questions, and the targets they point to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from sam3jax.data import prompts as asking
from sam3jax.data import transforms
from sam3jax.data.augmentation import Change
from sam3jax.data.prompts import NO_CATEGORY, Question, Shapes
from sam3jax.data.records import Annotation, ImageRecord, decode_mask
from sam3jax.types import Batch, Prompts, Targets

Arrays = dict[str, np.ndarray]
Moved = tuple[np.ndarray, np.ndarray | None]  # box [4] cxcywh in 0..1, mask [Y, X] bool


class Sized(Protocol):
    """A picture, or a video: what its annotations' pixels count in."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...


def example(
    record: ImageRecord,
    questions: tuple[Question, ...],
    transform: transforms.Transform,
    text_ids: dict[str, int],
    shapes: Shapes,
    *,
    masks: bool = True,
    change: Change | None = None,
    pixels: bool = True,
) -> Arrays:
    """Every array of Batch, Prompts and Targets without its first axis.

    Instances that the transform leaves outside the picture are no targets. change: of the pixels. pixels: False
    leaves `images` out, and the picture's file unread.
    """
    out = empty_row(shapes, transform)
    if pixels:
        out["images"] = transforms.move_picture(transform, record.open(), change)
    out["category_ids"] = np.full(shapes.prompts, NO_CATEGORY, np.int64)
    slots: dict[int, int] = {}  # annotation index -> row of `boxes` and `masks`
    for k in dict.fromkeys(k for question in questions for k in question.targets):
        moved = move_instance(record.annotations[k], record, transform, masks)
        if moved is not None:
            slots[k] = len(slots)
            put_instance(out, slots[k], moved)
    for p, question in enumerate(questions):
        if put_question(out, p, question, slots, text_ids):
            out["category_ids"][p] = question.category_id
    return out


def empty_row(shapes: Shapes, transform: transforms.Transform) -> Arrays:
    """The arrays of Prompts and Targets of one picture that is asked nothing."""
    P, T, M, G = shapes.prompts, shapes.targets, shapes.instances, shapes.exemplars
    size_x, size_y = transform.canvas
    return {
        "text_id": np.zeros(P, np.int32),
        "valid": np.zeros(P, bool),
        "box_prompts": np.zeros((P, G, 4), np.float32),
        "box_labels": np.zeros((P, G), np.int32),
        "box_valid": np.zeros((P, G), bool),
        "boxes": np.zeros((M, 4), np.float32),
        "masks": np.zeros((M, size_y, -(-size_x // 8)), np.uint8),
        "mask_valid": np.zeros(M, bool),
        "index": np.full((P, T), M, np.int32),
        "num_targets": np.zeros(P, np.int32),
        "is_exhaustive": np.ones(P, bool),
    }


def put_instance(row: Arrays, slot: int, moved: Moved) -> None:
    """Box and mask of an instance into their row of `boxes` and `masks`."""
    row["boxes"][slot], mask = moved
    if mask is not None:
        row["masks"][slot], row["mask_valid"][slot] = transforms.pack_mask(mask), True


def put_question(
    row: Arrays, p: int, question: Question, slots: Mapping[int, int], text_ids: Mapping[str, int]
) -> bool:
    """Prompt p of a row; False where nothing is asked, as a box prompt whose boxes are not in sight.

    slots: what `Question.targets` counts -> row of `boxes`, of those that are in the picture.
    """
    targets = [slots[k] for k in question.targets if k in slots]
    room = row["box_valid"].shape[1]
    shown = [slots[k] for k in question.exemplars if k in slots][:room]
    if question.phrase == asking.VISUAL and question.exemplars and not shown:
        return False
    row["text_id"][p] = text_ids[question.phrase]
    row["valid"][p] = True
    row["index"][p, : len(targets)] = targets
    row["num_targets"][p] = len(targets)
    row["is_exhaustive"][p] = question.exhaustive
    row["box_prompts"][p, : len(shown)] = row["boxes"][shown]
    row["box_labels"][p, : len(shown)] = 1
    row["box_valid"][p, : len(shown)] = True
    return True


def stack(rows: list[Arrays]) -> Arrays:
    """Rows -> arrays with a first axis I."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def to_batch(arrays: Arrays, tokens: np.ndarray) -> Batch:
    """What `stack` gives, as the record that the step reads; tokens [V, N]."""
    return Batch(
        images=arrays["images"],
        tokens=np.asarray(tokens, np.int32),
        prompts=to_prompts(arrays),
        targets=to_targets(arrays),
        image_valid=arrays["image_valid"],
        image_id=arrays["image_id"],
    )


def to_prompts(arrays: Arrays) -> Prompts:
    """The prompts of stacked rows."""
    names = dict(boxes="box_prompts")
    fields = ("text_id", "valid", "boxes", "box_labels", "box_valid")
    return Prompts(**{field: arrays[names.get(field, field)] for field in fields})


def to_targets(arrays: Arrays) -> Targets:
    """The targets of stacked rows."""
    fields = ("boxes", "masks", "mask_valid", "index", "num_targets", "is_exhaustive")
    return Targets(**{field: arrays[field] for field in fields}, void=arrays.get("void"))


def move_instance(
    annotation: Annotation, picture: Sized, transform: transforms.Transform, masks: bool
) -> Moved | None:
    """Box and mask (None: no usable one) on the canvas, or None where nothing is left of it."""
    box = transforms.move_boxes(transform, np.array(annotation.bbox))
    if box[2] <= 0 or box[3] <= 0:
        return None
    cut = transform.crop != (0, 0, picture.width, picture.height)
    if annotation.segmentation is None or not (masks or cut):
        return box, None
    mask = decode_mask(annotation, picture.height, picture.width)
    if cut:
        left, top, width, height = transform.crop
        rows = slice(int(top), int(np.ceil(top + height)))
        columns = slice(int(left), int(np.ceil(left + width)))
        if mask.any() and not mask[rows, columns].any():
            return None  # the box reaches into the crop, the instance does not
    moved = transforms.move_mask(transform, mask)
    if not moved.any():
        return box, None  # thinner than a pixel
    return (transforms.box_of_mask(moved) if cut else box), (moved if masks else None)
