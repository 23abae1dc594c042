"""The embedded data set: generated pictures of coloured shapes, with phrases that are never ambiguous.

A phrase is a property and a shape. "red circle" means every red circle, whatever its pattern;
"striped square" every striped square, whatever its colour. An object that answers two phrases is
annotated under both. Shades, patterns, turns and overlaps are limited so that people agree.

Groups of phrases. `basic`: 12, to learn from nothing in minutes. `seen`: what the shipped tiny
model is trained on. `combinations`: words of `seen` in pairs that no picture of `seen` shows. `new`:
shapes, colours and a pattern that no picture of `seen` holds. `new_with_old`: those, and seven of
`seen`, of every shape: to learn the new ones without forgetting the old.

Picture k follows from (seed, k) alone. The folder is a Roboflow export like any other; it is written
once into the cache ($SAM3JAX_CACHE, else ~/.cache/sam3jax), beside its place and then renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

from sam3jax.config import DataConfig
from sam3jax.data.coco import Dataset
from sam3jax.data.folders import read_dataset
from sam3jax.data.pictures import DataError
from sam3jax.data.shape_pictures import (
    COLOURS,
    PATTERNS,
    SHAPES,
    Thing,
    draw,
    draw_background,
    draw_colour,
    outline,
)
from sam3jax.files import cache_folder

_VERSION = 1  # of the drawing: another one means other pictures under the same seed
_SPLITS = ("train", "valid", "test")
_VISIBLE = 0.6  # least share of an object that those above it leave uncovered
_EMPTY = 0.06  # share of pictures without any object


@dataclass(frozen=True, slots=True)
class Concept:
    """Every `shape` that has `quality`, a colour or a pattern."""

    quality: str
    shape: str

    @property
    def phrase(self) -> str:
        return f"{self.quality} {self.shape}"

    def answered_by(self, thing: Thing) -> bool:
        return thing.shape == self.shape and self.quality in (thing.colour, thing.pattern)


@dataclass(frozen=True, slots=True)
class Group:
    """What is asked, and what may be in the pictures: everything but `banned` pairs."""

    concepts: tuple[Concept, ...]
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    patterns: tuple[str, ...]
    banned: tuple[Concept, ...] = ()


def _concepts(*phrases: str) -> tuple[Concept, ...]:
    return tuple(Concept(*phrase.split()) for phrase in phrases)


def _product(qualities: tuple[str, ...], shapes: tuple[str, ...]) -> tuple[Concept, ...]:
    return tuple(Concept(q, s) for s in shapes for q in qualities)


_SEEN_SHAPES = ("circle", "square", "triangle", "star", "cross")
_SEEN_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
_SEEN_PATTERNS = ("solid", "striped", "dotted")
COMBINATIONS = _concepts(
    "green star",
    "purple triangle",
    "orange cross",
    "yellow square",
    "dotted circle",
    "striped star",
)
NEW = _concepts("pink heart", "brown moon", "black arrow", "cyan drop", "checkered triangle")
SEEN = tuple(
    c
    for c in _product((*_SEEN_COLOURS, "striped", "dotted"), _SEEN_SHAPES)
    if c not in COMBINATIONS
)
REHEARSED = _concepts(
    "red circle",
    "yellow star",
    "blue square",
    "green cross",
    "orange triangle",
    "striped circle",
    "dotted star",
)
BASIC = _product(("red", "green", "blue", "striped"), ("circle", "square", "triangle"))
HELD_OUT = (*COMBINATIONS, *NEW)
GROUPS: dict[str, Group] = {
    "basic": Group(
        BASIC, ("circle", "square", "triangle"), ("red", "green", "blue"), ("solid", "striped")
    ),
    "seen": Group(SEEN, _SEEN_SHAPES, _SEEN_COLOURS, _SEEN_PATTERNS, COMBINATIONS),
    "combinations": Group(COMBINATIONS, _SEEN_SHAPES, _SEEN_COLOURS, _SEEN_PATTERNS),
    "new": Group(NEW, tuple(SHAPES), tuple(COLOURS), PATTERNS),
    "new_with_old": Group((*NEW, *REHEARSED), tuple(SHAPES), tuple(COLOURS), PATTERNS),
    "all": Group((*SEEN, *HELD_OUT), tuple(SHAPES), tuple(COLOURS), PATTERNS),
}


def shapes_dataset(split: str, config: DataConfig) -> Dataset:
    """The generated data of a split (train, valid or test), written to the cache if need be."""
    if split not in _SPLITS:
        raise DataError(
            f"the generated shapes have no split {split!r}, they have {', '.join(_SPLITS)}: set "
            f"data.train_split or data.valid_split"
        )
    pictures = config.shapes_train if split == "train" else config.shapes_valid
    name = f"{config.shapes_concepts}-{config.shapes_size}px-seed{config.shapes_seed}-{split}{pictures}"
    folder = cache_folder() / f"shapes-v{_VERSION}" / name
    if not folder.is_dir():
        write_shapes(
            folder,
            seed=(config.shapes_seed, _SPLITS.index(split)),
            pictures=pictures,
            concepts=config.shapes_concepts,
            size=config.shapes_size,
        )
    return read_dataset(folder, split)


def write_shapes(
    folder: str | Path,
    *,
    seed: int | tuple[int, ...],
    pictures: int,
    concepts: str = "basic",
    size: int = 256,
) -> None:
    """Write one split of generated pictures: PNGs and `_annotations.coco.json`.

    concepts: a key of GROUPS; size: the longer edge in pixels. All or nothing: the folder appears
    complete or not at all, also where two processes write it at once. Raises DataError.
    """
    folder = Path(folder)
    seeds = (seed,) if isinstance(seed, int) else tuple(seed)
    with written_once(folder) as beside:
        write = partial(_write_picture, beside, seeds=seeds, group=GROUPS[concepts], size=size)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            written = list(pool.map(write, range(pictures)))
        coco = _coco(written, GROUPS[concepts], f"{concepts}, seed {seeds}, version {_VERSION}")
        (beside / "_annotations.coco.json").write_text(json.dumps(coco))


@contextlib.contextmanager
def written_once(folder: Path) -> Iterator[Path]:
    """A folder to fill with generated data, which then becomes `folder`; all or nothing.

    Another process may write the same data at the same time: the first one to end counts.
    Raises DataError where the place cannot be written to.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"cannot write generated data to {folder} ({error.strerror}): set SAM3JAX_CACHE to a "
            f"folder that can be written"
        ) from error
    try:
        yield beside
        beside.chmod(0o755)
        beside.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, with the same bytes
            raise DataError(f"cannot write generated data to {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def draw_scene(
    seeds: tuple[int, ...], number: int, group: Group, size: int
) -> tuple[np.ndarray, list[Thing], np.ndarray]:
    """Picture `number`: pixels [Y, X, 3], its objects and their visible parts [n, Y, X]."""
    rng = np.random.default_rng((_VERSION, *seeds, number))
    short = round(size * 0.75)
    width, height = ((size, size), (size, short), (short, size))[rng.integers(3)]
    things = [] if rng.random() < _EMPTY else _scene(rng, group, width, height)
    background = draw_background(rng, width, height)
    while True:
        picture, visible, areas = draw(things, background)
        shares = visible.sum((1, 2)) / np.maximum(areas, 1)
        if (shares >= _VISIBLE).all():
            return picture, things, visible
        things = [t for t, share in zip(things, shares) if share >= _VISIBLE]


def _scene(rng: np.random.Generator, group: Group, width: int, height: int) -> list[Thing]:
    """Objects, lowest first: some that answer a few concepts, some that are merely there."""
    kinds: list[tuple[str, str, str]] = []
    wanted = rng.permutation(len(group.concepts))[: rng.choice(4, p=(0.15, 0.35, 0.3, 0.2))]
    for index in wanted:
        concept = group.concepts[index]
        for _ in range(rng.choice((1, 2, 3), p=(0.5, 0.3, 0.2))):
            kinds.append(_kind(rng, group, concept))
    for _ in range(rng.integers(1, 5)):
        kinds.append(_kind(rng, group, None))
    things: list[Thing] = []
    for k in rng.permutation(len(kinds)):
        thing = _place(rng, kinds[k], things, width, height)
        if thing is not None:
            things.append(thing)
    return things


def _kind(rng: np.random.Generator, group: Group, concept: Concept | None) -> tuple[str, str, str]:
    """Shape, colour and pattern that answer the concept and no banned pair."""
    while True:
        shape = str(rng.choice(group.shapes))
        colour = str(rng.choice(group.colours))
        pattern = "solid" if rng.random() < 0.5 else str(rng.choice(group.patterns))
        if concept is not None:
            shape = concept.shape
            colour = concept.quality if concept.quality in COLOURS else colour
            pattern = concept.quality if concept.quality in PATTERNS else pattern
        if not {Concept(colour, shape), Concept(pattern, shape)} & set(group.banned):
            return shape, colour, pattern


def _place(
    rng: np.random.Generator,
    kind: tuple[str, str, str],
    things: list[Thing],
    width: int,
    height: int,
) -> Thing | None:
    """The object at a free enough place, or None where there is none; sizes from small to large."""
    shape, colour, pattern = kind
    edge = min(width, height)
    smallest = 0.07 if pattern == "solid" else 0.12  # a pattern wants room to be seen
    for _ in range(30):
        radius = edge * smallest * (0.3 / smallest) ** rng.random()
        margin = 0.8 * radius
        centre = (rng.uniform(margin, width - margin), rng.uniform(margin, height - margin))
        near = [np.hypot(centre[0] - t.centre[0], centre[1] - t.centre[1]) for t in things]
        # Twins that touch look like one object; others may overlap.
        alike = [t.colour == colour or t.shape == shape for t in things]
        if all(
            d > (1.0 if a else 0.6) * (radius + t.radius) for d, a, t in zip(near, alike, things)
        ):
            turn = rng.uniform(-1, 1) * SHAPES[shape][1]
            return Thing(shape, colour, pattern, centre, radius, turn, draw_colour(rng, colour))
    return None


def _write_picture(
    folder: Path, number: int, *, seeds: tuple[int, ...], group: Group, size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write the PNG; its COCO image entry and annotations (without ids)."""
    picture, things, visible = draw_scene(seeds, number, group, size)
    height, width = picture.shape[:2]
    name = f"{number:05d}.png"
    Image.fromarray(picture).save(folder / name, compress_level=3)
    image = {"id": number, "file_name": name, "width": width, "height": height}
    annotations = []
    for thing, mask in zip(things, visible):
        rle = rle_codec.encode(np.asfortranarray(mask))
        entry = {
            "image_id": number,
            "bbox": rle_codec.toBbox(rle).tolist(),
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": _segmentation(thing, rle, height, width),
        }
        for category, concept in enumerate(group.concepts, 1):
            if concept.answered_by(thing):
                annotations.append({**entry, "category_id": category})
    return image, annotations


def _segmentation(thing: Thing, rle: dict[str, Any], height: int, width: int) -> Any:
    """A polygon where that says the same as the pixels, else a compressed RLE."""
    polygon = outline(thing).round(2).reshape(-1).tolist()
    drawn = rle_codec.frPyObjects([polygon], height, width)
    if rle_codec.iou(drawn, [rle], [0])[0, 0] > 0.985:
        return [polygon]
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _coco(
    written: list[tuple[dict[str, Any], list[dict[str, Any]]]], group: Group, description: str
) -> dict[str, Any]:
    annotations = [annotation for _, found in written for annotation in found]
    return {
        "info": {"description": f"sam3jax shapes: {description}", "version": str(_VERSION)},
        "licenses": [],
        "categories": [
            {"id": k, "name": concept.phrase, "supercategory": concept.shape}
            for k, concept in enumerate(group.concepts, 1)
        ],
        "images": [image for image, _ in written],
        "annotations": [{"id": k, **entry} for k, entry in enumerate(annotations, 1)],
    }
