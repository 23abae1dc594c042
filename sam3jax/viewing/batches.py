"""Training batches exactly as the model sees them: augmented pixels, targets, every question asked.

Pixels are those of the batch, before the device normalises them. All functions read numpy or jax
arrays of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from sam3jax.data.transforms import unpack_mask
from sam3jax.types import Array, Batch, ClickBatch
from sam3jax.viewing.draw import Instance, column, overlay, row

_EDGE = 320  # of a drawn picture, pixels
_COLUMNS = 6  # pictures side by side
_MOST = 240  # pictures of a sheet

Part = tuple[str, Image.Image]  # a caption and what stands below it


def draw_batch(
    batch: Batch, phrases: Sequence[str], title: Callable[[int], str] | None = None
) -> Image.Image:
    """Each picture of the batch, followed by each of its questions with the targets.

    phrases: what `batch.tokens` encode, row by row. title(k): what to write over the k-th picture.
    Absent phrases are shown with an empty picture and say so; boxes that are given as examples are
    labelled. A target has the same colour in all questions, and in all frames of a clip.
    """

    def parts(k: int, most: int) -> list[Part]:
        asked = np.flatnonzero(np.asarray(batch.prompts.valid[k])).tolist()
        return [_question(batch, k, q, phrases) for q in asked[:most]]

    name = title or (lambda k: f"picture {int(batch.image_id[k])} of the data")
    counts = np.asarray(batch.prompts.valid).sum(1)
    return _sheet(batch.images, np.asarray(batch.image_valid), counts, parts, name, "questions")


def draw_click_batch(batch: ClickBatch, title: Callable[[int], str] | None = None) -> Image.Image:
    """Each picture of the batch, followed by each of its objects with the points stored for it.

    title(k): what to write over the k-th picture. Prompts that are drawn during a step are not shown.
    """

    def parts(k: int, most: int) -> list[Part]:
        return [_object(batch, k, o) for o in np.flatnonzero(np.asarray(batch.valid[k]))[:most]]

    name = title or (lambda k: f"picture {int(batch.image_id[k])} of the data")
    counts = np.asarray(batch.valid).sum(1)
    return _sheet(batch.images, np.asarray(batch.image_valid), counts, parts, name, "objects")


def _sheet(
    images: Array,
    valid: np.ndarray,
    counts: np.ndarray,
    parts: Callable[[int, int], list[Part]],
    title: Callable[[int], str],
    what: str,
) -> Image.Image:
    """All pictures that count, one below the other; what has no room is said.

    counts [I]: parts of each picture; parts(k, most): its first ones.
    """
    shown = np.flatnonzero(valid)[: _MOST // 2].tolist()
    most = max(1, _MOST // max(1, len(shown)) - 1)
    drawn = []
    for k in shown:
        less = f", {most} of {counts[k]} {what}" if counts[k] > most else ""
        plain = overlay(np.asarray(images[k]), (), smallest=_EDGE, largest=_EDGE)
        every = [("as the model sees it", plain), *parts(k, most)]
        lines = [every[at : at + _COLUMNS] for at in range(0, len(every), _COLUMNS)]
        for number, line in enumerate(lines):
            drawn.append(row(line, title="" if number else f"{title(k)}{less}", height=_EDGE))
    if (left := int(valid.sum()) - len(shown)) > 0:
        drawn.append(_note(f"and {left} more pictures"))
    return column(drawn or [_note("no picture")])


def _note(text: str) -> Image.Image:
    return row([(text, Image.new("RGB", (_EDGE, 1), (250, 250, 250)))], height=1)


def _question(batch: Batch, number: int, question: int, phrases: Sequence[str]) -> Part:
    pixels = np.asarray(batch.images[number])
    phrase = phrases[int(batch.prompts.text_id[number, question])]
    targets = _targets(batch, number, question)
    examples = _examples(batch, number, question)
    count = f"{len(targets)}" if targets else "absent"
    more = "" if bool(batch.targets.is_exhaustive[number, question]) else " or more"
    shown = f", {len(examples)} shown" if examples else ""
    image = overlay(pixels, [*targets, *examples], smallest=_EDGE, largest=_EDGE)
    return f"{phrase}: {count}{more}{shown}", image


def _object(batch: ClickBatch, number: int, which: int) -> Part:
    pixels = np.asarray(batch.images[number])
    mask = unpack_mask(np.asarray(batch.masks[number, which]), pixels.shape[1])
    labels = np.asarray(batch.labels[number, which])
    points = np.asarray(batch.points[number, which])
    clicks = tuple(
        (float(x), float(y), bool(label))
        for (x, y), label in zip(points, labels, strict=True)
        if label in (0, 1)
    )
    drawn = Instance("", _extent(mask), mask, number=which, clicks=clicks)
    stored = f", {len(clicks)} points" if clicks else ""
    return f"object {which + 1}{stored}", overlay(pixels, [drawn], smallest=_EDGE, largest=_EDGE)


def _extent(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the pixels of a mask."""
    down, across = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(down):
        return 0.0, 0.0, 0.0, 0.0
    return float(across[0]), float(down[0]), float(across[-1] + 1), float(down[-1] + 1)


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
        found.append(Instance("", box, mask, number=m))
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
