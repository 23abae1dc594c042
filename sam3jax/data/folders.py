"""Which files make up a data set: Roboflow and classic COCO layouts, or one JSON file.

Roboflow   root/train/_annotations.coco.json beside the pictures, root/valid, root/test
classic    root/annotations/instances_train2017.json, pictures in root/train2017,
           root/images/train2017, root/images, ...
flat       root/<one>.json beside the pictures or above them; or the path of the JSON itself
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from sam3jax.data.coco import Dataset, load_json, parse_coco
from sam3jax.data.pictures import DataError, check_pictures

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"))
_VALID = ("valid", "val", "validation")
_ALIASES = {"valid": _VALID, "val": _VALID, "train": ("train", "training")}
_SPLIT_WORDS = {"test", *_VALID, *_ALIASES["train"]}
_OTHER_TASKS = ("captions", "person_keypoints", "stuff", "panoptic", "image_info", "deprecated")
ONLY = "all"  # the split of a folder that has no splits


def find_splits(path: str | Path) -> dict[str, Path]:
    """Split name -> annotation file. A folder (or JSON) without splits has one, named `all`.

    Raises DataError where the folder does not exist or holds no annotation file.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"no data set at {root}: check the path (data.train, data.valid)")
    if root.is_file():
        return {ONLY: root}
    splits: dict[str, Path] = {}
    folders = [p for p in root.iterdir() if p.is_dir() and p.name != "annotations"]
    for folder in sorted(folders, key=lambda p: (not p.name.startswith("train"), p.name)):
        if file := _annotation_file(folder):
            splits[folder.name] = file
    for folder in (root / "annotations", root):
        if folder.is_dir() and not splits:
            splits = _named_files(folder)
    if not splits:
        raise DataError(
            f"no COCO annotations in {root}: expected train/_annotations.coco.json (Roboflow), "
            f"annotations/instances_train*.json (classic COCO), or one .json beside the pictures"
        )
    return splits


def has_split(path: str | Path, split: str) -> bool:
    """Whether `split` can be read from `path` as a split of its own."""
    return _match(find_splits(path), split) is not None


def read_dataset(path: str | Path, split: str = "train", *, check: bool = True) -> Dataset:
    """One split of a data set, every picture found and (check) its header read.

    A path without splits gives what it has, whatever `split` says. Raises DataError.
    """
    splits = find_splits(path)
    name = ONLY if list(splits) == [ONLY] else _match(splits, split)
    if name is None:
        raise DataError(
            f"{path} has no split {split!r}, it has {', '.join(splits)}: set data.train_split or "
            f"data.valid_split"
        )
    file = splits[name]
    root = file.parent if Path(path).is_file() else Path(path).expanduser()
    folders = _picture_folders(root, file, name)
    dataset = parse_coco(load_json(file), f"{path}:{name}", str(file), _finder(folders))
    if check:
        check_pictures((i.file, i.width, i.height) for i in dataset.images)
    return _count_unlisted(dataset, file.parent)


def _annotation_file(folder: Path) -> Path | None:
    """The one annotation file of a folder, if it has exactly one."""
    roboflow = folder / "_annotations.coco.json"
    if roboflow.is_file():
        return roboflow
    files = sorted(folder.glob("*.json"))
    return files[0] if len(files) == 1 else None


def _named_files(folder: Path) -> dict[str, Path]:
    """Split -> JSON, from names such as instances_train2017.json, train.json, data_val.json."""
    files = [f for f in sorted(folder.glob("*.json")) if not f.stem.startswith(_OTHER_TASKS)]
    instances = [f for f in files if f.stem.startswith("instances_")]
    files = instances or files
    if len(files) == 1 and not _SPLIT_WORDS & set(_words(files[0].stem)):
        return {ONLY: files[0]}
    return {f.stem.removeprefix("instances_"): f for f in files}


def _match(splits: dict[str, Path], split: str) -> str | None:
    """The split's name among those found: itself, an alias, or one that holds it as a word."""
    wanted = _ALIASES.get(split, (split,))
    for name in wanted:
        if name in splits:
            return name
    for name in wanted:  # train2017, my_train, train-v2
        close = [s for s in splits if name in _words(s)]
        if len(close) == 1:
            return close[0]
        if len(close) > 1:
            raise DataError(
                f"split {split!r} could be {' or '.join(close)}: set data.train_split or "
                f"data.valid_split to one of them"
            )
    return None


def _words(name: str) -> list[str]:
    letters = "".join(c if c.isalpha() else " " for c in name.lower())
    return letters.split()


def _picture_folders(root: Path, file: Path, split: str) -> list[Path]:
    """Where the pictures of an annotation file may lie, most likely first."""
    tops = [root, file.parent]
    if file.parent.name == "annotations":
        tops.append(file.parent.parent)
    names = [split, file.stem.removeprefix("instances_"), *_words(split)]
    if split in _ALIASES:
        names += _ALIASES[split]
    folders = [file.parent, file.parent / "images", file.parent / "data"]
    for top in tops:
        for name in names:
            folders += [top / name, top / "images" / name, top / name / "images"]
        folders += [top / "images", top / "data", top]
    return [f for f in dict.fromkeys(folders) if f.is_dir()]


def _finder(folders: list[Path]) -> Callable[[str], Path | None]:
    """file_name -> its file. Directories are listed once: a stat per picture is slow on a network."""
    listings: dict[Path, frozenset[str]] = {}

    def listed(folder: Path) -> frozenset[str]:
        if folder not in listings:
            listings[folder] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
        return listings[folder]

    def locate(file_name: str) -> Path | None:
        path = PurePosixPath(file_name.replace("\\", "/"))
        for relative in dict.fromkeys((path, PurePosixPath(path.name))):  # other people's folders
            for folder in folders:
                if relative.name in listed(folder / relative.parent):
                    return folder / relative
        return None

    return locate


def _count_unlisted(dataset: Dataset, folder: Path) -> Dataset:
    """Note pictures that lie beside the annotation file and are not in it."""
    listed = {image.file.name for image in dataset.images if image.file.parent == folder}
    extra = sum(Path(f).suffix.lower() in PICTURES for f in set(os.listdir(folder)) - listed)
    if not listed or not extra:
        return dataset
    problems = {**dataset.problems, "picture in the folder but not in the JSON (not used)": extra}
    return replace(dataset, problems=problems)
