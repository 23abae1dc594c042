"""Numbers about data sets, as tables: for doctor.json, the table of categories and the histograms."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam3jax.data.ledger import Ledger, printable, shown
from sam3jax.data.names import phrase_key
from sam3jax.data.records import Dataset

_CHUNK = 1 << 20


def category_table(splits: Mapping[str, Dataset]) -> list[dict[str, Any]]:
    """One row a phrase: pictures, instances and the quartiles of box edges (% of the picture's) in each
    split; most instances first. Names that are one phrase to the model share a row."""
    edges: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    pictures: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    names: dict[str, str] = {}
    for split, dataset in splits.items():
        keys = {i: phrase_key(name) for i, name in dataset.categories.items()}
        for i, name in dataset.categories.items():
            names.setdefault(keys[i], name)
        for image in dataset.images:
            size = image.width * image.height
            for a in image.annotations:
                if not a.iscrowd:
                    edges[keys[a.category_id]][split].append((a.bbox[2] * a.bbox[3] / size) ** 0.5)
            for key in {keys[a.category_id] for a in image.annotations if not a.iscrowd}:
                pictures[key][split] += 1
    rows = []
    for key, name in names.items():
        row: dict[str, Any] = {"category": printable(name)}
        for split in splits:
            found = edges[key][split]
            quartiles = np.quantile(found, (0.25, 0.5, 0.75)).tolist() if found else []
            row[f"{split} pictures"] = pictures[key][split]
            row[f"{split} instances"] = len(found)
            row[f"{split} box edge % (25/50/75)"] = "/".join(f"{100 * q:.1f}" for q in quartiles)
        rows.append(row)
    total = lambda row: sum(row[f"{split} instances"] for split in splits)
    return sorted(rows, key=total, reverse=True)


def summary(dataset: Dataset) -> dict[str, Any]:
    """What doctor.json says of one split, every odd entry included."""
    annotations = [a for image in dataset.images for a in image.annotations]
    return {
        "pictures": len(dataset.images),
        "pictures_without_annotations": sum(not i.annotations for i in dataset.images),
        "annotations": len(annotations),
        "crowds": sum(a.iscrowd for a in annotations),
        "with_mask": sum(a.segmentation is not None for a in annotations),
        "stated_masks": dataset.stated_masks,
        "problems": [_problem(dataset.problems, s, n) for s, n in dataset.problems.items()],
        "source_ids": {
            kind: {str(number): shown(raw) for number, raw in found.items()}
            for kind, found in dataset.source_ids.items()
        },
    }


def _problem(problems: Mapping[str, int], sentence: str, count: int) -> dict[str, Any]:
    entries = problems.entries(sentence) if isinstance(problems, Ledger) else ()
    listed = [
        {"file": printable(e.file), "id": None if e.id is None else shown(e.id), "found": e.found}
        for e in entries
    ]
    return {"what": sentence, "count": count, "entries": listed}


def same_pictures(a: Dataset, b: Dataset) -> list[tuple[str, str]]:
    """Files of the two sets with equal content; only files of equal size are read."""
    sizes_a, sizes_b = _by_size(a), _by_size(b)
    found: list[tuple[str, str]] = []
    for size in sizes_a.keys() & sizes_b.keys():
        known = {_digest(file): file for file in sizes_a[size]}
        for file in sizes_b[size]:
            if (twin := known.get(_digest(file))) is not None:
                found.append((twin.name, file.name))
    return sorted(found)


def twins(dataset: Dataset) -> list[tuple[str, str]]:
    """Pictures of one set with the content of an earlier one, both names; pages of one file are none."""
    found: list[tuple[str, str]] = []
    for files in _by_size(dataset).values():
        known: dict[bytes, Path] = {}
        for file in files if len(files) > 1 else ():
            if (first := known.setdefault(_digest(file), file)) is not file:
                found.append((first.name, file.name))
    return sorted(found)


def _by_size(dataset: Dataset) -> dict[int, list[Path]]:
    sizes: dict[int, list[Path]] = defaultdict(list)
    for file in dict.fromkeys(image.file for image in dataset.images):
        sizes[file.stat().st_size].append(file)
    return sizes


def _digest(file: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()
