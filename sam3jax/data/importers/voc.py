"""Pascal VOC: one XML file a picture, with `bndbox` corners (and polygons, as Roboflow writes them).

Annotations/ beside JPEGImages/ with the splits in ImageSets/Main, or XML files beside the pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from sam3jax.data.importers.picture import (
    ByName,
    Instance,
    Picture,
    files_below,
    named_split,
    picture_files,
    picture_of,
    read_text,
    read_xml,
    split_of,
)
from sam3jax.data.ledger import Ledger
from sam3jax.data.numbers import flag, number

_FOLDERS = frozenset(("annotations", "jpegimages", "images", "labels"))  # that mirror each other
_MASKS = "segmentation"  # how the names of VOC's folders of masks begin


def read(root: Path, ledger: Ledger) -> Iterator[Picture]:
    """Every annotated picture. Raises DataError."""
    everything = picture_files(root)
    is_mask = lambda p: any(part.lower().startswith(_MASKS) for part in p.relative_to(root).parts[:-1])  # fmt: skip
    files = [p for p in everything if not is_mask(p)]
    if len(files) < len(everything):
        ledger.add("mask picture not used: --import masks reads masks", count=len(everything) - len(files))  # fmt: skip
    stems = {p.with_suffix(""): p for p in files}
    by_name = ByName(list(stems), root, _FOLDERS)
    splits = _splits(root, ledger)
    parsed = [(f, read_xml(f)) for f in files_below(root, ".xml")]
    first = _first_pixel([xml for _, xml in parsed])
    used: set[Path] = set()
    for file, xml in parsed:
        if xml.tag != "annotation":
            ledger.add("XML file left out: no VOC annotation", file.name)
            continue
        own = file.with_suffix("")
        stated = Path(xml.findtext("filename") or "").with_suffix("").as_posix()
        stem = own if own in stems else by_name.find(own.relative_to(root).as_posix())
        stem = stem or by_name.find(stated)
        if stem is None:
            ledger.add("annotation file left out: its picture is missing, or one of several", file.name)  # fmt: skip
            continue
        used.add(stem)
        width, height = xml.findtext("size/width"), xml.findtext("size/height")
        split = splits.get(file.stem) or split_of(file, root)
        found = picture_of(stems[stem], split, width, height)
        for k, item in enumerate(xml.iter("object")):
            instance = _instance(item, first)
            if instance is None:
                ledger.add("object left out: no name or no box", file.name, k)
                continue
            found.instances.append(instance)
            if item.find("polygon") is not None and not instance.polygons:
                ledger.add("polygon left out: no x1, y1, x2, y2, ... (its box is kept)", file.name, k)  # fmt: skip
            if flag(item.findtext("difficult")):
                ledger.add("object marked as difficult (kept)", file.name, k)
        yield found
    for file in (p for stem, p in stems.items() if stem not in used):
        ledger.add("picture left out: no annotation file", file.name)


def _splits(root: Path, ledger: Ledger) -> dict[str, str]:
    """Stem of a picture -> split, from ImageSets."""
    found: dict[str, str] = {}
    for file in sorted(root.glob("ImageSets/*/*.txt")):
        split = named_split(file.stem)
        for line in read_text(file, ledger).split("\n") if split else ():
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
    polygons = list(filter(None, map(_outline, item.findall("polygon"))))
    box = (left - first, top - first, right - left + first, bottom - top + first)
    return Instance(name, box, polygons)


def _outline(polygon: Element) -> list[float]:
    """x y x y ... of x1, y1, x2, y2, ...; empty where there are no three points, or one lacks a number."""
    names = [f"{axis}{k}" for k in range(1, len(polygon) // 2 + 1) for axis in "xy"]
    points = [v for name in names if (v := number(polygon.findtext(name))) is not None]
    return points if len(points) == len(names) >= 6 else []
