"""Hugging Face `datasets`: a picture column and an `objects` column with boxes and categories.

metadata.jsonl beside pictures (`imagefolder`) is read here; what `save_to_disk` wrote and parquet
files need the library `datasets`. Boxes are left, top, width, height in pixels, as its documentation
has it; corners are read where the numbers can mean nothing else.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sam3jax.data.boxes import convention, parse_box
from sam3jax.data.importers.picture import (
    SPLITS,
    Instance,
    Picture,
    class_names,
    files_below,
    is_inside,
    picture_files,
    picture_of,
    read_text,
    split_of,
)
from sam3jax.data.ledger import DataError, Ledger, shown
from sam3jax.data.mask_forms import parse_text
from sam3jax.data.numbers import flag
from sam3jax.data.pictures import size_of_bytes
from sam3jax.data.segmentations import read_segmentation, segmentation_area

METADATA = "metadata.jsonl"
_BOXES = ("bbox", "bboxes", "boxes", "box")
_LABELS = ("category", "categories", "label", "labels", "category_id", "category_name", "class", "classes", "name")  # fmt: skip
_MASKS = ("segmentation", "segmentations", "polygons", "polygon")
_CROWDS = ("iscrowd", "is_crowd")
_NAMES = ("classes.txt", "labels.txt")


class Row(NamedTuple):
    """One picture and what the columns say about it. id: how messages name it; names: of numbers."""

    id: str
    split: str
    file: Path
    content: Callable[[], bytes] | None
    columns: Mapping[str, Any]
    names: Sequence[str]


def read(root: Path, ledger: Ledger) -> Iterator[Picture]:
    """Every picture with its objects. Raises DataError."""
    pictures: list[Picture] = []
    boxes: list[Any] = []
    sizes: list[tuple[int, int]] = []
    files = [p for p in files_below(root, ".jsonl") if p.name == METADATA]
    rows = _listed(files, root, ledger) if files else _stored(root)
    for row in rows:
        picture = _picture_of(row)
        size = picture.width, picture.height
        for k, item in enumerate(_objects(row)):
            instance = _instance(item, k, row, size, ledger)
            if instance is not None:
                picture.instances.append(instance)
                boxes.append(instance.box)
                sizes.append(size)
        pictures.append(picture)
    if files:
        for file in sorted(set(picture_files(root)) - {picture.file for picture in pictures}):
            ledger.add("picture left out: no line names it", file.name)
    meant = convention(boxes, sizes, str(root))
    if meant is not None:
        name, converted = meant
        ledger.add(f"box read as {name}", count=len(boxes))
        instances = (instance for picture in pictures for instance in picture.instances)
        for instance, box in zip(instances, converted, strict=True):
            instance.box = box
    yield from pictures


def _listed(files: Sequence[Path], root: Path, ledger: Ledger) -> Iterator[Row]:
    """The lines of metadata.jsonl files."""
    for file in files:
        found = class_names(file.parent, _NAMES, ledger) or class_names(root, _NAMES, ledger)
        names = [found.get(k, "") for k in range(max(found, default=-1) + 1)]
        for number, line in enumerate(read_text(file, ledger).split("\n"), 1):
            if not line.strip():
                continue
            try:
                columns = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, line {number} is not JSON ({error})") from error
            name = columns.get("file_name") if isinstance(columns, dict) else None
            if not isinstance(name, str) or not name:
                ledger.add("line left out: no file_name", file.name, number, columns)
                continue
            path = file.parent / name
            if not is_inside(path, root):
                ledger.add("picture left out: outside the folder", name, number)
            elif not path.is_file():
                ledger.add("picture left out: its file is missing", name, number)
            else:
                yield Row(f"line {number}", split_of(path, root), path, None, columns, names)


def _stored(root: Path) -> Iterator[Row]:
    """The rows of a data set that the library `datasets` reads."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{root} is stored by Hugging Face datasets, which reads it: pip install sam3jax[huggingface]"
        ) from error
    datasets.disable_progress_bars()
    saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        found = datasets.load_from_disk(str(root)) if saved else datasets.load_dataset(str(root))
    except Exception as error:  # whatever the library raises, it is about these files
        raise DataError(f"{root} cannot be read by Hugging Face datasets: {error}") from error
    for split, rows in found.items() if isinstance(found, dict) else [("train", found)]:
        images = [n for n, f in rows.features.items() if isinstance(f, datasets.Image)]
        if not images:
            raise DataError(
                f"{root}, {split}: no column of pictures, there are {', '.join(rows.features)}"
            )
        column = "image" if "image" in images else images[0]
        names = _label_names(rows.features)
        encoded = rows.cast_column(column, datasets.Image(decode=False))
        for other in images:
            if other != column:
                encoded = encoded.remove_columns(other)
        for k in range(len(encoded)):
            columns = encoded[k]
            where = f"row {k} of {split}"
            file, content = _picture(columns.pop(column), where, f"{split}_{k:06d}", root)
            if content is not None:  # read again when it is written: not all of them stay in memory
                content = lambda k=k, rows=encoded, column=column: rows[k][column]["bytes"]
            yield Row(where, SPLITS.get(split.lower(), split), file, content, columns, names)


def _picture(
    value: Any, where: str, name: str, root: Path
) -> tuple[Path, Callable[[], bytes] | None]:
    """The file of a picture, or the name it shall have and its content."""
    path, data = (value or {}).get("path"), (value or {}).get("bytes")
    if data is None:
        if path is None:
            raise DataError(f"{root}, {where}: no picture")
        if not is_inside(Path(path), root):
            raise DataError(
                f"{root}, {where}: the picture {path} lies outside the folder: store the pictures "
                f"inside, as save_to_disk does"
            )
        return Path(path), None
    if path:
        return Path(Path(path.replace("\\", "/")).name), lambda: data
    with Image.open(io.BytesIO(data)) as image:
        return Path(f"{name}.{(image.format or 'png').lower()}"), lambda: data


def _picture_of(row: Row) -> Picture:
    if row.content is None:
        return picture_of(row.file, row.split, row.columns.get("width"), row.columns.get("height"))
    width, height = size_of_bytes(row.content(), f"{row.file} ({row.id})")
    return Picture(row.file, width, height, row.split, content=row.content)


def _label_names(feature: Any) -> list[str]:
    """The names of the first label column that has some, however deep it lies."""
    if hasattr(feature, "names") and hasattr(feature, "int2str"):
        return list(feature.names)
    if isinstance(feature, Mapping):
        wanted = [feature[k] for k in _LABELS if k in feature]
        inner = [*wanted, *(f for f in feature.values() if isinstance(f, Mapping) or hasattr(f, "feature"))]  # fmt: skip
    elif isinstance(feature, list):
        inner = feature
    else:
        inner = [feature.feature] if hasattr(feature, "feature") else []
    return next(filter(None, map(_label_names, inner)), [])


def _objects(row: Row) -> Iterator[dict[str, Any]]:
    """One dictionary an object. Raises DataError where there is no column of boxes."""
    values = [parse_text(v) if isinstance(v, str) and v[:1] in "[{" else v for v in row.columns.values()]  # fmt: skip
    for columns in (
        row.columns,
        *(v for v in values if isinstance(v, Mapping)),
    ):  # a dictionary of lists
        if key := next((k for k in _BOXES if isinstance(columns.get(k), list)), None):
            count = len(columns[key])
            for k in range(count):
                yield {n: v[k] for n, v in columns.items() if isinstance(v, list) and len(v) == count}  # fmt: skip
            return
    for value in values:  # a list of dictionaries
        if isinstance(value, list) and all(v is None or isinstance(v, Mapping) for v in value):
            yield from (v or {} for v in value)
            return
    if not any(v is None or v == {} for v in row.columns.values()):
        raise DataError(
            f"{row.file}, {row.id}: no column `objects` with `bbox` and `category`, there are "
            f"{', '.join(row.columns) or 'none'}"
        )


def _instance(
    item: Mapping[str, Any], k: int, row: Row, size: tuple[int, int], ledger: Ledger
) -> Instance | None:
    value = lambda keys: next((item[key] for key in keys if item.get(key) is not None), None)
    label, where = value(_LABELS), (row.file.name, k)
    if isinstance(label, str) and label.strip():
        name = label.strip()
    elif isinstance(label, int | float) and not isinstance(label, bool):
        if not row.names:
            raise DataError(
                f"{row.file}, {row.id}: category {shown(label)} is a number that nothing names: put classes.txt, "
                f"one name a line, into the folder"
            )
        if not 0 <= label < len(row.names) or label != int(label) or not row.names[int(label)]:
            ledger.add("object left out: its category has no name", *where, label)
            return None
        name = row.names[int(label)]
    else:
        ledger.add("object left out: no category, or not one for each box", *where, label)
        return None
    box = parse_box(value(_BOXES))
    mask, extent, _ = read_segmentation(value(_MASKS), *size, ledger, where)
    if box is None and extent is not None:
        box = extent[0], extent[1], extent[2] - extent[0], extent[3] - extent[1]
    if box is None:
        ledger.add("object left out: neither area nor box", *where, item)
        return None
    instance = Instance(name, box, crowd=bool(flag(value(_CROWDS))))
    if isinstance(mask, tuple):
        instance.polygons = [polygon.tolist() for polygon in mask]
    elif mask is not None:
        instance.rle = {**mask, "counts": mask["counts"].decode("ascii")}
    if mask is not None:
        instance.area = segmentation_area(mask, size[1], size[0])
    return instance
