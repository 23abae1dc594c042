"""A training batch exactly as the model sees it: augmented pixels, targets, every question asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sam3jax.data.transforms import unpack_mask
from sam3jax.types import Batch
from sam3jax.viewing.draw import Instance, column, overlay, row

_EDGE = 320  # of a drawn picture, pixels


def draw_batch(batch: Batch, phrases: Sequence[str], *, pictures: int = 8) -> Image.Image:
    """One row a picture of the batch: its pixels, then each question with its targets.

    phrases: what `batch.tokens` encode, row by row. Absent phrases are shown with an empty picture and
    say so; boxes that are given as examples are labelled. Reads numpy or jax arrays of one process.
    """
    rows = [
        draw_row(batch, k, phrases)
        for k in range(min(len(batch.images), pictures))
        if batch.image_valid[k]
    ]
    return column(rows or [Image.new("RGB", (_EDGE, _EDGE), (250, 250, 250))])


def draw_row(batch: Batch, number: int, phrases: Sequence[str]) -> Image.Image:
    """The picture `number` of a batch beside its questions."""
    pixels = np.asarray(batch.images[number])
    parts = [("as the model sees it", overlay(pixels, (), smallest=_EDGE, largest=_EDGE))]
    valid = np.asarray(batch.prompts.valid[number])
    for question in np.flatnonzero(valid).tolist():
        phrase = phrases[int(batch.prompts.text_id[number, question])]
        targets = _targets(batch, number, question)
        examples = _examples(batch, number, question)
        count = f"{len(targets)}" if targets else "absent"
        more = "" if bool(batch.targets.is_exhaustive[number, question]) else " or more"
        shown = f", {len(examples)} shown" if examples else ""
        caption = f"{phrase}: {count}{more}{shown}"
        image = overlay(pixels, [*targets, *examples], smallest=_EDGE, largest=_EDGE)
        parts.append((caption, image))
    title = f"picture {int(batch.image_id[number])} of the data"
    return row(parts, title=title, height=_EDGE)


def _targets(batch: Batch, number: int, question: int) -> list[Instance]:
    targets = batch.targets
    height, width = batch.images.shape[1:3]
    found = []
    for k in range(int(targets.num_targets[number, question])):
        m = int(targets.index[number, question, k])
        mask = None
        if bool(targets.mask_valid[number, m]):
            mask = unpack_mask(np.asarray(targets.masks[number, m]), width)
        box = _pixels(np.asarray(targets.boxes[number, m]), width, height)
        found.append(Instance("", box, mask, number=k))
    return found


def _examples(batch: Batch, number: int, question: int) -> list[Instance]:
    prompts = batch.prompts
    height, width = batch.images.shape[1:3]
    return [
        Instance(
            "example" if int(prompts.box_labels[number, question, g]) else "not like this",
            _pixels(np.asarray(prompts.boxes[number, question, g]), width, height),
            number=11,
        )
        for g in np.flatnonzero(np.asarray(prompts.box_valid[number, question])).tolist()
    ]


def _pixels(box: np.ndarray, width: int, height: int) -> tuple[float, float, float, float]:
    """cxcywh in 0..1 -> left, top, right, bottom in pixels."""
    x, y, w, h = box.tolist()
    return (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
