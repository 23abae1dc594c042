"""One row of a batch: the picture on its canvas, the questions, and the targets they point to."""

from __future__ import annotations

import numpy as np

from sam3jax.data import prompts as asking
from sam3jax.data import transforms
from sam3jax.data.augmentation import Change
from sam3jax.data.prompts import NO_CATEGORY, Question, Shapes
from sam3jax.data.records import Annotation, ImageRecord, decode_mask
from sam3jax.types import Batch, Prompts, Targets

Arrays = dict[str, np.ndarray]


def example(
    record: ImageRecord,
    questions: tuple[Question, ...],
    transform: transforms.Transform,
    text_ids: dict[str, int],
    shapes: Shapes,
    *,
    masks: bool = True,
    change: Change | None = None,
) -> Arrays:
    """Every array of Batch, Prompts and Targets without its first axis.

    Instances that the transform leaves outside the picture are no targets. change: of the pixels.
    """
    P, T, M, G = shapes.prompts, shapes.targets, shapes.instances, shapes.exemplars
    size_x, size_y = transform.canvas
    out: Arrays = {
        "images": transforms.move_picture(transform, record.open(), change),
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
        "category_ids": np.full(P, NO_CATEGORY, np.int64),
    }
    slots: dict[int, int] = {}  # annotation index -> row of `boxes` and `masks`
    for k in dict.fromkeys(k for question in questions for k in question.targets):
        moved = _move_instance(record.annotations[k], record, transform, masks)
        if moved is not None:
            slots[k] = m = len(slots)
            out["boxes"][m], mask = moved
            if mask is not None:
                out["masks"][m], out["mask_valid"][m] = transforms.pack_mask(mask), True
    for p, question in enumerate(questions):
        targets = [slots[k] for k in question.targets if k in slots]
        shown = [slots[k] for k in question.exemplars if k in slots][:G]
        if question.phrase == asking.VISUAL and question.exemplars and not shown:
            continue  # a question without a phrase and without a box asks nothing
        out["text_id"][p] = text_ids[question.phrase]
        out["valid"][p] = True
        out["category_ids"][p] = question.category_id
        out["index"][p, : len(targets)] = targets
        out["num_targets"][p] = len(targets)
        out["is_exhaustive"][p] = question.exhaustive
        out["box_prompts"][p, : len(shown)] = out["boxes"][shown]
        out["box_labels"][p, : len(shown)] = 1
        out["box_valid"][p, : len(shown)] = True
    return out


def stack(rows: list[Arrays]) -> Arrays:
    """Rows -> arrays with a first axis I."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def to_batch(arrays: Arrays, tokens: np.ndarray) -> Batch:
    """What `stack` gives, as the record that the step reads; tokens [V, N]."""
    return Batch(
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
        image_valid=arrays["image_valid"],
        image_id=arrays["image_id"],
    )


def _move_instance(
    annotation: Annotation, record: ImageRecord, transform: transforms.Transform, masks: bool
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Box and mask (None: no usable one) on the canvas, or None where nothing is left of it."""
    box = transforms.move_boxes(transform, np.array(annotation.bbox))
    if box[2] <= 0 or box[3] <= 0:
        return None
    cut = transform.crop != (0, 0, record.width, record.height)
    if annotation.segmentation is None or not (masks or cut):
        return box, None
    mask = decode_mask(annotation, record.height, record.width)
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
