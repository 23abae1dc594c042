"""Pascal VOC: one XML file a picture, with `bndbox` corners (and polygons, as Roboflow writes them).

Annotations/ beside JPEGImages/ with the splits in ImageSets/Main, or XML files beside the pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from sam3jax.data.importers.picture import (
    SPLITS,
    Instance,
    Picture,
    picture_files,
    read_xml,
    split_of,
)
from sam3jax.data.ledger import Ledger
from sam3jax.data.numbers import number
from sam3jax.data.pictures import displayed_size


def read(root: Path, ledger: Ledger) -> Iterator[Picture]:
    """Every annotated picture. Raises DataError."""
    pictures = {p.stem: p for p in picture_files(root)}
    nearby = {(p.parent, p.stem): p for p in pictures.values()} | {
        (p.parent, p.stem): p for p in picture_files(root)
    }
    splits = _splits(root)
    parsed = [(f, read_xml(f)) for f in sorted(root.rglob("*.xml")) if not f.name.startswith(".")]
    first = _first_pixel([xml for _, xml in parsed])
    for file, xml in parsed:
        if xml.tag != "annotation":
            ledger.add("XML file left out: no VOC annotation", file.name)
            continue
        stem = Path(xml.findtext("filename") or file.stem).stem
        picture = (
            nearby.get((file.parent, file.stem)) or pictures.get(file.stem) or pictures.get(stem)
        )
        if picture is None:
            ledger.add("annotation file left out: its picture is missing", file.name)
            continue
        width, height = displayed_size(picture)
        found = Picture(picture, width, height, splits.get(file.stem) or split_of(file, root))
        for k, item in enumerate(xml.iter("object")):
            instance = _instance(item, first)
            if instance is None:
                ledger.add("object left out: no name or no box", file.name, k)
            else:
                found.instances.append(instance)
        yield found


def _splits(root: Path) -> dict[str, str]:
    """Stem of a picture -> split, from ImageSets."""
    found: dict[str, str] = {}
    for file in sorted(root.glob("ImageSets/*/*.txt")):
        split = SPLITS.get(file.stem.lower())
        for line in file.read_text("utf-8", "replace").splitlines() if split else ():
            if line.strip():
                found.setdefault(line.split()[0], split or "")
    return found


def _first_pixel(files: list[Element]) -> int:
    """1 where corners count pixels from 1, as VOC itself does; 0 where a file has a 0 or a fraction."""
    values = [
        number(item.text)
        for xml in files
        for box in xml.iter("bndbox")
        for item in box
        if item.tag in ("xmin", "ymin")
    ]
    return int(all(v is not None and v >= 1 and v.is_integer() for v in values))


def _instance(item: Element, first: int) -> Instance | None:
    name = (item.findtext("name") or "").strip()
    corners = [number(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    if not name or None in corners:
        return None
    values = [float(v or 0) for v in corners]
    (left, right), (top, bottom) = sorted(values[0::2]), sorted(values[1::2])
    polygon = item.find("polygon")
    points: list[float] = []
    if polygon is not None:
        for k in range(1, len(polygon) // 2 + 1):
            x, y = number(polygon.findtext(f"x{k}")), number(polygon.findtext(f"y{k}"))
            points += [x, y] if x is not None and y is not None else []
    box = (left - first, top - first, right - left + first, bottom - top + first)
    return Instance(name, box, [points] if len(points) >= 6 else ())
