"""Mask pictures beside pictures: masks/a.png for images/a.jpg, or a_mask.png for a.jpg.

Each value (or colour) is a category; parts of a category that do not touch are instances of their own,
unless SegmentationObject/ (Pascal VOC) numbers them. Names come from classes.txt or labels.txt (line k
for value k), Roboflow's _classes.csv or CVAT's labelmap.txt (colours); without them, the only value of a
set is called object. 255 beside other values means that nobody knows what is there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec
from scipy import ndimage

from sam3jax.data.importers.picture import (
    Instance,
    Picture,
    class_names,
    files_below,
    picture_files,
    picture_of,
    read_text,
    split_of,
)
from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.pictures import BROKEN, stored_values

_FOLDERS = frozenset(("masks", "mask", "annotations", "labels", "segmentationclass"))
_OBJECTS = "segmentationobject"
_PICTURES = frozenset(("images", "image", "imgs", "jpegimages"))
_ENDINGS = ("_mask", "-mask")
_COLOUR = 1 << 24  # added to a colour, so that it is no value
_GREY = 0x010101  # between one grey and the next, as colours
_VOID = (255, _COLOUR + 0xE0E0C0)  # Pascal VOC's border, as a value and as a colour
_SPECK = 4  # pixels of the smallest part that counts
_MOST = 100  # values without a name beyond which they are no categories
_EDGE = 3  # pixels of a soft edge


def read(root: Path, ledger: Ledger) -> Iterator[Picture]:
    """Every picture that has a mask. Raises DataError."""
    files = picture_files(root)
    masks: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    objects = {_key(p, root): p for p in files if _OBJECTS in _folders(p, root)}
    for file in files:
        if _is_mask(file, root):
            masks[_key(file, root)].append(file)
    names = _names(root, ledger)
    pictures, values = [], set[int]()
    for file in files:
        if _is_mask(file, root) or _OBJECTS in _folders(file, root):
            continue
        found = masks.pop(_key(file, root), [])
        if len(found) != 1:
            ledger.add(f"picture left out: {'several masks' if found else 'no mask'} of its name", file.name)  # fmt: skip
            continue
        index = _values(found[0], max(names, default=0) > _COLOUR, bool(names), ledger)
        try:
            picture = picture_of(file, split_of(file, root), *index.shape[::-1])
        except DataError as error:
            raise DataError(f"mask {found[0]} does not fit: {error}") from error
        numbered = objects.get(_key(file, root))
        parts = _parts(index) if numbered is None else _numbered(index, numbered)
        for value, part in parts:
            values.add(value)
            if (instance := _instance(value, part)) is None:
                ledger.add(f"part left out: fewer than {_SPECK} pixels", found[0].name)
            else:
                picture.instances.append(instance)
        pictures.append(picture)
    for file in (f for found in masks.values() for f in found):
        ledger.add("mask left out: no picture of its name", file.name)
    labels = _labels(values, names, root)
    for picture in pictures:
        kept = [i for i in picture.instances if labels[int(i.label)]]
        if void := len(picture.instances) - len(kept):
            ledger.add("parts of value 255 beside other values mean unknown (not used)", picture.file.name, found=void)  # fmt: skip
        picture.instances = kept
        for instance in kept:
            instance.label = labels[int(instance.label)]
        yield picture


def _folders(file: Path, root: Path) -> list[str]:
    return [part.lower() for part in file.relative_to(root).parts[:-1]]


def _is_mask(file: Path, root: Path) -> bool:
    return bool(_FOLDERS & set(_folders(file, root))) or file.stem.lower().endswith(_ENDINGS)


def _key(file: Path, root: Path) -> tuple[str, ...]:
    """What a picture and its mask have in common: the path without images/, masks/ and ending."""
    drop = {*_FOLDERS, *_PICTURES, _OBJECTS}
    parts = [p for p in file.relative_to(root).parts[:-1] if p.lower() not in drop]
    stem = file.stem[: -len(_ENDINGS[0])] if file.stem.lower().endswith(_ENDINGS) else file.stem
    return (*parts, stem)


def _names(root: Path, ledger: Ledger) -> dict[int, str]:
    """Value or colour -> name."""
    if found := class_names(root, ("classes.txt", "labels.txt"), ledger):
        return found
    for file in files_below(root, ".csv"):
        if file.name == "_classes.csv":  # Pixel Value, Class
            rows = [line.split(",", 1) for line in read_text(file, ledger).splitlines()]
            return {int(r[0]): r[1].strip() for r in rows if len(r) == 2 and r[0].strip().isdigit()}
    if (file := root / "labelmap.txt").is_file():  # label:r,g,b:parts:actions
        found = {}
        for line in read_text(file, ledger).splitlines():
            name, *rest = line.split(":")
            colour = rest[0].split(",") if rest else []
            if not line.startswith("#") and len(colour) == 3 and all(v.strip().isdigit() for v in colour):  # fmt: skip
                red, green, blue = map(int, colour)
                found[_COLOUR + (red << 16) + (green << 8) + blue] = name.strip()
        return found
    return {}


def _labels(found: set[int], names: dict[int, str], root: Path) -> dict[int, str]:
    """Value or colour -> label, empty for what is unknown. Raises DataError for too many without a name."""
    # Grey values saved in colour are values, where no file of the set has colours.
    grey = not any(v >= _COLOUR and (v - _COLOUR) % _GREY for v in (*found, *names))
    plain = {v: (v - _COLOUR) // _GREY if v >= _COLOUR and grey else v for v in found}
    values = set(plain.values())
    void = {v for v in _VOID if v not in names and len(values) > 1}
    unnamed = values - names.keys() - void
    if len(unnamed) > _MOST:
        raise DataError(
            f"masks of {root} hold {len(unnamed)} values without names: are they photographs, or is each value "
            f"an object and not a category? Put classes.txt, one name a line, into the folder"
        )
    alone = len(values - void) == 1 and not names

    def label(value: int) -> str:
        if value in void or alone:
            return "" if value in void else "object"
        other = f"value {value}" if value < _COLOUR else f"colour #{value - _COLOUR:06x}"
        return names.get(value) or other

    return {v: label(value) for v, value in plain.items()}


def _values(file: Path, coloured: bool, named: bool, ledger: Ledger) -> np.ndarray:
    """The values of a mask [Y, X] int, or its colours; 0 for the background.

    coloured: the names are those of colours, so that palettes are colours too.
    """
    try:
        with Image.open(file) as image:
            lossy = image.format == "JPEG"
            convert = image.getbands()[1:] or (coloured and image.mode == "P")
            values = stored_values(image.convert("RGB") if convert else image).astype(np.int64)
    except BROKEN as error:
        raise DataError(f"mask {file} cannot be read ({error}): export it again") from error
    plane = values if values.ndim == 2 else values[..., 0]
    if values.ndim == 3:
        grey = not np.ptp(values, axis=-1).any()
        values = (values << (16, 8, 0)).sum(-1)
        values[values > 0] += _COLOUR
    else:
        grey = True
    if grey and not named and _is_soft(plane, lossy):
        ledger.add("mask has soft edges (read as 0 and 255)", file.name)
        return np.where(plane > 127, 255, 0)
    if lossy:
        raise DataError(f"mask {file} is a JPEG, whose values are not exact: export masks as PNG")
    return values


def _is_soft(plane: np.ndarray, lossy: bool) -> bool:
    """Whether values between black and white are but edges of the white."""
    between = (plane >= 16) & (plane < 240)
    if plane.max(initial=0) > 255 or not (plane >= 240).any():
        return False
    if lossy:
        return between.mean() < 0.1
    if len(np.unique(plane[between])) < 2:
        return False
    near = ndimage.binary_dilation(plane >= 240, np.ones((3, 3)), iterations=_EDGE)
    return not (between & np.logical_not(near)).any()


def _parts(index: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Value and pixels [Y, X] of each part of each category."""
    for value in np.unique(index[index > 0]).tolist():
        parts = np.zeros(index.shape, np.int32)
        ndimage.label(index == value, np.ones((3, 3)), output=parts)
        for k, frame in enumerate(ndimage.find_objects(parts), 1):
            part = np.zeros(index.shape, np.uint8, order="F")
            part[frame] = parts[frame] == k
            yield value, part


def _numbered(index: np.ndarray, file: Path) -> Iterator[tuple[int, np.ndarray]]:
    """The same for objects that a mask of their own numbers; an object has the category that it covers."""
    numbers = _values(file, False, True, Ledger())
    if numbers.shape != index.shape:
        raise DataError(
            f"mask {file} has another size than that of the categories: export both again"
        )
    for number in np.unique(numbers[numbers > 0]).tolist():
        inside = numbers == number
        value, _ = Counter(index[inside].tolist()).most_common(1)[0]
        if value and number not in _VOID:
            yield value, np.asfortranarray(inside, np.uint8)


def _instance(value: int, part: np.ndarray) -> Instance | None:
    """The object of the pixels; its label is the value, until the names of all are known."""
    area = int(part.sum())
    if area < _SPECK:
        return None
    rle = rle_codec.encode(part)
    box = tuple(rle_codec.toBbox(rle).tolist())
    text = {"size": list(part.shape), "counts": rle["counts"].decode("ascii")}
    return Instance(str(value), box, rle=text, area=float(area))
