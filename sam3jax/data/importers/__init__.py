"""Other formats -> a COCO folder in Roboflow's layout: OUT/train/_annotations.coco.json, ...

Each reader yields `Picture`s; the writer here is the same for all of them. Nothing is left out without
a line that says so.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sam3jax.data.finder import outside
from sam3jax.data.importers import cvat, huggingface, labelme, masks, voc, yolo
from sam3jax.data.importers.picture import Instance, Picture, is_inside
from sam3jax.data.judgements import nearly_all
from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.segmentations import segmentation_area

Reader = Callable[[Path, Ledger], Iterable[Picture]]

READERS: dict[str, Reader] = {
    "yolo": yolo.read,
    "voc": voc.read,
    "labelme": labelme.read,
    "cvat": cvat.read,
    "masks": masks.read,
    "huggingface": huggingface.read,
}
FORMATS = tuple(READERS)
_ANNOTATION_LEFT_OUT = ("line left out", "object left out", "shape left out")


def import_dataset(
    kind: str, root: Path, out: Path, *, allow_outside: bool = False
) -> Iterator[str]:
    """Convert `root`, of a format of FORMATS, into the new folder `out`; yields lines that say what was
    done. allow_outside: pictures may lie outside the folder. Raises DataError."""
    root = Path(os.path.normpath(root))
    if not root.is_dir():
        raise DataError(f"no folder {root}: give the folder of the {kind} data")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already: give --out a new folder")
    if is_inside(out, root):
        raise DataError(
            f"{out} lies inside {root}, whose pictures it would double: give --out another folder"
        )
    ledger = Ledger()
    splits: dict[str, list[Picture]] = {}
    known: dict[tuple[str, Path], Picture] = {}
    for picture in READERS[kind](root, ledger):
        if picture.content is None and not allow_outside and not is_inside(picture.file, root):
            raise outside(str(picture.file), root)
        first = known.setdefault((picture.split, picture.file), picture)
        if first is picture or picture.content is not None:
            splits.setdefault(picture.split, []).append(picture)
        else:  # each would teach that the other's objects are not there
            first.instances += picture.instances
            ledger.add("picture annotated more than once (made one)", picture.file.name)
    found = sum(len(p.instances) for pictures in splits.values() for p in pictures)
    reasons = {s: n for s, n in ledger.items() if s.startswith(_ANNOTATION_LEFT_OUT)}
    lost = reasons or {s: n for s, n in ledger.items() if "left out" in s}
    why = f": {_most(lost, ledger)}" if lost else ""
    if not found:
        raise DataError(
            f"{root}: no annotation found as {kind}{why}; is it another format ({', '.join(FORMATS)})?"
        )
    left = sum(reasons.values())
    if nearly_all(left, found + left):
        raise DataError(
            f"{root}: {left:,} of {found + left:,} annotations cannot be read as {kind}{why}; export them again"
        )
    names = sorted({i.label for found in splits.values() for p in found for i in p.instances})
    for split, pictures in splits.items():
        folder = out / split
        folder.mkdir(parents=True)
        coco = _coco(pictures, names, folder)
        (folder / "_annotations.coco.json").write_text(json.dumps(coco), encoding="utf-8")
        yield (
            f"{split}: {len(coco['images'])} pictures, {len(coco['annotations'])} annotations, "
            f"{len(names)} categories -> {folder}"
        )
    for sentence, count in ledger.items():
        examples = ledger.examples(sentence)
        yield f"{count:>7} x {sentence}{f' ({examples})' if examples else ''}"


def _most(reasons: dict[str, int], ledger: Ledger) -> str:
    """The sentence that is true most often, with entries."""
    sentence = max(reasons, key=lambda s: reasons[s])
    examples = ledger.examples(sentence, 2)
    return f"{sentence} (for example {examples})" if examples else sentence


def _coco(pictures: list[Picture], names: list[str], folder: Path) -> dict[str, Any]:
    numbers = {name: number for number, name in enumerate(names, 1)}
    images, annotations = [], []
    taken: set[str] = set()
    for picture in pictures:
        name = _free_name(picture.file, taken)
        if picture.content is not None:
            (folder / name).write_bytes(picture.content())
        else:
            _link(picture.file, folder / name)
        image = {"id": len(images) + 1, "file_name": name, "width": picture.width, "height": picture.height}  # fmt: skip
        images.append(image)
        for instance in picture.instances:
            annotations.append(_annotation(instance, len(annotations) + 1, image["id"], numbers))
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }


def _annotation(
    instance: Instance, id: int, image_id: int, numbers: dict[str, int]
) -> dict[str, Any]:
    left, top, width, height = instance.bounds()
    outlines = tuple(np.asarray(polygon, float) for polygon in instance.polygons)
    area = segmentation_area(outlines, 0, 0)
    return {
        "id": id,
        "image_id": image_id,
        "category_id": numbers[instance.label],
        "bbox": [left, top, width, height],
        "area": instance.area or area or width * height,
        "iscrowd": int(instance.crowd),
        "segmentation": instance.rle or [list(polygon) for polygon in instance.polygons],
    }


def _free_name(file: Path, taken: set[str]) -> str:
    name, parents = file.name, list(file.parts[:-1])
    while name.lower() in taken and parents:
        name = f"{parents.pop()}_{name}"
    number = 1
    while name.lower() in taken:
        number += 1
        name = f"{file.stem}_{number}{file.suffix}"
    taken.add(name.lower())
    return name


def _link(source: Path, target: Path) -> None:
    """The picture at a second place: no second copy of the bytes where the disk allows it."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
