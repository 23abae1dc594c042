"""COCO annotations as immutable records, with everything odd about them counted, not guessed.

What the pictures' folder looks like is the business of `folders`; the pixels are that of `pictures`.
Annotations refer to the picture *as displayed* (EXIF orientation applied); see `pictures.read_picture`.

Odd entries never stop a run unless nothing sensible can be made of them: they are repaired or left
out, and `Dataset.problems` holds one sentence and a count for each kind.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sam3jax.data.pictures import DataError, displayed_size
from sam3jax.data.segmentations import (
    Polygons,
    Rle,
    decode_segmentation,
    read_segmentation,
    segmentation_area,
)

_PHRASE_FIELDS = frozenset(("phrase", "noun_phrase", "caption"))


@dataclass(frozen=True, slots=True, eq=False)
class Annotation:
    """One instance. bbox is left, top, width, height in pixels, inside the picture.

    segmentation is None where there is no usable mask: the box still trains.
    """

    id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: Polygons | Rle | None
    iscrowd: bool
    area: float


@dataclass(frozen=True, slots=True, eq=False)
class ImageRecord:
    """One picture as displayed, `width` x `height` pixels.

    negative_ids: the only categories known to be absent (federated data such as LVIS); None: every
    category without an annotation is absent. not_exhaustive_ids: labelled in part only.
    """

    id: int
    file: Path
    width: int
    height: int
    annotations: tuple[Annotation, ...]
    negative_ids: frozenset[int] | None = None
    not_exhaustive_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """One split. `images[row]` is the picture that `Batch.image_id == row` means."""

    name: str
    images: tuple[ImageRecord, ...]
    categories: Mapping[int, str]
    problems: Mapping[str, int] = field(default_factory=dict)


def used_categories(dataset: Dataset) -> tuple[int, ...]:
    """Ids of the categories with at least one instance, crowds included, in increasing order.

    A category without annotations (Roboflow's class 0) is no concept: nobody looked for it.
    """
    seen = {a.category_id for image in dataset.images for a in image.annotations}
    return tuple(sorted(seen))


def decode_mask(annotation: Annotation, height: int, width: int) -> np.ndarray:
    """The instance's pixels, bool [Y, X]; all False where it has no mask."""
    return decode_segmentation(annotation.segmentation, height, width)


def parse_coco(raw: Any, name: str, source: str, locate: Callable[[str], Path | None]) -> Dataset:
    """Records of a COCO dictionary; `locate` finds the file of a `file_name`, None where there is none.

    Raises DataError where `raw` is not COCO, pictures are missing, or nothing usable is left.
    """
    images, annotations, categories = _sections(raw, source)
    problems: Counter[str] = Counter()
    names = _categories(categories, problems, source)
    merged = _merge_equal_names(names, problems)
    kept = _images(images, locate, problems, source)
    by_image: dict[Any, list[Annotation]] = defaultdict(list)
    seen: set[Any] = set()
    for item in annotations:
        annotation = _annotation(item, kept, merged, problems)
        if annotation is None:
            continue
        if annotation.id in seen:
            problems["annotation id used more than once (kept)"] += 1
        seen.add(annotation.id)
        by_image[item["image_id"]].append(annotation)
    for key in by_image:
        boxes = Counter((a.category_id, a.bbox) for a in by_image[key] if not a.iscrowd)
        if repeats := sum(boxes.values()) - len(boxes):
            problems["annotation repeats another one's category and box (kept)"] += repeats
    records = tuple(
        replace(record, annotations=tuple(by_image.get(key, ()))) for key, record in kept.items()
    )
    if not records:
        raise DataError(f"{source}: no usable picture among {len(images)} entries of `images`")
    own = {i: n for i, n in names.items() if merged[i] == i}
    return Dataset(name=name, images=records, categories=own, problems=dict(problems))


def load_json(path: Path) -> Any:
    """The parsed file; DataError where it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # bad syntax, bad encoding
        raise DataError(f"{path} is not JSON ({error}): export the annotations again") from error


def rename_categories(dataset: Dataset, phrases: Mapping[str, str]) -> Dataset:
    """The same data under other phrases; categories given the same phrase become one."""
    if not set(phrases) & set(dataset.categories.values()):
        raise DataError(
            f"data.phrases names no category of {dataset.name}: it names {', '.join(phrases)}; "
            f"the data has {', '.join(sorted(dataset.categories.values()))}"
        )
    names = {i: phrases.get(n, n) for i, n in dataset.categories.items()}
    problems = Counter(dataset.problems)
    merged = _merge_equal_names(names, problems)
    images = tuple(
        replace(
            image,
            annotations=tuple(
                replace(a, category_id=merged[a.category_id]) for a in image.annotations
            ),
            negative_ids=None
            if image.negative_ids is None
            else frozenset(merged[i] for i in image.negative_ids),
            not_exhaustive_ids=frozenset(merged[i] for i in image.not_exhaustive_ids),
        )
        for image in dataset.images
    )
    own = {i: n for i, n in names.items() if merged[i] == i}
    return Dataset(dataset.name, images, own, dict(problems))


def require_masks(dataset: Dataset) -> None:
    """Raise DataError where some categories have masks and another has boxes only.

    A set without a single mask is box-only data and passes: that is said, and trains boxes.
    """
    boxes: Counter[int] = Counter()
    masks: Counter[int] = Counter()
    for image in dataset.images:
        for a in image.annotations:
            boxes[a.category_id] += 1
            masks[a.category_id] += a.segmentation is not None
    without = [dataset.categories[i] for i in sorted(boxes) if not masks[i]]
    if without and masks.total():
        raise DataError(
            f"category {', '.join(repr(n) for n in without)} of {dataset.name} has boxes but no masks, "
            f"other categories have masks: add masks, or train boxes only with loss.masks=false, "
            f"or allow it with data.allow_missing_masks=true"
        )


def _sections(raw: Any, source: str) -> tuple[list, list, list]:
    if isinstance(raw, list):
        raise DataError(
            f"{source} is a list, expected a COCO dictionary with `images`, `annotations` and "
            f"`categories`; a list is how predictions are stored: give the ground truth"
        )
    wanted = ("images", "annotations", "categories")
    missing = (
        [k for k in wanted if not isinstance(raw.get(k), list)] if isinstance(raw, dict) else wanted
    )
    if missing:
        found = ", ".join(list(raw)[:6]) if isinstance(raw, dict) else type(raw).__name__
        raise DataError(
            f"{source} is not COCO: no list `{'`, `'.join(missing)}` (found: {found or 'nothing'}); "
            f"export the data set as COCO instance annotations"
        )
    if not raw["categories"]:
        raise DataError(f"{source} has no categories: export COCO *instance* annotations")
    return raw["images"], raw["annotations"], raw["categories"]


def _categories(items: list, problems: Counter, source: str) -> dict[int, str]:
    names: dict[int, str] = {}
    for item in items:
        if not isinstance(item, dict) or "id" not in item or not str(item.get("name", "")).strip():
            raise DataError(f"{source}: category {item!r} needs an `id` and a `name`")
        if item["id"] in names and names[item["id"]] != str(item["name"]).strip():
            raise DataError(
                f"{source}: category id {item['id']} is both {names[item['id']]!r} and "
                f"{item['name']!r}: give each category an id of its own"
            )
        names[item["id"]] = str(item["name"]).strip()
        for key in sorted(set(item) & {"phrase", "noun_phrase", "synonyms"}):
            problems[f"category field `{key}` is not used: phrases are category names"] += 1
    return names


def _merge_equal_names(names: Mapping[int, str], problems: Counter) -> dict[int, int]:
    """Category id -> id of the first category of that name: the same phrase is the same concept."""
    first: dict[str, int] = {}
    merged = {i: first.setdefault(name, i) for i, name in names.items()}
    if repeats := len(merged) - len(first):
        problems["category repeats another one's name (made one)"] += repeats
    return merged


def _images(
    items: list, locate: Callable[[str], Path | None], problems: Counter, source: str
) -> dict[Any, ImageRecord]:
    records: dict[Any, ImageRecord] = {}
    ambiguous: set[Any] = set()
    missing: list[str] = []
    files: set[Path] = set()
    for item in items:
        if not isinstance(item, dict) or "id" not in item or not item.get("file_name"):
            raise DataError(f"{source}: picture {item!r} needs an `id` and a `file_name`")
        key, file = item["id"], locate(str(item["file_name"]))
        if file is None:
            missing.append(str(item["file_name"]))
            continue
        if key in records:
            if records[key].file != file:
                ambiguous.add(key)
            problems["picture id used more than once"] += 1
            continue
        if file in files:
            problems["picture listed more than once under different ids (kept)"] += 1
        files.add(file)
        width, height = item.get("width"), item.get("height")
        if not all(isinstance(v, int) and v > 0 for v in (width, height)):
            problems["picture without width and height: taken from the file"] += 1
            width, height = displayed_size(file)
        negative = item.get("neg_category_ids")
        records[key] = ImageRecord(
            id=key,
            file=file,
            width=width,
            height=height,
            annotations=(),
            negative_ids=None if negative is None else frozenset(negative),
            not_exhaustive_ids=frozenset(item.get("not_exhaustive_category_ids") or ()),
        )
    if missing:
        raise DataError(
            f"{len(missing)} of {len(items)} pictures listed in {source} are missing: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; put them beside the "
            f"JSON (or into images/), or take them out of its `images`"
        )
    for key in ambiguous:  # whose annotations are whose cannot be told
        problems["picture left out: its id belongs to several files"] += 1
        del records[key]
    return records


def _annotation(
    item: Any, images: Mapping[Any, ImageRecord], merged: Mapping[int, int], problems: Counter
) -> Annotation | None:
    if not isinstance(item, dict) or "image_id" not in item or "category_id" not in item:
        problems["annotation left out: no image_id or no category_id"] += 1
        return None
    if item["image_id"] not in images:
        problems["annotation left out: its picture is not listed"] += 1
        return None
    if item["category_id"] not in merged:
        problems["annotation left out: its category is not listed"] += 1
        return None
    for key in _PHRASE_FIELDS & item.keys():
        problems[f"annotation field `{key}` is not used: phrases are category names"] += 1
    image = images[item["image_id"]]
    segmentation, extent = read_segmentation(
        item.get("segmentation"), image.width, image.height, problems
    )
    box = _box(item.get("bbox"), extent, image, problems)
    if box is None:
        return None
    stated = item.get("area")
    usable = isinstance(stated, int | float) and math.isfinite(stated) and stated > 0
    return Annotation(
        id=item.get("id", -1),
        category_id=merged[item["category_id"]],
        bbox=box,
        segmentation=segmentation,
        iscrowd=bool(item.get("iscrowd", 0)),
        area=float(stated) if usable else (segmentation_area(segmentation) or box[2] * box[3]),
    )


def _box(
    value: Any, extent: tuple | None, image: ImageRecord, problems: Counter
) -> tuple[float, float, float, float] | None:
    """The box inside the picture, or from the mask's extent (left, top, right, bottom), or None."""
    try:
        x, y, w, h = (float(v) for v in value)
        stated = all(math.isfinite(v) for v in (x, y, w, h)) and w > 0 and h > 0
    except (TypeError, ValueError):
        stated = False
    if stated:
        if extent is not None and _disagree((x, y, x + w, y + h), extent):
            problems["box does not fit its own mask (kept)"] += 1
        edges = (x, y, x + w, y + h)
    elif extent is not None and extent[2] > extent[0] and extent[3] > extent[1]:
        problems["box missing or without area: taken from the mask"] += 1
        edges = extent
    else:
        problems["annotation left out: no box with an area"] += 1
        return None
    left, right = (min(max(v, 0.0), float(image.width)) for v in (edges[0], edges[2]))
    top, bottom = (min(max(v, 0.0), float(image.height)) for v in (edges[1], edges[3]))
    if right <= left or bottom <= top:
        problems["annotation left out: box outside the picture"] += 1
        return None
    outside = max(left - edges[0], top - edges[1], edges[2] - right, edges[3] - bottom)
    if outside > 1:
        problems["box reached over the picture's edge (cut)"] += 1
    return (left, top, right - left, bottom - top)


def _disagree(a: tuple, b: tuple) -> bool:
    slack = 3 + 0.05 * max(b[2] - b[0], b[3] - b[1])
    return any(abs(p - q) > slack for p, q in zip(a, b))
