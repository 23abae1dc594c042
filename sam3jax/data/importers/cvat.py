"""CVAT for images 1.1: one XML file with boxes, polygons, ellipses and brush masks of all pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as rle_codec

from sam3jax.data.importers.picture import (
    ByName,
    Instance,
    Picture,
    files_below,
    named_split,
    picture_files,
    picture_of,
    read_xml,
    split_of,
)
from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.numbers import number

_CORNERS = 64  # of the polygon that stands for an ellipse


def read(root: Path, ledger: Ledger) -> Iterator[Picture]:
    """Every picture of the XML files. Raises DataError."""
    pictures = ByName(picture_files(root), root)
    for file in files_below(root, ".xml"):
        xml = read_xml(file)
        if xml.tag != "annotations":
            ledger.add("XML file left out: no CVAT annotations", file.name)
            continue
        if xml.find("track") is not None:
            raise DataError(f"{file} holds tracks of a video: export it as CVAT for *images*")
        for image in xml.iter("image"):
            name = image.get("name", "")
            path = pictures.find(name)
            if path is None:
                ledger.add("picture left out: its file is missing, or one of several", name)
                continue
            split = named_split(image.get("subset", "")) or split_of(path, root)
            picture = picture_of(path, split, image.get("width"), image.get("height"))
            for k, item in enumerate(image):
                instance = _instance(item, picture.width, picture.height)
                if instance is not None:
                    picture.instances.append(instance)
                    if number(item.get("rotation")) and item.tag == "box":
                        ledger.add("box is turned (its bounds are taken)", name, k, item.get("rotation"))  # fmt: skip
                elif item.tag != "tag":
                    ledger.add("shape left out: neither area nor box", name, k, item.tag)
            yield picture


def _instance(item: Element, width: int, height: int) -> Instance | None:
    label = item.get("label", "").strip()
    value = lambda key: float(item.get(key, "nan"))
    try:
        if not label:
            return None
        if item.tag == "box":
            left, top, right, bottom = (value(k) for k in ("xtl", "ytl", "xbr", "ybr"))
            corners = _turned(item, [left, right, right, left], [top, top, bottom, bottom])
            return _finite(Instance(label, Instance(label, polygons=[corners]).bounds()))
        if item.tag == "polygon":
            pairs = [p.split(",") for p in item.get("points", "").split(";")]
            points = [float(v) for pair in pairs for v in pair]
            good = all(len(pair) == 2 for pair in pairs) and np.isfinite(points).all()
            return Instance(label, polygons=[points]) if good and len(points) >= 6 else None
        if item.tag == "ellipse":
            angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
            x = value("cx") + value("rx") * np.cos(angles)
            y = value("cy") + value("ry") * np.sin(angles)
            return _finite(Instance(label, polygons=[_turned(item, x, y)]))
        if item.tag == "mask":
            return _mask(label, item, width, height)
    except (ValueError, OverflowError):
        return None
    return None


def _turned(item: Element, x: ArrayLike, y: ArrayLike) -> list[float]:
    """x y x y ... of points, turned around their middle by `rotation` degrees, clockwise as displayed."""
    points = np.stack([x, y], 1)
    angle = np.deg2rad(number(item.get("rotation")) or 0)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middle = (points.min(0) + points.max(0)) / 2
    return ((points - middle) @ turn + middle).ravel().tolist()


def _finite(instance: Instance) -> Instance | None:
    return instance if np.isfinite(instance.bounds()).all() else None


def _mask(label: str, item: Element, width: int, height: int) -> Instance | None:
    """Run lengths along the rows of the mask's own rectangle, the first of them outside."""
    left, top, w, h = (int(float(item.get(k, "-1"))) for k in ("left", "top", "width", "height"))
    runs = [int(v) for v in item.get("rle", "").split(",")]
    fits = min(left, top, w, h) >= 0 and left + w <= width and top + h <= height
    if not fits or min(runs) < 0 or sum(runs) != w * h:
        return None
    part = np.repeat(np.arange(len(runs)) % 2, runs).reshape(h, w)
    whole = np.zeros((height, width), np.uint8, order="F")
    whole[top : top + h, left : left + w] = part
    if not whole.any():
        return None
    rle = rle_codec.encode(whole)
    box = tuple(rle_codec.toBbox(rle).tolist())
    text = {"size": [height, width], "counts": rle["counts"].decode("ascii")}
    return Instance(label, box, rle=text, area=float(whole.sum()))
