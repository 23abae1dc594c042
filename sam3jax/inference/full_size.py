"""On the host: candidates become detections at the picture's own size.

One path for validation, `evaluate` and `predict`.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from pycocotools import mask as coco_mask

from sam3jax.inference.candidates import Candidates, logit

_MASKS_AT_ONCE = 8
_PIXELS_AT_ONCE = 1 << 22  # bounds memory whatever the picture's size: 16 MB of float32


@dataclass(frozen=True)
class Detections:
    """Instances of one phrase in one picture, strongest first, in the picture's own pixels.

    scores [K]; boxes_xyxy [K, 4] (left, top, right, bottom; not clipped to the picture); masks: K
    compressed COCO RLEs of size (height, width).
    """

    scores: np.ndarray
    boxes_xyxy: np.ndarray
    masks: list[dict[str, Any]]
    height: int
    width: int
    duplicates: int = 0  # weaker finds on the same things, left out

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> Detections:
        """Those with a score above the threshold, as the published processor keeps them."""
        return self._only(np.flatnonzero(self.scores > threshold), self.duplicates)

    def distinct(self, iou: float | None) -> Detections:
        """Each thing once: without those whose mask overlaps a stronger one's by more than `iou`; None: all."""
        chosen = distinct(self.masks, iou)
        return self._only(np.array(chosen, int), self.duplicates + len(self) - len(chosen))

    def _only(self, chosen: np.ndarray, duplicates: int) -> Detections:
        masks = [self.masks[k] for k in chosen]
        size = self.height, self.width
        return Detections(self.scores[chosen], self.boxes_xyxy[chosen], masks, *size, duplicates)

    def decode_masks(self) -> np.ndarray:
        """[K, height, width] bool."""
        if not self.masks:
            return np.zeros((0, self.height, self.width), bool)
        return np.stack([coco_mask.decode(rle).astype(bool) for rle in self.masks])

    def to_coco(self, image_id: int, category_id: int) -> list[dict[str, Any]]:
        """COCO results: bbox as x, y, width, height in pixels, segmentation as RLE with text counts."""
        results = []
        for score, (left, top, right, bottom), rle in zip(
            self.scores.tolist(), self.boxes_xyxy.tolist(), self.masks, strict=True
        ):
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [left, top, right - left, bottom - top],
                    "score": score,
                    "segmentation": {**rle, "counts": _text(rle["counts"])},
                }
            )
        return results

    def to_supervision(self, phrase: str, class_id: int = 0) -> Any:
        """The same as `supervision.Detections`, with masks and the phrase as `class_name`.

        Raises ImportError where the package `supervision` is not installed.
        """
        supervision = importlib.import_module("supervision")  # an optional extra
        return supervision.Detections(
            xyxy=np.asarray(self.boxes_xyxy, np.float32).reshape(-1, 4),
            mask=self.decode_masks(),
            confidence=np.asarray(self.scores, np.float32),
            class_id=np.full(len(self), class_id),
            data={"class_name": np.full(len(self), phrase)},
        )


def distinct(regions: Sequence[Any], iou: float | None) -> list[int]:
    """Greedy non-maximum suppression: places of the regions to keep, of those given strongest first.

    regions: COCO RLEs, or boxes x, y, width, height; all of one kind. Dropped is what overlaps a kept one by more
    than `iou`; None drops nothing. Two empty masks are no rivals.
    """
    if iou is None or len(regions) < 2:
        return list(range(len(regions)))
    regions = list(regions)
    rival = coco_mask.iou(regions, regions, [0] * len(regions)) > iou
    kept: list[int] = []
    for k in range(len(regions)):
        if not rival[k, kept].any():
            kept.append(k)
    return kept


def fetch(candidates: Candidates, floor: float) -> Candidates:
    """Candidates on the host; masks only of as many queries as have a score above `floor`.

    The strongest come first, so scores are read before a mask is moved. The number is rounded up to a
    power of two: few programs are compiled.
    """
    scores, keep, boxes = jax.device_get((candidates.scores, candidates.keep, candidates.boxes))
    most = int(np.flatnonzero(((scores > floor) & keep).any(0)).max(initial=-1)) + 1
    wanted = min(1 << (most - 1).bit_length(), scores.shape[1]) if most else 0
    masks = jax.device_get(candidates.mask_logits[:, :wanted])
    return Candidates(scores[:, :wanted], boxes[:, :wanted], masks, keep[:, :wanted])


def full_size(
    candidates: Candidates,
    pair: int,
    height: int,
    width: int,
    *,
    floor: float = 0.0,
    limit: int | None = None,
    mask_threshold: float = 0.5,
) -> Detections:
    """The detections of one pair at the picture's own size, those with a score above `floor`.

    The picture must have been squashed to the model's square without padding, so that a box scales
    by (width, height) and a mask by bilinear interpolation of its logits.
    """
    ranked = np.asarray(candidates.scores[pair])
    chosen = np.flatnonzero(np.asarray(candidates.keep[pair]) & (ranked > floor))[:limit]
    centre_x, centre_y, box_width, box_height = np.asarray(candidates.boxes[pair])[chosen].T
    corners = [
        centre_x - box_width / 2, centre_y - box_height / 2,
        centre_x + box_width / 2, centre_y + box_height / 2,
    ]  # fmt: skip
    boxes = np.stack(corners, axis=1) * np.array([width, height, width, height], np.float32)
    logits = np.asarray(candidates.mask_logits[pair])[chosen]
    masks = enlarge_masks(logits, height, width, threshold=mask_threshold)
    return Detections(ranked[chosen], boxes, masks, height, width)


def enlarge_masks(
    logits: np.ndarray, height: int, width: int, *, threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Mask logits [K, Y', X'] -> K compressed RLEs of (height, width).

    Bilinear interpolation of the logits with half-pixel centres (torch's align_corners=False), then
    sigmoid above `threshold`. Works in strips of whole columns, the order in which COCO's run
    lengths go, so a mask of a 100-megapixel picture never exists as a picture.
    """
    cutoff = logit(threshold)
    rle: list[dict[str, Any]] = []
    for start in range(0, len(logits), _MASKS_AT_ONCE):
        chunk = np.asarray(logits[start : start + _MASKS_AT_ONCE], np.float32)
        count = len(chunk)
        chunk = np.pad(chunk, ((0, _MASKS_AT_ONCE - count), (0, 0), (0, 0)), mode="edge")
        rle += _enlarge_chunk(chunk, cutoff, height, width)[:count]
    return rle


def _enlarge_chunk(
    logits: np.ndarray, cutoff: float, height: int, width: int
) -> list[dict[str, Any]]:
    chex.assert_rank(logits, 3)
    rows = _bucket(height)
    columns = min(_bucket(width), 1 << int(math.log2(max(1, _PIXELS_AT_ONCE // 8 // rows))))
    transposed = jnp.asarray(logits.transpose(0, 2, 1))  # [K, X', Y']
    changes: list[list[np.ndarray]] = [[] for _ in logits]
    last = np.zeros(len(logits), bool)
    first, stop = _columns_of_interest(logits > cutoff, width)
    for start in range(first, stop, columns):
        strip = _enlarge_strip(
            transposed, cutoff, start, width, height, columns=columns, rows=rows
        )  # [K, columns, rows]
        used = min(columns, width - start)
        bits = np.asarray(strip)[:, :used, :height].reshape(len(logits), -1)
        edges = bits != np.concatenate([last[:, None], bits[:, :-1]], axis=1)
        last = bits[:, -1]
        for k, edge in enumerate(edges):
            changes[k].append(np.flatnonzero(edge) + start * height)
    return [rle_of_changes(np.concatenate(parts) if parts else np.zeros(0, int), height, width)
            for parts in changes]  # fmt: skip


def _columns_of_interest(positive: np.ndarray, width: int) -> tuple[int, int]:
    """Columns [first, stop) of the enlarged picture outside of which no mask of the chunk can be.

    An interpolated value exceeds the cutoff only next to a cell that does: one cell of margin, and
    one more for rounding.
    """
    cells = np.flatnonzero(positive.any(axis=(0, 1)))
    if not len(cells):
        return 0, 0
    scale = width / positive.shape[2]
    first = math.floor((cells[0] - 2) * scale)
    stop = math.ceil((cells[-1] + 3) * scale)
    return max(0, first), min(width, stop + 1)  # one column behind closes the last run


@functools.partial(jax.jit, static_argnames=("columns", "rows"))
def _enlarge_strip(
    transposed: jax.Array,
    cutoff: float,
    start: int,
    width: int,
    height: int,
    *,
    columns: int,
    rows: int,
) -> jax.Array:
    """Columns start.. of the enlarged masks: [K, X', Y'] -> bool [K, columns, rows]."""
    low, high, part = _taps(start + jnp.arange(columns), width, transposed.shape[1])
    part = part[:, None]
    strip = transposed[:, low] * (1 - part) + transposed[:, high] * part  # [K, columns, Y']
    low, high, part = _taps(jnp.arange(rows), height, transposed.shape[2])
    strip = strip[..., low] * (1 - part) + strip[..., high] * part  # [K, columns, rows]
    return strip > cutoff


def _taps(position: jax.Array, size: int, cells: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The two cells between which an enlarged pixel lies, and its part of the way to the second."""
    source = (position + 0.5) * (cells / jnp.asarray(size, jnp.float32)) - 0.5
    source = jnp.clip(source, 0, cells - 1)
    low = source.astype(jnp.int32)
    return low, jnp.minimum(low + 1, cells - 1), source - low


def _bucket(size: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, ...: few sizes to compile for, at most half wasted."""
    power = 1 << max(0, size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def rle_of_changes(changes: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Compressed RLE of a mask that starts with 0 and changes at these column-major positions."""
    bounds = np.concatenate([[0], changes, [height * width]])
    counts = np.diff(bounds)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    raw = {"size": [height, width], "counts": counts.tolist()}
    return coco_mask.frPyObjects(raw, height, width)


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
