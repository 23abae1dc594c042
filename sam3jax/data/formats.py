"""Which other format a folder is in, so that an error can name the command that converts it."""

from __future__ import annotations

import itertools
from pathlib import Path

from sam3jax.data.json_file import looks_like_coco

_MASKS = ("_mask.png", "-mask.png")
_ARCHIVES = (".zip", ".gz", ".tar", ".tgz", ".7z", ".rar")
OTHER_TASKS = ("captions", "person_keypoints", "stuff", "panoptic", "image_info", "deprecated")
_LOOKED_AT = 2000  # files below a folder


def recognise(root: Path) -> str | None:
    """yolo, voc, labelme, cvat, masks, huggingface or video; None for what is none of them."""
    folders = {p.name.lower() for p in root.iterdir() if p.is_dir()}
    files = [p for p in itertools.islice(root.rglob("*"), _LOOKED_AT) if p.is_file()]
    names = {p.name.lower() for p in files}
    suffixes = {p.suffix.lower() for p in files}
    if {"jpegimages", "imagesets"} <= folders and ".xml" not in suffixes and ".txt" in suffixes:
        return "video"  # DAVIS; YouTube-VOS has no ImageSets, but a meta.json
    if "meta.json" in names and "jpegimages" in folders:
        return "video"
    if {"dataset_dict.json", "state.json", "metadata.jsonl"} & names or ".parquet" in suffixes:
        return "huggingface"
    described = {"data.yaml", "data.yml", "dataset.yaml", "classes.txt"} & names
    if any(_is_yolo(p) for p in files if p.suffix.lower() == ".txt") and (
        described or "labels" in folders or "images" in folders
    ):
        return "yolo"
    if any(_starts(p, "<annotation>", "<annotation ") for p in files if p.suffix.lower() == ".xml"):
        return "voc"
    if any(_starts(p, "<annotations>") for p in files if p.suffix.lower() == ".xml"):
        return "cvat"
    if any(is_labelme(p) for p in files[:200] if p.suffix.lower() == ".json"):
        return "labelme"
    if {"masks", "mask", "segmentationclass"} & folders or any(n.endswith(_MASKS) for n in names):
        return "masks"
    return None


def hint(root: Path) -> str:
    """The end of an error message: what the folder looks like, and what to do. May be empty."""
    try:
        kind = recognise(root)
    except OSError:
        return ""
    if kind is None:
        return _deeper(root)
    if kind == "video":
        return (
            ". It looks like video (DAVIS, YouTube-VOS or YouTube-VIS): train on it with task=clips, or "
            "export its frames as a COCO data set"
        )
    return (
        f". It looks like {kind}: python -m sam3jax.doctor {root} --import {kind} --out COCO_DIR "
        f"converts it"
    )


def _deeper(root: Path) -> str:
    """Where there is a COCO file further down, or an archive; or nothing."""
    for file in itertools.islice(root.rglob("*"), _LOOKED_AT):
        if file.suffix.lower() in _ARCHIVES:
            return f". {file} is an archive: unpack it"
        if file.suffix.lower() != ".json" or file.name.startswith(".") or not looks_like_coco(file):
            continue
        if file.stem.startswith(OTHER_TASKS):
            return (
                f". {file} is left aside: its name says that it is for another task than instances"
            )
        return f". There is {file}: give that file, or the folder above its splits"
    return ""


def _starts(file: Path, *tags: str) -> bool:
    with file.open("rb") as stream:
        head = stream.read(400).decode("utf-8", "replace").lower()
    return any(tag in head for tag in tags)


def is_labelme(file: Path) -> bool:
    """Whether a JSON file is labelme's; found by the names of its fields, nothing is parsed."""
    try:
        data = file.read_bytes()
    except OSError:
        return False  # not ours to read: said when it is read as COCO
    return b'"shapes"' in data and b'"imagePath"' in data and b'"images"' not in data


def _is_yolo(file: Path) -> bool:
    """Whether the first line is a class and at least four shares of the picture."""
    with file.open("rb") as stream:
        words = stream.readline(4000).split()
    try:
        return (
            len(words) >= 5 and words[0].isdigit() and all(-1 <= float(w) <= 2 for w in words[1:])
        )
    except ValueError:
        return False
