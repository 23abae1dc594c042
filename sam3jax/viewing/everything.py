"""Masks of everything in a picture: a grid of single clicks, sifted, doubles removed.

Answers to segment_anything.SamAutomaticMaskGenerator, whose defaults these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

from sam3jax.viewing.click_predictor import ClickPredictor


@dataclass(frozen=True)
class GridOptions:
    """side: clicks along an edge. crops: further layers of crops, 2^n by 2^n of them each.

    iou, stability: the least predicted IoU and stability of a mask that is kept. overlap: box IoU above
    which one of two masks is a double. edge: pixels from a crop's edge within which a mask counts as cut.
    at_once: clicks answered at a time.
    """

    side: int = 32
    crops: int = 0
    crop_overlap: float = 512 / 1500
    iou: float = 0.88
    stability: float = 0.95
    overlap: float = 0.7
    edge: int = 20
    at_once: int = 64


def everything(
    predictor: ClickPredictor, picture: Image.Image, options: GridOptions | None = None
) -> list[dict[str, Any]]:
    """COCO records of all masks found, best predicted first: segmentation (RLE), bbox, area, score,
    stability, point, crop_box.

    Of doubles in one crop the one with the better score is kept, of doubles in two that of the smaller crop.
    """
    o = options or GridOptions()
    found: list[dict[str, Any]] = []
    for left, top, right, bottom in crop_boxes(*picture.size, o):
        predictor.set_image(picture.crop((left, top, right, bottom)))
        found += _of_crop(predictor, (left, top), picture.size, o)
    finest = sorted(found, key=lambda r: (r["crop_box"][2] * r["crop_box"][3], -r["score"]))
    return sorted(without_doubles(finest, o.overlap), key=lambda r: -r["score"])


def crop_boxes(width: int, height: int, options: GridOptions) -> list[tuple[int, int, int, int]]:
    """left, top, right, bottom of the picture and of its crops, layer by layer.

    A picture of few pixels has few crops: those without a pixel are left out.
    """
    boxes = [(0, 0, width, height)]
    for layer in range(1, options.crops + 1):
        n = 2**layer
        shared = round(options.crop_overlap * min(width, height) * 2 / n)
        wide, high = (-(-(shared * (n - 1) + edge) // n) for edge in (width, height))
        for x in range(n):
            for y in range(n):
                left, top = x * (wide - shared), y * (high - shared)
                boxes.append((left, top, min(left + wide, width), min(top + high, height)))
    return list(dict.fromkeys(b for b in boxes if b[0] < b[2] and b[1] < b[3]))


def grid_points(side: int, width: int, height: int) -> np.ndarray:
    """[side^2, 2] x, y: the middles of side x side cells."""
    at = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid(at * width - 0.5, at * height - 0.5)
    return np.stack([x.ravel(), y.ravel()], 1)


def without_doubles(found: list[dict[str, Any]], overlap: float) -> list[dict[str, Any]]:
    """The first of masks whose boxes overlap by more than `overlap`."""
    kept: list[dict[str, Any]] = []
    for record in found:
        boxes = [k["bbox"] for k in kept]
        if not boxes or (rle_codec.iou([record["bbox"]], boxes, [0] * len(boxes)) <= overlap).all():
            kept.append(record)
    return kept


def _of_crop(
    predictor: ClickPredictor, offset: tuple[int, int], size: tuple[int, int], o: GridOptions
) -> list[dict[str, Any]]:  # fmt: skip
    assert predictor.picture is not None
    width, height = predictor.picture.size
    records, crop = [], (*offset, width, height)
    points = grid_points(o.side, width, height)
    for start in range(0, len(points), o.at_once):
        clicks = points[start : start + o.at_once]
        answer = predictor.predict(points=clicks[:, None])
        good = (answer.ious >= o.iou) & (answer.stability >= o.stability)
        for row, column in zip(*np.nonzero(good), strict=True):
            mask = answer.masks[row, column]
            if not mask.any():
                continue
            full = np.zeros(size[::-1], np.uint8)
            full[offset[1] : offset[1] + height, offset[0] : offset[0] + width] = mask
            rle = rle_codec.encode(np.asfortranarray(full))
            box = rle_codec.toBbox(rle).tolist()
            if is_cut(box, crop, size, o.edge):
                continue
            at = clicks[row] + offset
            records.append(
                {
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                    "bbox": box,
                    "area": float(rle_codec.area(rle)),
                    "score": float(answer.ious[row, column]),
                    "stability": float(answer.stability[row, column]),
                    "point": at.tolist(),
                    "crop_box": list(crop),
                }
            )
    return without_doubles(sorted(records, key=lambda r: -r["score"]), o.overlap)


def is_cut(box: Sequence[float], crop: Sequence[float], size: tuple[int, int], edge: float) -> bool:
    """Whether a box ends within `edge` pixels of its crop's edge, and no picture's edge is as near.

    box and crop: left, top, width, height in pixels of the picture; size: its width and height.
    """
    ends = lambda x, y, w, h: np.array([x, y, x + w, y + h])
    near = lambda other: np.abs(ends(*box) - ends(*other)) <= edge
    return bool((near(crop) & ~near((0, 0, *size))).any())
