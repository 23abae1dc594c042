"""Mask pictures beside pictures: masks/a.png for images/a.jpg; each value (or colour) is a category.

Parts of a category that do not touch are instances of their own. Names come from classes.txt or
labels.txt, line k for value k; without one, a set with a single value is called by its folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec
from scipy import ndimage

from sam3jax.data.importers.picture import Instance, Picture, picture_files, split_of
from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.pictures import displayed_size

_FOLDERS = ("masks", "mask", "annotations", "labels")
_SPECK = 4  # pixels of the smallest part that counts
_MOST = 1000  # values in one mask beyond which it is no mask


def read(root: Path, ledger: Ledger) -> Iterator[Picture]:
    """Every picture that has a mask. Raises DataError."""
    files = picture_files(root)
    is_mask = lambda p: any(part.lower() in _FOLDERS for part in p.relative_to(root).parts[:-1])
    masks = {_key(p, root): p for p in files if is_mask(p)}
    names = _names(root)
    for file in files:
        if is_mask(file):
            continue
        mask = masks.get(_key(file, root))
        if mask is None:
            ledger.add("picture left out: no mask of its name", file.name)
            continue
        width, height = displayed_size(file)
        values = _values(mask)
        if values.shape != (height, width):
            raise DataError(
                f"mask {mask} is {values.shape[1]} x {values.shape[0]} pixels, its picture {width} x {height}"
            )
        picture = Picture(file, width, height, split_of(file, root))
        found = np.unique(values)
        if len(found) > _MOST:
            raise DataError(f"mask {mask} has {len(found)} values: is it a photograph?")
        for value in found[found > 0].tolist():
            label = names.get(value, "object" if value in (1, 255) else f"value {value}")
            picture.instances += _instances(label, values == value, ledger, mask.name)
        yield picture


def _key(file: Path, root: Path) -> tuple[str, ...]:
    """What a picture and its mask have in common: the path without images/, masks/ and ending."""
    drop = {*_FOLDERS, "images", "image", "imgs"}
    parts = [p for p in file.relative_to(root).parts[:-1] if p.lower() not in drop]
    return (*parts, file.stem.removesuffix("_mask").removesuffix("-mask"))


def _names(root: Path) -> dict[int, str]:
    for file in (root / "classes.txt", root / "labels.txt"):
        if file.is_file():
            lines = file.read_text("utf-8", "replace").splitlines()
            return {k: line.strip() for k, line in enumerate(lines) if line.strip()}
    return {}


def _values(file: Path) -> np.ndarray:
    """The values of a mask [Y, X] int; colours become one number each, black is 0."""
    try:
        with Image.open(file) as image:
            values = np.asarray(image.convert("RGB") if image.getbands()[1:] else image, np.int64)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"mask {file} cannot be read ({error}): export it again") from error
    if values.ndim < 3:
        return values
    red, green, blue = np.moveaxis(values[..., :3], -1, 0)
    grey = (red == green).all() and (green == blue).all()
    return red if grey else (red << 16) + (green << 8) + blue


def _instances(label: str, where: np.ndarray, ledger: Ledger, name: str) -> list[Instance]:
    parts = np.zeros(where.shape, np.int32)
    ndimage.label(where, np.ones((3, 3)), output=parts)
    found = []
    for k, frame in enumerate(ndimage.find_objects(parts), 1):
        part = np.zeros(where.shape, np.uint8, order="F")
        part[frame] = parts[frame] == k
        area = int(part[frame].sum())
        if area < _SPECK:
            ledger.add(f"part left out: fewer than {_SPECK} pixels", name)
            continue
        rle = rle_codec.encode(part)
        box = tuple(rle_codec.toBbox(rle).tolist())
        text = {"size": list(where.shape), "counts": rle["counts"].decode("ascii")}
        found.append(Instance(label, box, rle=text, area=float(area)))
    return found
