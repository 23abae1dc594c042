"""YOLO: one text file a picture, `class cx cy w h` or `class x y x y ...`, shares of the picture.

data.yaml names the classes and the folders of the splits; without one, classes.txt does, and splits
are folders. labels/ lies beside images/, with the same tree below.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sam3jax.data.importers.picture import SPLITS, Instance, Picture, picture_files, split_of
from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.numbers import number
from sam3jax.data.pictures import displayed_size


def read(root: Path, ledger: Ledger) -> Iterator[Picture]:
    """Every picture with its boxes or polygons. Raises DataError."""
    described = _description(root)
    names = _names(root, described)
    keypoints = described.get("kpt_shape") is not None
    for file, split in _pictures(root, described):
        width, height = displayed_size(file)
        picture = Picture(file, width, height, split)
        labels = _labels(file)
        if labels is None:
            ledger.add("picture without a label file (kept, empty)", file.name)
        else:
            for place, line in enumerate(labels.read_text("utf-8", "replace").splitlines(), 1):
                if line.strip():
                    instance = _instance(line, names, width, height, keypoints)
                    if instance is None:
                        ledger.add("line left out: not a class and its shares", labels.name, place, line)  # fmt: skip
                    else:
                        picture.instances.append(instance)
        yield picture


def _description(root: Path) -> dict[str, Any]:
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (root / name).is_file():
            try:
                raw = yaml.safe_load((root / name).read_text("utf-8", "replace"))
            except yaml.YAMLError as error:
                raise DataError(f"{root / name} is not readable YAML: {error}") from error
            return raw if isinstance(raw, dict) else {}
    return {}


def _names(root: Path, described: dict[str, Any]) -> dict[int, str]:
    names = described.get("names")
    if isinstance(names, list):
        return {k: str(name) for k, name in enumerate(names)}
    if isinstance(names, dict):
        numbers = {_class(k): str(name) for k, name in names.items()}
        if None in numbers:
            raise DataError(
                f"{root}: `names` of data.yaml has keys that are no numbers: expected 0: name, 1: name, ..."
            )
        return {k: name for k, name in numbers.items() if k is not None}
    for file in (root / "classes.txt", root / "labels" / "classes.txt", root / "obj.names"):
        if file.is_file():
            lines = file.read_text("utf-8", "replace").splitlines()
            return {k: line.strip() for k, line in enumerate(lines) if line.strip()}
    raise DataError(f"{root} names no classes: expected `names` in data.yaml, or classes.txt")


def _class(value: Any) -> int | None:
    """The number of a class, from a number or its digits."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and found.is_integer() else None


def _pictures(root: Path, described: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """(file, split), by data.yaml where its folders exist, else by the folders' names."""
    base = root / str(described.get("path") or "")
    base = base if base.is_dir() else root
    found: dict[Path, str] = {}
    for key in SPLITS:
        entries = described.get(key) or ()
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, str):
                continue
            for place in (base / entry, root / entry, root / str(entry).replace("../", "")):
                if place.is_dir():
                    found |= {f: SPLITS[key] for f in picture_files(place) if f not in found}
                    break
                if place.is_file():  # a list of pictures
                    lines = place.read_text("utf-8", "replace").split("\n")
                    files = [place.parent / line.strip() for line in lines if line.strip()]
                    found |= {f: SPLITS[key] for f in files if f.is_file()}
                    break
    if not found:
        found = {f: split_of(f, root) for f in picture_files(root)}
    yield from found.items()


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
    line: str, names: dict[int, str], width: int, height: int, keypoints: bool
) -> Instance | None:
    try:
        values = [float(v) for v in line.split()]
        label = names.get(-1 if (own := _class(values[0])) is None else own)
    except (ValueError, IndexError):
        return None
    if label is None:
        return None
    shares = values[1:5] if keypoints else values[1:]
    if not all(-1 <= v <= 2 for v in shares):
        return None
    if len(shares) in (4, 5):  # 5: with a score
        x, y, w, h = shares[:4]
        if w <= 0 or h <= 0:
            return None
        return Instance(label, ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height))
    if len(shares) >= 6 and len(shares) % 2 == 0:
        return Instance(label, polygons=[[v * (height if k % 2 else width) for k, v in enumerate(shares)]])  # fmt: skip
    return None
