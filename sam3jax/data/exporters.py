"""COCO results in the formats of other tools: YOLO, Label Studio, CVAT. The way back of `importers`.

yolo         one text file a picture, a line an instance: class, then the outline in shares of the picture
             (Ultralytics, segmentation), and data.yaml with the names
labelstudio  one JSON of tasks whose predictions are outlines in percent, to be imported into a project with
             a PolygonLabels control `label` on an Image `image`
cvat         one XML, "CVAT for images 1.1", of brush masks
"""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

import numpy as np
import yaml
from contourpy import LineType, contour_generator
from pycocotools import mask as rle_codec

from sam3jax.data.ledger import DataError

Coco = Mapping[str, Any]


def export(coco: Coco, kind: str, folder: Path) -> Path:
    """Write a COCO dictionary (images, categories, annotations with RLE) as `kind` into a folder.

    Returns what was written: a folder for yolo, else a file. Raises DataError.
    """
    return EXPORTERS[kind](coco, folder)


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Closed outlines of a mask [Y, X] bool, [N, 2] x and y in pixels, largest first; no holes.

    Half way between pixels that are inside and pixels that are not; straight runs are two points.
    """
    padded = np.pad(mask.astype(np.float32), 1)
    lines = contour_generator(z=padded, line_type=LineType.Separate).lines(0.5)
    found = []
    for line in lines:
        points = np.asarray(line, float)[:-1] - 0.5  # of pixel centres, with the frame of zeros
        area = _signed_area(points)
        if area > 0:  # holes run the other way
            found.append((area, _corners(points)))
    return [points for _, points in sorted(found, key=lambda f: -f[0])]


def _signed_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _corners(points: np.ndarray) -> np.ndarray:
    """Without points on a straight line between their neighbours."""
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    turns = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return points[np.abs(turns) > 1e-9]


def _instances(coco: Coco) -> Iterator[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Each picture with its annotations."""
    own: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in coco["annotations"]:
        own[annotation["image_id"]].append(annotation)
    for image in coco["images"]:
        yield image, own[image["id"]]


def _names(coco: Coco) -> dict[Any, str]:
    return {c["id"]: c["name"] for c in coco["categories"]}


def _unique(names: Sequence[str]) -> list[str]:
    """Names of files without their folders and endings; equal ones are numbered."""
    taken: set[str] = set()
    last: dict[str, int] = {}  # number that a stem was given
    out = []
    for name in names:
        stem = free = PurePath(name).stem
        while free.casefold() in taken:
            last[stem] = last.get(stem, 1) + 1
            free = f"{stem}_{last[stem]}"
        taken.add(free.casefold())
        out.append(free)
    return out


def _yolo(coco: Coco, folder: Path) -> Path:
    """Parts of one instance are one outline, joined by lines there and back, as the format has no other way."""
    target = folder / "yolo"
    shutil.rmtree(target, ignore_errors=True)  # of an earlier call
    (target / "labels").mkdir(parents=True, exist_ok=True)
    names = list(_names(coco).items())
    classes = {id: k for k, (id, _) in enumerate(names)}
    pictures = list(_instances(coco))
    stems = _unique([str(image["file_name"]) for image, _ in pictures])
    for stem, (image, own) in zip(stems, pictures, strict=True):
        size = np.array([image["width"], image["height"]], float)
        lines = []
        for annotation in own:
            points = _joined(outlines(rle_codec.decode(_rle(annotation)) > 0))
            if len(points):
                shares = " ".join(f"{v:.6f}" for v in np.clip(points / size, 0, 1).ravel())
                lines.append(f"{classes[annotation['category_id']]} {shares}")
        text = "".join(f"{line}\n" for line in lines)
        (target / "labels" / f"{stem}.txt").write_text(text, encoding="utf-8")
    described = {"path": ".", "names": {k: name for k, (_, name) in enumerate(names)}}
    text = yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
    (target / "data.yaml").write_text(text, encoding="utf-8")
    return target


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if not parts:
        return np.zeros((0, 2))
    first = parts[0][:1]
    walks = [np.concatenate([part, part[:1], first]) for part in parts[1:]]
    return np.concatenate([parts[0], first, *walks]) if walks else parts[0]


def _labelstudio(coco: Coco, folder: Path) -> Path:
    file, names, tasks = folder / "labelstudio.json", _names(coco), []
    for image, own in _instances(coco):
        width, height = image["width"], image["height"]
        results = []
        for annotation in own:
            for part in outlines(rle_codec.decode(_rle(annotation)) > 0):
                points = (part / [width, height] * 100).round(4).tolist()
                score = {"score": annotation["score"]} if "score" in annotation else {}
                results.append(
                    {
                        "id": f"{annotation['id']}-{len(results)}", "type": "polygonlabels",
                        "from_name": "label", "to_name": "image",
                        "original_width": width, "original_height": height,
                        "value": {"points": points, "closed": True, "polygonlabels": [names[annotation["category_id"]]]},
                        **score,
                    }
                )  # fmt: skip
        prediction = {"model_version": "sam3jax", "result": results}
        if results:
            prediction["score"] = max(r.get("score", 1.0) for r in results)
        tasks.append({"data": {"image": str(image["file_name"])}, "predictions": [prediction]})
    file.write_text(json.dumps(tasks, ensure_ascii=False, indent=1), encoding="utf-8")
    return file


def _cvat(coco: Coco, folder: Path) -> Path:
    file, names = folder / "cvat.xml", _names(coco)
    root = Element("annotations")
    SubElement(root, "version").text = "1.1"
    labels = SubElement(SubElement(SubElement(root, "meta"), "task"), "labels")
    for name in names.values():
        SubElement(SubElement(labels, "label"), "name").text = _xml(name)
    for number, (image, own) in enumerate(_instances(coco)):
        attributes = {"id": str(number), "name": _xml(str(image["file_name"]))}
        sizes = {key: str(image[key]) for key in ("width", "height")}
        entry = SubElement(root, "image", {**attributes, **sizes})
        for annotation in own:
            mask = rle_codec.decode(_rle(annotation)) > 0
            if not mask.any():
                continue
            left, top, width, height = (int(v) for v in rle_codec.toBbox(_rle(annotation)))
            runs = _runs(mask[top : top + height, left : left + width])
            SubElement(
                entry, "mask",
                {
                    "label": _xml(names[annotation["category_id"]]), "source": "auto", "occluded": "0",
                    "rle": ", ".join(map(str, runs)), "left": str(left), "top": str(top),
                    "width": str(width), "height": str(height), "z_order": "0",
                },
            )  # fmt: skip
    indent(root)
    ElementTree(root).write(file, encoding="utf-8", xml_declaration=True)
    return file


def _runs(mask: np.ndarray) -> list[int]:
    """Run lengths along the rows, the first of them outside."""
    flat = np.concatenate([[False], mask.ravel(), [not mask.ravel()[-1]]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], ends])).tolist()


def _xml(text: str) -> str:
    """Text that an XML file can hold: no control characters."""
    return "".join(c for c in text if c in "\t\n" or (ord(c) >= 32 and not 0xD800 <= ord(c) < 0xE000))  # fmt: skip


def _rle(annotation: Mapping[str, Any]) -> Any:
    segmentation = annotation.get("segmentation")
    if not isinstance(segmentation, Mapping) or not math.prod(segmentation["size"]):
        raise DataError(
            f"annotation {annotation.get('id')} has no mask as run lengths: only results of predict, or COCO "
            f"files with RLE, are written in other formats"
        )
    counts = segmentation["counts"]
    return {**segmentation, "counts": counts.encode() if isinstance(counts, str) else counts}


EXPORTERS = {"yolo": _yolo, "labelstudio": _labelstudio, "cvat": _cvat}
WRITTEN = {"yolo": "yolo", "labelstudio": "labelstudio.json", "cvat": "cvat.xml"}  # into the folder
