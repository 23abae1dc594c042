"""YOLO: one text file a picture, `class cx cy w h` or `class x y x y ...`, shares of the picture.

data.yaml names the classes and the folders of the splits; without one, classes.txt does, and splits
are folders or lists. labels/ lies beside images/, with the same tree below.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from sam3jax.data.importers.picture import (
    SPLITS,
    Instance,
    Picture,
    class_names,
    files_below,
    named_split,
    picture_files,
    picture_of,
    read_text,
    split_of,
)
from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.numbers import number

_DESCRIPTIONS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_CLASSES = ("classes.txt", "labels/classes.txt", "obj.names", "labels.txt")
_ELSEWHERE = "data.yaml names a place that is not there (left out)"


def read(root: Path, ledger: Ledger) -> Iterator[Picture]:
    """Every picture with its boxes or polygons. Raises DataError."""
    described = _description(root, ledger)
    names = _names(root, described, ledger)
    keypoints = "kpt_shape" in described
    known = {f.stem for f in picture_files(root)}
    for file, split in _pictures(root, described, ledger).items():
        known.add(file.stem)
        picture = picture_of(file, split)
        labels = _labels(file)
        if labels is None:
            ledger.add("picture without a label file (kept, empty)", file.name)
        else:
            for place, line in enumerate(read_text(labels, ledger).split("\n"), 1):
                if line := line.strip():
                    found = _instance(line, names, picture, keypoints)
                    if isinstance(found, str):
                        ledger.add(f"line left out: {found}", labels.name, place, line)
                    else:
                        picture.instances.append(found)
        yield picture
    for file in files_below(root, ".txt"):
        if (
            "labels" in file.relative_to(root).parts
            and file.stem not in known
            and file.name not in _CLASSES
        ):
            ledger.add("label file left out: no picture of its name", file.name)


def _description(root: Path, ledger: Ledger) -> dict[str, Any]:
    """data.yaml, or the only other YAML file that has `names`; every value is text or holds text."""
    files = [root / name for name in _DESCRIPTIONS if (root / name).is_file()][:1]
    files = files or [f for f in sorted(root.glob("*.y*ml")) if not f.name.startswith(".")]
    found = []
    for file in files:
        try:
            # Texts as they stand: the class `no` is no truth value.
            raw = yaml.load(read_text(file, ledger), yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError) as error:
            raise DataError(
                f"{file} is not readable YAML: {' '.join(str(error).split())}"
            ) from error
        if isinstance(raw, dict) and "names" in raw:
            found.append((file.name, raw))
    if len(found) > 1:
        raise DataError(
            f"{root} holds {' and '.join(name for name, _ in found)}: which? Keep one of them there"
        )
    return found[0][1] if found else {}


def _names(root: Path, described: dict[str, Any], ledger: Ledger) -> dict[int, str]:
    names = described.get("names")
    if isinstance(names, list):
        return {k: str(name).strip() for k, name in enumerate(names)}
    if isinstance(names, dict):
        numbers = {_class(k): str(name).strip() for k, name in names.items()}
        if None in numbers or len(numbers) < len(names):
            raise DataError(
                f"{root}: `names` of data.yaml has keys that are no numbers, or one twice: expected 0: name, 1: name, ..."
            )
        return {k: name for k, name in numbers.items() if k is not None}
    if found := class_names(root, _CLASSES, ledger):
        return found
    raise DataError(f"{root} names no classes: expected `names` in data.yaml, or classes.txt")


def _class(value: Any) -> int | None:
    """The number of a class, from a number or its digits."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and found.is_integer() else None


def _pictures(root: Path, described: dict[str, Any], ledger: Ledger) -> dict[Path, str]:
    """File -> split, by data.yaml or lists where their places exist, else by the folders' names."""
    lists = [f for f in sorted(root.glob("*.txt")) if named_split(f.stem)]
    entries = [(SPLITS[key], described.get(key)) for key in SPLITS if described.get(key)]
    entries = entries or [(named_split(f.stem) or "", f.name) for f in lists]
    base = str(described.get("path") or "").replace("\\", "/")
    found: dict[Path, str] = {}
    for split, value in entries:
        for entry in value if isinstance(value, list) else [value]:
            entry = str(PurePosixPath(base, str(entry).replace("\\", "/")))
            place = _place(root, entry, bool(base) or ":" in entry or entry.startswith(("/", "..")))
            if place is None:
                ledger.add(_ELSEWHERE, entry, found=split)
            for file in () if place is None else _listed(place, root, ledger):
                if found.setdefault(file, split) != split:
                    ledger.add(f"picture is in {found[file]} and in {split} (kept in the first)", file.name)  # fmt: skip
    everything = picture_files(root)
    if not found:
        return {f: split_of(f, root) for f in everything}
    for file in everything:
        if file not in found:
            ledger.add("picture in the folder but in no split (not used)", file.name)
    return found


def _place(root: Path, entry: str, foreign: bool) -> Path | None:
    """The folder or file that an entry of data.yaml or of a list means.

    foreign: it may come from another machine, or from a folder deeper (Roboflow's ../train/images): folders
    at its front are dropped as long as they name no split. Only then a place outside is looked for.
    """
    stated = Path(os.path.normpath(root / entry))
    if stated.exists() and stated.is_relative_to(root):
        return stated
    parts = [p for p in PurePosixPath(entry).parts if p not in ("/", "..")] if foreign else []
    for start, part in enumerate(parts):
        if (inside := root.joinpath(*parts[start:])).exists():
            return inside
        if named_split(part):
            break
    return stated if stated.exists() else None


def _listed(place: Path, root: Path, ledger: Ledger) -> list[Path]:
    """The pictures of a folder, or those that a list names one a line."""
    if place.is_dir():
        return picture_files(place)
    found = []
    for line in filter(None, map(str.strip, read_text(place, ledger).split("\n"))):
        entry = line.replace("\\", "/")
        file = _place(root, entry, True) or _place(place.parent, entry, True)
        if file is None or not file.is_file():
            ledger.add("picture of a list left out: its file is missing", line)
        else:
            found.append(file)
    return found


def _labels(picture: Path) -> Path | None:
    parts = list(picture.parts)
    places = [picture.with_suffix(".txt")]
    for k in range(len(parts) - 2, -1, -1):
        if parts[k] == "images":
            moved = Path(*parts[:k], "labels", *parts[k + 1 :])
            places.insert(0, moved.with_suffix(".txt"))
            break
    return next((place for place in places if place.is_file()), None)


def _instance(
    line: str, names: dict[int, str], picture: Picture, keypoints: bool
) -> Instance | str:
    """The object of a line, or why it is none."""
    first, *rest = line.split()
    own = _class(first)
    label = names.get(-1 if own is None else own) or (first if first in names.values() else None)
    if not label:
        return "its class has no name" if own is not None else "not a class and its shares"
    values = [number(v) for v in rest]
    shares = [v for v in (values[:4] if keypoints else values) if v is not None and -1 <= v <= 2]
    if len(shares) < (4 if keypoints else max(4, len(values))):
        return "not a class and its shares"
    width, height = picture.width, picture.height
    if len(shares) in (4, 5):  # 5: with a score
        x, y, w, h = shares[:4]
        if w <= 0 or h <= 0:
            return "its box has no area"
        return Instance(label, ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height))
    if len(shares) % 2 == 0:
        return Instance(label, polygons=[[v * (height if k % 2 else width) for k, v in enumerate(shares)]])  # fmt: skip
    return "an odd number of shares: a polygon with a score?"
