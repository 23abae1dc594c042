"""CVAT for images 1.1: one XML file with boxes, polygons, ellipses and brush masks of all pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from pycocotools import mask as rle_codec

from sam3jax.data.importers.picture import (
    SPLITS,
    Instance,
    Picture,
    picture_files,
    read_xml,
    split_of,
)
from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.pictures import displayed_size

_CORNERS = 64  # of the polygon that stands for an ellipse


def read(root: Path, ledger: Ledger) -> Iterator[Picture]:
    """Every picture of the XML files. Raises DataError."""
    pictures = picture_files(root)
    for file in sorted(root.rglob("*.xml")):
        xml = read_xml(file)
        if file.name.startswith(".") or xml.tag != "annotations":
            ledger.add("XML file left out: no CVAT annotations", file.name)
            continue
        if xml.find("track") is not None:
            raise DataError(f"{file} holds tracks of a video: export it as CVAT for *images*")
        for image in xml.iter("image"):
            name = image.get("name", "")
            path = _find(name, pictures, root)
            if path is None:
                ledger.add("picture left out: its file is missing", name)
                continue
            width, height = displayed_size(path)
            split = SPLITS.get(image.get("subset", "").lower()) or split_of(path, root)
            picture = Picture(path, width, height, split)
            for k, item in enumerate(image):
                instance = _instance(item, width, height)
                if instance is not None:
                    picture.instances.append(instance)
                elif item.tag != "tag":
                    ledger.add("shape left out: neither area nor box", name, k, item.tag)
            yield picture


def _find(name: str, pictures: list[Path], root: Path) -> Path | None:
    """The file whose path ends like the name."""
    ends = [p for p in pictures if f"/{p.relative_to(root).as_posix()}".endswith(f"/{name}")]
    same = ends or [p for p in pictures if p.name == Path(name).name]
    return same[0] if len(same) == 1 or ends else None


def _instance(item: Element, width: int, height: int) -> Instance | None:
    label = item.get("label", "").strip()
    value = lambda key: float(item.get(key, "nan"))
    try:
        if not label:
            return None
        if item.tag == "box":
            left, top, right, bottom = (value(k) for k in ("xtl", "ytl", "xbr", "ybr"))
            return _finite(Instance(label, (left, top, right - left, bottom - top)))
        if item.tag == "polygon":
            pairs = [p.split(",") for p in item.get("points", "").split(";")]
            points = [float(v) for pair in pairs for v in pair]
            return Instance(label, polygons=[points]) if len(points) >= 6 else None
        if item.tag == "ellipse":
            angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
            x = value("cx") + value("rx") * np.cos(angles)
            y = value("cy") + value("ry") * np.sin(angles)
            return _finite(Instance(label, polygons=[np.stack([x, y], 1).ravel().tolist()]))
        if item.tag == "mask":
            return _mask(label, item, width, height)
    except ValueError:
        return None
    return None


def _finite(instance: Instance) -> Instance | None:
    return instance if np.isfinite(instance.bounds()).all() else None


def _mask(label: str, item: Element, width: int, height: int) -> Instance | None:
    """Run lengths along the rows of the mask's own rectangle, the first of them outside."""
    left, top, w, h = (int(float(item.get(k, "-1"))) for k in ("left", "top", "width", "height"))
    runs = [int(v) for v in item.get("rle", "").split(",")]
    if min(runs) < 0 or sum(runs) != w * h or left < 0 or top < 0:
        return None
    part = np.repeat(np.arange(len(runs)) % 2, runs).reshape(h, w)
    whole = np.zeros((height, width), np.uint8, order="F")
    room = whole[top : top + h, left : left + w]
    room[...] = part[: room.shape[0], : room.shape[1]]
    if not whole.any():
        return None
    rle = rle_codec.encode(whole)
    box = tuple(rle_codec.toBbox(rle).tolist())
    text = {"size": [height, width], "counts": rle["counts"].decode("ascii")}
    return Instance(label, box, rle=text, area=float(whole.sum()))
