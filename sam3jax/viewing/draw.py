"""Everything that is drawn on pictures: overlays, and panels of truth beside prediction.

Readable on any background: each outline has a dark and a bright line, each label a plate of its own.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from sam3jax.data.coco import ImageRecord, decode_mask
from sam3jax.viewing.shown import Shown

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]

# Far apart in hue and lightness, first ones first; after these, hues by the golden ratio.
_PALETTE: tuple[Colour, ...] = (
    (255, 64, 64), (0, 190, 255), (255, 210, 0), (60, 210, 80), (215, 90, 255), (255, 140, 20),
    (0, 225, 190), (255, 120, 190), (110, 120, 255), (175, 225, 0), (200, 130, 80), (160, 200, 255),
)  # fmt: skip
_INK, _PAPER = (20, 20, 24), (250, 250, 250)
_INSIDE, _OUTSIDE = (20, 170, 60), (215, 30, 40)  # clicks
_FILL = 0.12  # a red circle stays red, and a brown one brown; the outline says where it ends
WIDEST = 8  # times as wide as high is drawn at full height
_CROWD = 60  # instances above which lines are thin
_LABEL_SHARE = 0.15  # of the picture that labels may hide at most


@dataclass(frozen=True)
class Instance:
    """Something to draw: box left, top, right, bottom in pixels; mask COCO RLE, [Y, X] bool or None.

    number: of its colour; None: by its place among the instances. clicks: (x, y, inside) in pixels.
    """

    label: str
    box: Box
    mask: Mapping[str, Any] | np.ndarray | None = None
    score: float | None = None
    number: int | None = None
    clicks: tuple[tuple[float, float, bool], ...] = ()

    @property
    def text(self) -> str:
        return self.label if self.score is None else f"{self.label} {self.score:.2f}".strip()


def colour(number: int) -> Colour:
    """The colour of the number-th instance of a picture."""
    if number < len(_PALETTE):
        return _PALETTE[number]
    hue = number * 0.618034 % 1
    red, green, blue = colorsys.hls_to_rgb(hue, (0.45, 0.6, 0.72)[number % 3], 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def overlay(
    picture: Image.Image | np.ndarray,
    instances: Sequence[Instance],
    *,
    smallest: int = 480,
    largest: int = 2048,
) -> Image.Image:
    """The picture with masks, outlines, boxes and labels.

    Drawn at the picture's own size where its longer edge lies between `smallest` and `largest`
    pixels, else scaled to that. The first instances get labels first; in a crowd the last get none.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    longer = max(image.size)
    scale = min(max(longer, smallest), largest) / longer
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else 3)
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    line = 1 if len(instances) > _CROWD else max(2, round(max(size) / 500))
    order = _largest_first(instances)
    shades = [colour(k if i.number is None else i.number) for k, i in enumerate(instances)]
    for k in order:
        _paint_mask(image, instances[k].mask, shades[k], line)
    boxes = [_scaled(instance.box, scale) for instance in instances]
    pen = ImageDraw.Draw(image)
    for k in order:
        _paint_box(pen, boxes[k], shades[k], line)
    for instance in instances:
        _paint_clicks(pen, instance.clicks, scale, 2 * line)
    labels = [(i.text, b, c) for i, b, c in zip(instances, boxes, shades)]
    _paint_labels(pen, size, labels)
    return image


def panel(
    picture: Image.Image | np.ndarray,
    truth: Sequence[Instance],
    prediction: Sequence[Instance],
    *,
    title: str = "",
    height: int = 360,
) -> Image.Image:
    """picture | truth | prediction, with captions."""
    parts = [("picture", ()), ("truth", truth), ("prediction", prediction)]
    counted = [(f"{name}: {len(i)}" if k else name, i) for k, (name, i) in enumerate(parts)]
    return panels(picture, counted, title=title, height=height)


def panels(
    picture: Image.Image | np.ndarray,
    parts: Sequence[tuple[str, Sequence[Instance]]],
    *,
    title: str = "",
    height: int = 360,
) -> Image.Image:
    """The same picture several times, each with other instances under its caption.

    What lies on an instance of the first part that has any, the truth, has that one's colour.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    # Drawn at the final size: labels that are shrunk cannot be read.
    longer = round(height * min(max(1.0, image.width / image.height), WIDEST))
    draw = functools.partial(overlay, image, smallest=longer, largest=longer)
    truth = next((instances for _, instances in parts if len(instances)), ())
    drawn = [(caption, draw(colour_like(truth, instances))) for caption, instances in parts]
    return row(drawn, title=title, height=height)


def colour_like(truth: Sequence[Instance], instances: Sequence[Instance]) -> list[Instance]:
    """The instances in the colour of the true one that each overlaps most, others in colours of
    their own; earlier instances choose first."""
    free = set(range(len(truth)))
    following = len(truth)
    coloured = []
    for instance in instances:
        overlaps = {k: _box_iou(truth[k].box, instance.box) for k in free}
        number = max(overlaps, key=lambda k: overlaps[k], default=None)
        if number is None or overlaps[number] < 0.3:
            number, following = following, following + 1
        free.discard(number)
        coloured.append(replace(instance, number=number))
    return coloured


def _box_iou(a: Box, b: Box) -> float:
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return wide * high / max(areas - wide * high, 1e-9)


def row(
    parts: Sequence[tuple[str, Image.Image]], *, title: str = "", height: int = 360
) -> Image.Image:
    """Pictures side by side at one height, each under its caption, all under a title."""
    gap, bar = 6, 24
    shrunk = [_of_height(image, height) for _, image in parts]
    top = bar * (2 if title else 1)
    width = sum(image.width for image in shrunk) + gap * (len(parts) - 1)
    sheet = Image.new("RGB", (width, height + top), _PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        _text_within(pen, (4, 3), title, width - 8, font(15))
    left = 0
    for (caption, _), image in zip(parts, shrunk):
        _text_within(pen, (left + 4, top - bar + 4), caption, image.width - 8, font(14))
        sheet.paste(image, (left, top))
        left += image.width + gap
    return sheet


def _of_height(image: Image.Image, height: int) -> Image.Image:
    """The picture at a height; very wide ones with room above and below instead."""
    size = (max(1, round(image.width * height / image.height)), height)
    if size[0] <= WIDEST * height:
        return image.resize(size, Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (WIDEST * height, height), _PAPER)
    inner = (sheet.width, max(1, round(image.height * sheet.width / image.width)))
    sheet.paste(image.resize(inner, Image.Resampling.LANCZOS), (0, (height - inner[1]) // 2))
    return sheet


def column(pictures: Sequence[Image.Image], *, gap: int = 10) -> Image.Image:
    """Pictures one below the other."""
    height = sum(picture.height + gap for picture in pictures) - gap
    sheet = Image.new("RGB", (max(p.width for p in pictures), height), _PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet


def true_instances(record: ImageRecord, names: Mapping[int, str]) -> list[Instance]:
    """The annotations of a picture, crowds left out."""
    instances = []
    for a in record.annotations:
        x, y, w, h = a.bbox
        if not a.iscrowd:
            mask = (
                decode_mask(a, record.height, record.width) if a.segmentation is not None else None
            )
            instances.append(Instance(names[a.category_id], (x, y, x + w, y + h), mask))
    return instances


def found_instances(
    results: Sequence[Mapping[str, Any]], names: Mapping[int, str], shown: Shown
) -> list[Instance]:
    """Those COCO results of one picture that people see, strongest first."""
    instances = []
    for result in shown.of(results, names):
        x, y, w, h = result["bbox"]
        box = (x, y, x + w, y + h)
        name = names.get(result["category_id"], str(result["category_id"]))
        instances.append(Instance(name, box, result.get("segmentation"), result["score"]))
    return instances


def dataset_panel(
    record: ImageRecord,
    results: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    shown: Shown,
    *,
    title: str | None = None,
    height: int = 360,
) -> Image.Image:
    """A panel of a picture of a data set; `results`: COCO results, of this picture or of all."""
    here = [r for r in results if r["image_id"] == record.id]
    return panel(
        record.open(),
        true_instances(record, names),
        found_instances(here, names, shown),
        title=Path(record.file).name if title is None else title,
        height=height,
    )


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships: Latin, Greek, Cyrillic, on every machine the same."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _largest_first(instances: Sequence[Instance]) -> list[int]:
    """Drawing order: small things on top of large ones."""

    def area(k: int) -> float:
        left, top, right, bottom = instances[k].box
        return -(right - left) * (bottom - top)

    return sorted(range(len(instances)), key=area)


def _paint_mask(image: Image.Image, mask: Any, shade: Colour, line: int) -> None:
    """Fill and outline in place; works on the mask's own rectangle only."""
    if mask is None:
        return
    pixels = coco_mask.decode(_bytes(mask)) if isinstance(mask, Mapping) else np.asarray(mask)
    # COCO's arrays run down the columns: seen sideways they need no copy, which counts at 100 MB.
    sideways = Image.fromarray(np.ascontiguousarray(pixels.T).astype(np.uint8, copy=False))
    if sideways.size != image.size[::-1]:  # 0 and 1, averaged and rounded: half covered or more
        sideways = sideways.resize((image.height, image.width), Image.Resampling.BILINEAR)
    whole = sideways.transpose(Image.Transpose.TRANSPOSE).point(lambda v: 255 * v)
    extent = whole.getbbox()
    if extent is None:
        return
    margin = 3 * line
    frame = (
        max(0, extent[0] - margin), max(0, extent[1] - margin),
        min(image.width, extent[2] + margin), min(image.height, extent[3] + margin),
    )  # fmt: skip
    shape, patch = whole.crop(frame), image.crop(frame)
    fill = Image.blend(patch, Image.new("RGB", patch.size, shade), _FILL)
    patch.paste(fill, mask=shape)
    inside = np.asarray(shape) > 0
    patch.paste(_INK, mask=Image.fromarray(_grown(inside, line) & ~inside))
    patch.paste(shade, mask=Image.fromarray(_grown(~inside, line) & inside))
    image.paste(patch, frame[:2])


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask with a square margin, in each direction by itself: PIL's filters take seconds."""
    for _ in range(2):
        wide = mask.copy()
        for step in range(1, min(by, len(mask) - 1) + 1):
            wide[step:] |= mask[:-step]
            wide[:-step] |= mask[step:]
        mask = wide.T
    return mask


def _scaled(box: Box, scale: float) -> Box:
    left, top, right, bottom = (float(v) * scale for v in box)
    return left, top, right, bottom


def _paint_box(pen: ImageDraw.ImageDraw, box: Box, shade: Colour, line: int) -> None:
    left, top, right, bottom = box
    if right - left < 1 or bottom - top < 1:
        return
    pen.rectangle((left - line, top - line, right + line, bottom + line), outline=_INK, width=line)
    pen.rectangle(box, outline=shade, width=line)


def _paint_clicks(
    pen: ImageDraw.ImageDraw, clicks: Sequence[tuple[float, float, bool]], scale: float, size: int
) -> None:
    """Green discs for clicks inside, red ones outside, later ones on top."""
    for x, y, inside in clicks:
        # A pixel's centre: half a pixel from its corner, in any size.
        x, y = (x + 0.5) * scale, (y + 0.5) * scale
        for reach, shade in ((size + 3, _INK), (size + 2, _PAPER), (size, _INSIDE if inside else _OUTSIDE)):  # fmt: skip
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=shade)


def _paint_labels(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], labels: Sequence[tuple[str, Box, Colour]]
) -> None:
    """Each label on a plate in its instance's colour, at the first free place around its box."""
    face = font(max(12, min(26, round(max(size) / 55))))
    taken: list[Box] = []
    room = _LABEL_SHARE * size[0] * size[1]
    for text, box, shade in labels:
        if not text or room < 0:
            continue
        text = _shorten(text, size[0] / 2, face)
        width = pen.textlength(text, font=face) + 8
        height = sum(face.getmetrics()) + 2
        place = _free_place(box, width, height, size, taken)
        if place is None:
            continue
        taken.append((place[0], place[1], place[0] + width, place[1] + height))
        room -= width * height
        pen.rectangle(taken[-1], fill=shade, outline=_INK)
        red, green, blue = shade
        ink = _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else _PAPER
        pen.text((place[0] + 4, place[1] + 1), text, fill=ink, font=face)


def _free_place(
    box: Box, width: float, height: float, size: tuple[int, int], taken: Sequence[Box]
) -> tuple[float, float] | None:
    left, top, right, bottom = box
    places = [
        (left, top - height), (left, top), (left, bottom), (left, bottom - height),
        (right - width, top - height), (right - width, bottom), (right, top),
        (left, (top + bottom - height) / 2), (left - width, top),
    ]  # fmt: skip
    for x, y in places:
        x = min(max(0.0, x), max(0.0, size[0] - width - 1))
        y = min(max(0.0, y), max(0.0, size[1] - height - 1))
        if not any(
            x < other[2] and x + width > other[0] and y < other[3] and y + height > other[1]
            for other in taken
        ):
            return x, y
    return None


def _text_within(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: float, face: Any
) -> None:
    pen.text(at, _shorten(text, width, face), fill=_INK, font=face)


def _shorten(text: str, width: float, face: Any) -> str:
    """The text, its middle left out where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if face.getlength(text) <= width:
        return text
    keep = len(text)
    while keep > 2 and face.getlength(f"{text[: keep // 2]}…{text[-(keep // 2) :]}") > width:
        keep -= 1
    return f"{text[: keep // 2]}…{text[-(keep // 2) :]}"


def _bytes(rle: Mapping[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {"size": rle["size"], "counts": counts.encode() if isinstance(counts, str) else counts}
