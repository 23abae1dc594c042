"""labelme: one JSON file a picture, with `shapes`; shapes of one label and group are one object."""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

from sam3jax.data.folders import PICTURES, is_picture
from sam3jax.data.importers.picture import (
    Instance,
    Picture,
    files_below,
    is_inside,
    picture_files,
    picture_of,
    split_of,
)
from sam3jax.data.json_file import load_json
from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.numbers import number
from sam3jax.data.pictures import size_of_bytes

_CORNERS = 64  # of the polygon that stands for a circle
_TURNED = "rotation"  # X-AnyLabeling's turned boxes: their four corners


def read(root: Path, ledger: Ledger) -> Iterator[Picture]:
    """Every annotated picture. Raises DataError."""
    used: set[Path] = set()
    for file in files_below(root, ".json"):
        raw = load_json(file)
        if not isinstance(raw, dict) or not isinstance(raw.get("shapes"), list):
            ledger.add("JSON file left out: no labelme `shapes`", file.name)
            continue
        picture = _picture(file, raw, root)
        if picture is None:
            ledger.add("annotation file left out: its picture is missing", file.name)
            continue
        used.add(picture.file)
        groups: dict[tuple, Instance] = {}
        for k, shape in enumerate(raw["shapes"]):
            instance = _instance(shape, picture.width, picture.height)
            if instance is None:
                kind = shape.get("shape_type") if isinstance(shape, dict) else shape
                ledger.add("shape left out: neither area nor box", file.name, k, kind)
                continue
            if shape.get("shape_type") == _TURNED:
                ledger.add("box is turned (its bounds are taken)", file.name, k)
            group = shape.get("group_id")
            group = None if group is None else str(group)
            known = groups.get((instance.label, group)) if group is not None else None
            if known is not None and known.polygons and instance.polygons:
                known.polygons = [*known.polygons, *instance.polygons]
                continue
            picture.instances.append(instance)
            if group is not None:
                groups[instance.label, group] = instance
        yield picture
    for path in picture_files(root):
        if path not in used:
            ledger.add("picture left out: no annotation file", path.name)


def _picture(file: Path, raw: dict[str, Any], root: Path) -> Picture | None:
    """The picture of an annotation file: inside the folder, else the one that the file itself holds."""
    name = str(raw.get("imagePath") or "").replace("\\", "/")
    places = [file.parent / name, file.parent / Path(name).name] if name else []
    places += [file.with_suffix(s) for s in sorted(PICTURES)]
    good = (Path(os.path.normpath(p)) for p in places if is_picture(p) and is_inside(p, root))
    split, size = split_of(file, root), (raw.get("imageWidth"), raw.get("imageHeight"))
    if path := next((p for p in good if p.is_file()), None):
        return picture_of(path, split, *size)
    if not (data := raw.get("imageData")) or not isinstance(data, str):
        return None
    content = lambda: _decoded(file)
    width, height = size_of_bytes(content(), f"{file} (imageData)")
    name = file.with_suffix(Path(name).suffix.lower() or ".png") if is_picture(Path(name)) else file.with_suffix(".png")  # fmt: skip
    return Picture(name, width, height, split, content=content)


def _decoded(file: Path) -> bytes:
    """The picture inside an annotation file. Read again when it is written: not all stay in memory."""
    try:
        return base64.b64decode(load_json(file)["imageData"])
    except (binascii.Error, ValueError) as error:
        raise DataError(f"imageData of {file} cannot be read ({error}): export it again") from error


def _instance(shape: Any, width: int, height: int) -> Instance | None:
    name = shape.get("label") if isinstance(shape, dict) else None
    if not isinstance(name, str | int) or isinstance(name, bool) or not str(name).strip():
        return None
    label, kind = str(shape["label"]).strip(), shape.get("shape_type") or "polygon"
    points = _points(shape.get("points"))
    if kind in ("polygon", "quadrilateral") and len(points) >= 3:
        return Instance(label, polygons=[[v for point in points for v in point]])
    if kind in ("rectangle", _TURNED) and len(points) in (2, 4):
        xs, ys = zip(*points)
        return Instance(label, (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)))
    if kind == "circle" and len(points) == 2:
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        if not math.isfinite(radius):
            return None
        angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
        ring = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
        return Instance(label, polygons=[ring.ravel().tolist()])
    if kind == "mask" and len(points) == 2 and isinstance(shape.get("mask"), str):
        return _mask(label, shape["mask"], points[0], width, height)
    return None


def _points(value: Any) -> list[tuple[float, float]]:
    found = []
    for point in value if isinstance(value, list) else ():
        if not isinstance(point, list) or len(point) != 2:
            return []
        x, y = number(point[0]), number(point[1])
        if x is None or y is None:
            return []
        found.append((x, y))
    return found


def _mask(
    label: str, text: str, corner: tuple[float, float], width: int, height: int
) -> Instance | None:
    """A PNG as base64, whose corner lies at the first point."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            part = np.asarray(image.convert("L")) > 0
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        return None
    whole = np.zeros((height, width), np.uint8, order="F")
    left, top = round(corner[0]), round(corner[1])
    part = part[max(0, -top) :, max(0, -left) :]
    room = whole[max(0, top) :, max(0, left) :][: part.shape[0], : part.shape[1]]
    room[...] = part[: room.shape[0], : room.shape[1]]
    if not whole.any():
        return None
    rle = rle_codec.encode(whole)
    x, y, w, h = rle_codec.toBbox(rle).tolist()
    text_rle = {"size": [height, width], "counts": rle["counts"].decode("ascii")}
    return Instance(label, (x, y, w, h), rle=text_rle, area=float(whole.sum()))
