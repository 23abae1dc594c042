"""Which picture is shown when: shuffled epochs, pictures of rare categories more often (LVIS)."""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from typing import Any

import grain
import numpy as np

from sam3jax.data.records import Dataset
from sam3jax.data.segmentations import Polygons, Rle


class Order:
    """An endless, shuffled order of pictures that follows from the seed.

    threshold: of repeat factor sampling (Gupta, Dollar, Girshick: LVIS, appendix B): a picture is shown
    max over its categories of sqrt(threshold / share of pictures with the category) times an epoch, at
    least once; what is over a whole number is drawn once for the run.
    """

    def __init__(self, dataset: Dataset, seed: int, threshold: float = 0.0) -> None:
        self._pictures, self._seed = len(dataset.images), seed
        self._rows: np.ndarray | None = None
        self._copies = 1
        if threshold:
            factors = repeat_factors(dataset, threshold)
            draws = np.random.default_rng((seed, 2)).random(len(factors))
            counts = (factors + draws).astype(int)
            self._rows = np.repeat(np.arange(len(factors)), counts)
            self._copy = np.concatenate([np.arange(n) for n in counts])
            self._copies = int(counts.max())

    def __len__(self) -> int:
        """Pictures of an epoch, repeated ones counted as often as they are shown."""
        return self._pictures if self._rows is None else len(self._rows)

    def __call__(self, position: int) -> tuple[int, int]:
        """(turn, row): how often the picture was shown before, at most, and which one it is."""
        epoch, place = position // len(self), int(self._shuffled[position])
        if self._rows is None:
            return epoch, place
        return epoch * self._copies + int(self._copy[place]), int(self._rows[place])

    @functools.cached_property
    def _shuffled(self) -> Any:  # a grain.MapDataset of int
        return grain.MapDataset.range(len(self)).seed(self._seed).shuffle().repeat()


def repeat_factors(dataset: Dataset, threshold: float) -> np.ndarray:
    """How often an epoch shows each picture, float >= 1."""
    present = [{a.category_id for a in i.annotations if not a.iscrowd} for i in dataset.images]
    pictures = Counter(category for found in present for category in found)
    total = len(dataset.images)
    factor = {c: max(1.0, (threshold * total / n) ** 0.5) for c, n in pictures.items()}
    return np.array([max((factor[c] for c in found), default=1.0) for found in present])


def fingerprint(dataset: Dataset) -> dict[str, int]:
    """What tells data apart that only look alike: counts, and a checksum over whatever is asked and answered."""
    checksum, annotations = 0, 0
    for image in dataset.images:
        annotations += len(image.annotations)
        boxes = np.array(
            [(a.category_id, a.iscrowd, *a.bbox) for a in image.annotations], np.float64
        )
        judged = sorted(image.negative_ids or ()), sorted(image.not_exhaustive_ids)
        text = f"{image.file.name}\0{image.frame}\0{image.width}\0{image.height}\0{judged}"
        checksum = zlib.crc32(text.encode("utf-8", "surrogateescape"), checksum)
        checksum = zlib.crc32(boxes.tobytes(), checksum)
        for annotation in image.annotations:
            checksum = _add_mask(annotation.segmentation, checksum)
    names = "\0".join(f"{i} {name}" for i, name in dataset.categories.items())
    checksum = zlib.crc32(names.encode("utf-8", "replace"), checksum)
    return {"pictures": len(dataset.images), "annotations": annotations, "checksum": checksum}


def _add_mask(mask: Polygons | Rle | None, checksum: int) -> int:
    """A checksum, continued over a mask as it is stored."""
    if mask is None:
        return zlib.crc32(b"-", checksum)
    if isinstance(mask, tuple):
        parts = [np.ascontiguousarray(p).tobytes() for p in mask]
    else:
        counts = mask["counts"]
        parts = [counts.encode() if isinstance(counts, str) else bytes(counts)]
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum
