"""labelme: one JSON file a picture, with `shapes`; shapes of one label and group are one object."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

from sam3jax.data.importers.picture import SUFFIXES, Instance, Picture, is_inside, split_of
from sam3jax.data.json_file import load_json
from sam3jax.data.ledger import Ledger
from sam3jax.data.numbers import number
from sam3jax.data.pictures import displayed_size

_CORNERS = 64  # of the polygon that stands for a circle


def read(root: Path, ledger: Ledger) -> Iterator[Picture]:
    """Every annotated picture. Raises DataError."""
    for file in sorted(root.rglob("*.json")):
        if file.name.startswith("."):
            continue
        raw = load_json(file)
        if not isinstance(raw, dict) or not isinstance(raw.get("shapes"), list):
            ledger.add("JSON file left out: no labelme `shapes`", file.name)
            continue
        path = _picture(file, raw, root)
        if path is None:
            ledger.add("annotation file left out: its picture is missing", file.name)
            continue
        width, height = displayed_size(path)
        picture = Picture(path, width, height, split_of(file, root))
        groups: dict[tuple, Instance] = {}
        for k, shape in enumerate(raw["shapes"]):
            instance = _instance(shape, width, height)
            if instance is None:
                kind = shape.get("shape_type") if isinstance(shape, dict) else shape
                ledger.add("shape left out: neither area nor box", file.name, k, kind)
                continue
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


def _picture(file: Path, raw: dict[str, Any], root: Path) -> Path | None:
    """The picture of an annotation file, inside the folder."""
    name = str(raw.get("imagePath") or "").replace("\\", "/")
    places = [file.parent / name, file.parent / Path(name).name] if name else []
    places += [file.with_suffix(s) for s in SUFFIXES]
    good = (p for p in places if p.suffix.lower() in SUFFIXES and is_inside(p, root))
    return next((p for p in good if p.is_file()), None)


def _instance(shape: Any, width: int, height: int) -> Instance | None:
    name = shape.get("label") if isinstance(shape, dict) else None
    if not isinstance(name, str | int) or isinstance(name, bool) or not str(name).strip():
        return None
    label, kind = str(shape["label"]).strip(), shape.get("shape_type") or "polygon"
    points = _points(shape.get("points"))
    if kind == "polygon" and len(points) >= 3:
        return Instance(label, polygons=[[v for point in points for v in point]])
    if kind == "rectangle" and len(points) in (2, 4):
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
        part = np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) > 0
    except (binascii.Error, ValueError, OSError):
        return None
    whole = np.zeros((height, width), np.uint8, order="F")
    left, top = max(0, round(corner[0])), max(0, round(corner[1]))
    room = whole[top : top + part.shape[0], left : left + part.shape[1]]
    room[...] = part[: room.shape[0], : room.shape[1]]
    if not whole.any():
        return None
    rle = rle_codec.encode(whole)
    x, y, w, h = rle_codec.toBbox(rle).tolist()
    text_rle = {"size": [height, width], "counts": rle["counts"].decode("ascii")}
    return Instance(label, (x, y, w, h), rle=text_rle, area=float(whole.sum()))
