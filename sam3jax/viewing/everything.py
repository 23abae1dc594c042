"""Masks of everything in a picture: a grid of single clicks, sifted, doubles removed.

Answers to segment_anything.SamAutomaticMaskGenerator, whose defaults these are.
"""

from __future__ import annotations

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
    which the weaker of two masks is a double. at_once: clicks answered at a time.
    """

    side: int = 32
    crops: int = 0
    crop_overlap: float = 512 / 1500
    iou: float = 0.88
    stability: float = 0.95
    overlap: float = 0.7
    at_once: int = 64


def everything(
    predictor: ClickPredictor, picture: Image.Image, options: GridOptions | None = None
) -> list[dict[str, Any]]:
    """COCO records of all masks found, best predicted first: segmentation (RLE), bbox, area, score,
    stability, point."""
    o = options or GridOptions()
    found: list[dict[str, Any]] = []
    for left, top, right, bottom in crop_boxes(*picture.size, o):
        predictor.set_image(picture.crop((left, top, right, bottom)))
        whole = (right - left, bottom - top) == picture.size
        found += _of_crop(predictor, (left, top), picture.size, o, whole)
    return without_doubles(found, o.overlap)


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
    """The best of masks whose boxes overlap by more than `overlap`, best predicted first."""
    kept: list[dict[str, Any]] = []
    for record in sorted(found, key=lambda r: -r["score"]):
        boxes = [k["bbox"] for k in kept]
        if not boxes or (rle_codec.iou([record["bbox"]], boxes, [0] * len(boxes)) <= overlap).all():
            kept.append(record)
    return kept


def _of_crop(
    predictor: ClickPredictor, offset: tuple[int, int], size: tuple[int, int], o: GridOptions, whole: bool
) -> list[dict[str, Any]]:  # fmt: skip
    assert predictor.picture is not None
    width, height = predictor.picture.size
    records = []
    points = grid_points(o.side, width, height)
    for start in range(0, len(points), o.at_once):
        clicks = points[start : start + o.at_once]
        answer = predictor.predict(points=clicks[:, None])
        good = (answer.ious >= o.iou) & (answer.stability >= o.stability)
        for row, column in zip(*np.nonzero(good), strict=True):
            mask = answer.masks[row, column]
            if not mask.any() or (not whole and _touches_edge(mask, offset, size)):
                continue
            full = np.zeros(size[::-1], np.uint8)
            full[offset[1] : offset[1] + height, offset[0] : offset[0] + width] = mask
            rle = rle_codec.encode(np.asfortranarray(full))
            at = clicks[row] + offset
            records.append(
                {
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                    "bbox": rle_codec.toBbox(rle).tolist(),
                    "area": float(rle_codec.area(rle)),
                    "score": float(answer.ious[row, column]),
                    "stability": float(answer.stability[row, column]),
                    "point": at.tolist(),
                }
            )
    return without_doubles(records, o.overlap)


def _touches_edge(mask: np.ndarray, offset: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a mask is cut by an edge of its crop that is no edge of the picture."""
    height, width = mask.shape
    left, top = offset
    return bool(
        (left > 0 and mask[:, 0].any())
        or (top > 0 and mask[0].any())
        or (left + width < size[0] and mask[:, -1].any())
        or (top + height < size[1] and mask[-1].any())
    )
