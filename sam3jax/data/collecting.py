"""Append masks to a COCO folder that a training reads, so that the next fine-tuning has them.

What the folder holds stays: a picture gets a name of its own, and the annotation file keeps every
entry. Before this module changes a file that somebody else wrote, it puts a copy beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_codec

from sam3jax.data.folders import find_splits, match_split
from sam3jax.data.ledger import DataError
from sam3jax.data.names import phrase_key
from sam3jax.files import make_folder, write_text

JSON = "_annotations.coco.json"
SPLIT = "train"
_LOCK = ".clicks.lock"
_COPY = ".before_clicks"  # behind the name of the annotation file
_PICTURE = "clicked-"  # before the name of every picture
_WRITER = "sam3jax app"


def add_to_set(
    folder: str | Path, picture: Path, size: tuple[int, int], phrase: str, masks: Iterable[np.ndarray]
) -> tuple[Path, int]:  # fmt: skip
    """Append masks [Y, X] bool of a picture to the training split; the file changed, and how many are new.

    size: width, height as displayed. A folder that is not there is made. The picture's file is copied as
    it is, its name follows from its content; a mask that is there already is not added again.
    Raises DataError for an empty phrase, empty masks, and a folder that holds something else.
    """
    if not phrase.strip():
        raise DataError("the masks have no name: say what they show, for example 'red circle'")
    found = [np.asarray(mask, bool) for mask in masks]
    if not found or not all(mask.any() for mask in found):
        raise DataError("there is no mask to save: click on an object first")
    place = Path(folder).expanduser()
    with _locked(place.parent if place.is_file() else make_folder(place)):
        file = _annotation_file(place)
        content = _read(file)
        image = _image_entry(content, file.parent, picture, size)
        category = _category(content, phrase)
        new = [entry for mask in found if (entry := _annotation(content, image, category, mask))]
        if new:
            _keep_copy(file, content)
            write_text(file, json.dumps(content))
    return file, len(new)


def _annotation_file(folder: Path) -> Path:
    """The JSON of the training split, or where it will be in a folder without one."""
    if folder.is_file():
        return folder
    held = [p for p in folder.iterdir() if not p.name.startswith(".")]
    own = (".", _PICTURE)
    if not held or ([p.name for p in held] == [SPLIT] and all(p.name.startswith(own) for p in held[0].iterdir())):  # fmt: skip
        return make_folder(folder / SPLIT) / JSON  # new, or never finished
    splits = find_splits(folder)
    name = next(iter(splits)) if len(splits) == 1 else match_split(splits, SPLIT)
    if name is None:
        raise DataError(f"{folder} has no split {SPLIT!r}, it has {', '.join(splits)}: give the JSON itself")  # fmt: skip
    return splits[name]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time; on a file system without locks, none is taken."""
    with open(folder / _LOCK, "a") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {"info": {"description": _WRITER}, "categories": [], "images": [], "annotations": []}
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{file} cannot be read ({error}): masks are added to COCO JSON") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(f"{file} is no COCO file: expected images, annotations and categories")
    return content


def _image_entry(
    content: dict[str, Any], folder: Path, picture: Path, size: tuple[int, int]
) -> dict[str, Any]:
    """The entry of a picture, new or from an earlier call; its file is put beside the JSON."""
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()[:16]
    name = f"{_PICTURE}{digest}{picture.suffix.lower()}"
    for entry in content["images"]:
        if entry.get("file_name") == name:
            return entry
    place = folder / name
    if not place.exists():
        part = place.with_name(f".{name}.{os.getpid()}.part")
        shutil.copyfile(picture, part)
        part.rename(place)
    entry = {"id": _next_id(content["images"]), "file_name": name, "width": size[0], "height": size[1]}  # fmt: skip
    content["images"].append(entry)
    return entry


def _category(content: dict[str, Any], phrase: str) -> Any:
    """The id of the category of that name, however it is written; a new one where there is none."""
    for entry in content["categories"]:
        if phrase_key(str(entry.get("name", ""))) == phrase_key(phrase):
            return entry["id"]
    number = _next_id(content["categories"])
    content["categories"].append({"id": number, "name": phrase.strip()})
    return number


def _annotation(
    content: dict[str, Any], image: dict[str, Any], category: Any, mask: np.ndarray
) -> dict[str, Any] | None:
    """The entry of a mask, appended; None where it is there already."""
    if mask.shape != (image["height"], image["width"]):
        raise DataError(
            f"the mask is {mask.shape[1]} x {mask.shape[0]}, its picture {image['width']} x {image['height']}"
        )
    rle = rle_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    for entry in content["annotations"]:
        own = (entry.get("image_id"), entry.get("category_id"), entry.get("segmentation"))
        if own == (image["id"], category, segmentation):
            return None
    entry = {
        "id": _next_id(content["annotations"]), "image_id": image["id"], "category_id": category,
        "bbox": rle_codec.toBbox(rle).tolist(), "area": float(rle_codec.area(rle)), "iscrowd": 0,
        "segmentation": segmentation,
    }  # fmt: skip
    content["annotations"].append(entry)
    return entry


def _next_id(entries: list[dict[str, Any]]) -> int:
    """Above all whole numbers in use; ids of other kinds cannot meet it."""
    return 1 + max((e["id"] for e in entries if isinstance(e.get("id"), int)), default=0)


def _keep_copy(file: Path, content: dict[str, Any]) -> None:
    """A copy of a file that somebody else wrote, once, before it is changed."""
    info = content.get("info")
    ours = isinstance(info, dict) and info.get("description") == _WRITER
    copy = file.with_name(file.name + _COPY)
    if file.exists() and not ours and not copy.exists():
        part = copy.with_name(copy.name + ".part")
        shutil.copyfile(file, part)
        part.rename(copy)
