"""The records of a data set: immutable, whatever file they were read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3jax.data import volumes
from sam3jax.data.ledger import Ledger
from sam3jax.data.pictures import DEFAULT, Reading, open_rgb
from sam3jax.data.segmentations import Polygons, Rle, decode_segmentation


@dataclass(frozen=True, slots=True, eq=False)
class Annotation:
    """One instance. bbox is left, top, width, height in pixels, inside the picture.

    segmentation is None where there is no usable mask: the box still trains. clicks: stored with it, x, y
    in pixels and 1 inside or 0 outside.
    """

    id: Any
    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: Polygons | Rle | None
    iscrowd: bool
    area: float
    clicks: tuple[tuple[float, float, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ImageRecord:
    """One picture as displayed, `width` x `height` pixels.

    negative_ids: the only categories known to be absent (federated data such as LVIS); None: every
    category without an annotation is absent. not_exhaustive_ids: labelled in part only.
    frame: page or frame of a file with several. reading: how its file becomes pixels. orientation,
    stored: EXIF orientation and (width, height) of the file's header, None where nobody has read it.
    """

    id: int
    file: Path
    width: int
    height: int
    annotations: tuple[Annotation, ...]
    negative_ids: frozenset[int] | None = None
    not_exhaustive_ids: frozenset[int] = frozenset()
    frame: int = 0
    reading: Reading = DEFAULT
    orientation: int | None = None
    stored: tuple[int, int] | None = None

    @property
    def sources(self) -> list[Path]:
        """The files that its pixels follow from."""
        several = self.reading.slices > 1 and not volumes.is_volume(self.file)
        return list(volumes.neighbours(self.file)) if several else [self.file]

    def open(self) -> Image.Image:
        """The picture that the annotations refer to, mode RGB. Raises DataError."""
        size = (self.width, self.height)
        return open_rgb(self.file, size, frame=self.frame, reading=self.reading)


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """One split. `images[row]` is the picture that `Batch.image_id == row` means.

    Ids are whole numbers >= 0. Where the file has others, `source_ids` holds theirs: kind ("image",
    "category") -> own number -> id in the file. stated_masks: annotations that state a mask, readable
    or not. problems: what is odd, with a count for each sentence.
    """

    name: str
    images: tuple[ImageRecord, ...]
    categories: Mapping[int, str]
    problems: Mapping[str, int] = field(default_factory=Ledger)
    source_ids: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    stated_masks: int = 0


def used_categories(dataset: Dataset) -> tuple[int, ...]:
    """Ids of the categories with at least one annotation, crowds included, in increasing order.

    A category without annotations (Roboflow's class 0) is no concept: nobody looked for it.
    """
    seen = {a.category_id for image in dataset.images for a in image.annotations}
    return tuple(sorted(seen))


def trained_categories(dataset: Dataset) -> tuple[int, ...]:
    """Ids of the categories with at least one instance that is no crowd, in increasing order.

    Where there are crowds only, no picture shows what one instance is: asked in evaluation (what lies
    on a crowd is not wrong), never in training, where it could only ever be an absence.
    """
    seen = {a.category_id for image in dataset.images for a in image.annotations if not a.iscrowd}
    return tuple(sorted(seen))


def decode_mask(annotation: Annotation, height: int, width: int) -> np.ndarray:
    """The instance's pixels, bool [Y, X]; all False where it has no mask."""
    return decode_segmentation(annotation.segmentation, height, width)
