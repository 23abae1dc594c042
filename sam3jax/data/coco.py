"""A COCO dictionary -> records, with everything odd about it counted, not guessed.

The way of a file: categories and their names (`names`), pictures and their files (`listing`), then
annotations one by one (`boxes`, `segmentations`), then what all of them say together (`judgements`).
Annotations refer to the picture *as displayed* (EXIF orientation applied); see `pictures`.

Odd entries never stop a run unless nothing sensible can be made of them: they are repaired or left
out, and `Dataset.problems` holds one sentence and a count for each kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sam3jax.data.boxes import BoxJudge, parse_box, place_box, reaches_over
from sam3jax.data.ids import key_of
from sam3jax.data.json_file import load_json, no_collection, sections
from sam3jax.data.judgements import (
    LEFT_OUT,
    UNLISTED,
    judge_crowds,
    judge_left_out,
    judge_shift,
    require_masks,
)
from sam3jax.data.ledger import DataError, Ledger, Where
from sam3jax.data.listing import Listing, Locate
from sam3jax.data.names import Categories, read_categories, rename_categories
from sam3jax.data.numbers import flag, number
from sam3jax.data.records import Annotation, Dataset, ImageRecord, decode_mask, used_categories
from sam3jax.data.segmentations import read_segmentation, segmentation_area
from sam3jax.data.stored_clicks import is_in_box, read_clicks

__all__ = [
    "Annotation",
    "DataError",
    "Dataset",
    "ImageRecord",
    "decode_mask",
    "load_json",
    "parse_coco",
    "rename_categories",
    "require_masks",
    "used_categories",
]

Check = Callable[[list[ImageRecord], Ledger], list[ImageRecord]]

_PHRASE_FIELDS = ("phrase", "noun_phrase", "caption")
_DOUBTS = ("ignore", "difficult")
_NOTED = frozenset((*_PHRASE_FIELDS, *_DOUBTS))
# What exporters call COCO's fields.
_OTHER_NAMES = {
    "image_id": ("imageId", "image_ID", "img_id"),
    "category_id": ("categoryId", "category_ID", "cat_id", "class_id"),
    "bbox": ("box", "bounding_box", "boundingBox"),
    "segmentation": ("segmentations", "polygon", "polygons", "rle", "mask"),
    "iscrowd": ("is_crowd", "isCrowd", "crowd"),
}


def parse_coco(
    raw: Any,
    name: str,
    source: str,
    locate: Locate,
    check: Check | None = None,
    *,
    consume: bool = False,
) -> Dataset:
    """Records of a COCO dictionary; `locate` finds the file of a `file_name`, None where there is none.

    check: completes the pictures' records from their files before annotations are read, or raises.
    consume: empties `raw` on the way, which saves the memory of a large file.
    Raises DataError where `raw` is not COCO, pictures are missing, or nothing usable is left.
    """
    images, annotations, categories = sections(raw, source)
    ledger = Ledger()
    if raw.get("videos"):
        ledger.add("`videos` of the file is not used: frames are read as pictures, without tracks")
    names = read_categories(categories, ledger, source)
    listing = Listing(images, locate, names, ledger, source)
    if not listing.records:
        raise DataError(f"{source}: no usable picture among {len(images)} entries of `images`")
    if check is not None:
        listing.records = check(listing.records, ledger)
    reader = _Reader(listing, names, ledger)
    with no_collection():
        for k, item in enumerate(annotations):
            reader.read(item)
            if consume:
                annotations[k] = None
    records = [
        replace(record, annotations=tuple(found)) if found else record
        for record, found in zip(listing.records, reader.found)
    ]
    records = [_without_contradiction(record, ledger) for record in records]
    if not names.ids.sources:
        judge_shift(reader.stated_categories, set(names.names), source)
    reader.judge.check(source, ledger)
    covered = sum(bool(found) for found in reader.found)
    judge_left_out(ledger, len(annotations), covered, len(records), source)
    judge_crowds((record.annotations for record in records), source)
    sources = {"image": listing.ids.sources, "category": names.ids.sources}
    return Dataset(
        name=name,
        images=tuple(records),
        categories=names.own,
        problems=ledger,
        source_ids={kind: found for kind, found in sources.items() if found},
        stated_masks=reader.stated_masks,
    )


def _without_contradiction(record: ImageRecord, ledger: Ledger) -> ImageRecord:
    """No category is absent from a picture in which it is annotated."""
    if not record.negative_ids:
        return record
    there = record.negative_ids & {a.category_id for a in record.annotations}
    for category in sorted(there):
        ledger.add("`neg_category_ids` has a category that is annotated there (left out)", record.file.name, record.id, category)  # fmt: skip
    return replace(record, negative_ids=record.negative_ids - there) if there else record


class _Reader:
    """Reads annotations one after the other; found: those of each picture."""

    def __init__(self, listing: Listing, categories: Categories, ledger: Ledger) -> None:
        self.found: list[list[Annotation]] = [[] for _ in listing.records]
        self.judge = BoxJudge()
        self.stated_masks = 0
        self.stated_categories: set[int] = set()  # category ids of annotations, whole numbers only
        self._listing, self._categories, self._ledger = listing, categories, ledger
        self._ids: set[Any] = set()
        self._seen: Counter[tuple] = Counter()

    def read(self, item: Any) -> None:
        """Keep the annotation, or count why it is left out."""
        ledger = self._ledger
        id = item.get("id") if isinstance(item, dict) else None
        if isinstance(item, dict) and not _OTHER_NAMES.keys() <= item.keys():
            item = self._in_coco_s_words(item)
        if not isinstance(item, dict) or "image_id" not in item or "category_id" not in item:
            ledger.add(f"{LEFT_OUT}: no image_id or no category_id", "", id, item)
            return
        row = self._listing.find(item["image_id"])
        if row is None:
            row = self._listing.find_by_name(item["image_id"])
            if row is None:
                ledger.add(UNLISTED, "", id, item["image_id"])
                return
        record = self._listing.records[row]
        where = (self._listing.names[row], id)
        category = self._categories.find(item["category_id"])
        if type(item["category_id"]) is int:
            self.stated_categories.add(item["category_id"])
        if category is None:
            category = self._categories.find_by_name(item["category_id"])
            if category is None:
                found = item["category_id"]
                ledger.add(f"{LEFT_OUT}: its category is not listed", *where, found)
                return
        # Most ids are plain numbers, and most annotations have no other fields: looking closer costs time.
        if type(item["image_id"]) is not int or type(item["category_id"]) is not int:
            self._note_ids(item, where)
        if not _NOTED.isdisjoint(item):
            self._note_fields(item, where)
        annotation = self._annotation(item, record, category, where)
        if annotation is not None and self._is_new(annotation, row, where):
            self.found[row].append(annotation)
            if annotation.clicks:
                self._look_at_clicks(annotation, where)

    def _note_ids(self, item: dict, where: Where) -> None:
        for field, ids in (("image_id", self._listing.ids), ("category_id", self._categories.ids)):
            if not ids.lists(item[field]):
                self._ledger.add(
                    f"`{field}` is written otherwise than the id (read)", *where, item[field]
                )

    def _note_fields(self, item: dict, where: Where) -> None:
        for key in _PHRASE_FIELDS:
            if key in item:
                self._ledger.add(
                    f"annotation field `{key}` is not used: phrases are category names", *where
                )
        for key in _DOUBTS:
            if key in item and flag(item[key]):
                self._ledger.add(f"annotation field `{key}` is not used (kept as an instance)", *where)  # fmt: skip

    def _look_at_clicks(self, annotation: Annotation, where: Where) -> None:
        for x, y, kind in annotation.clicks:
            if kind and not is_in_box(x, y, annotation.bbox):
                self._ledger.add("stored click with label 1 lies outside the box of its object (kept)", *where, [x, y])  # fmt: skip

    def _in_coco_s_words(self, item: dict) -> dict:
        """The annotation with fields of other names where COCO's are missing."""
        for field, others in _OTHER_NAMES.items():
            for other in others if field not in item else ():
                if other in item:
                    self._ledger.add(f"annotation field `{other}` is read as `{field}`", "", item.get("id"))  # fmt: skip
                    item = {**item, field: item[other]}
                    break
        return item

    def _annotation(
        self, item: dict, record: ImageRecord, category: int, where: Where
    ) -> Annotation | None:
        ledger = self._ledger
        segmentation, extent, stated = read_segmentation(
            item.get("segmentation"), record.width, record.height, ledger, where
        )
        self.stated_masks += stated
        box = parse_box(item.get("bbox"))
        if box is not None and (type(item["bbox"]) is not list or len(item["bbox"]) != 4):
            ledger.add("box written in another form than COCO's (read)", *where)
        self.judge.add(box, extent, record.width, record.height)
        over = extent is not None and reaches_over(extent, record.width, record.height)
        where_found = (*where, item.get("bbox"))
        placed, cut = place_box(box, extent, record.width, record.height, ledger, where_found)
        if placed is None:
            self.stated_masks -= stated
            return None
        crowd = flag(item.get("iscrowd"))
        if crowd is None:
            ledger.add("iscrowd is neither 0 nor 1 (read as 0)", *where, item["iscrowd"])
        elif isinstance(item.get("iscrowd"), str):
            ledger.add("iscrowd is text (read as the number it spells)", *where, item["iscrowd"])
        area = number(item.get("area"))
        if area is None and item.get("area") is not None:
            ledger.add("area is no number (computed)", *where, item["area"])
        # The stated area is that of the whole mask: of no use where a part of it was cut off.
        if area is None or area <= 0 or cut or over:
            area = segmentation_area(segmentation, record.height, record.width, cut or over)
        return Annotation(
            id=where[1],
            category_id=category,
            bbox=placed,
            segmentation=segmentation,
            iscrowd=bool(crowd),
            area=area or placed[2] * placed[3],
            clicks=read_clicks(item, record.width, record.height, ledger, where),
        )

    def _is_new(self, annotation: Annotation, row: int, where: Where) -> bool:
        """False for a copy that came in with a second entry of the same file; other copies are said."""
        key = key_of(annotation.id)
        if key is not None:
            if key in self._ids:
                self._ledger.add("annotation id used more than once (kept)", *where)
            self._ids.add(key)
        elif annotation.id is not None:
            self._ledger.add("annotation id names nothing (kept)", *where)
        if annotation.iscrowd:
            return True
        same = (row, annotation.category_id, annotation.bbox)
        self._seen[same] += 1
        if self._seen[same] == 1:
            return True
        if row in self._listing.merged:
            self._ledger.add(f"{LEFT_OUT}: its picture is listed twice, and so is it", *where)
            return False
        self._ledger.add("annotation repeats another one's category and box (kept)", *where)
        return True
