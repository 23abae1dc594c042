"""Generated X-ray pictures: dark, noisy, 16 bits of grey, objects that shine through one another.

The far domain of clicks: nothing here has a colour, and where two objects overlap both are there.
Every object absorbs a part of the beam, by its shape's thickness; detector noise follows the counts
that are left. Picture k follows from (seed, k) alone; a data set is written once into the cache.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle_codec
from scipy import ndimage

from sam3jax.config import DataConfig
from sam3jax.data.folders import read_dataset
from sam3jax.data.ledger import DataError
from sam3jax.data.records import Dataset
from sam3jax.data.shape_pictures import SHAPES, Thing, outline
from sam3jax.data.shapes import written_once
from sam3jax.files import cache_folder

_VERSION = 1  # of the drawing: another one means other pictures under the same seed
_SPLITS = ("train", "valid", "test")
_KINDS = tuple(SHAPES)
_FINE = 4  # supersampling of outlines
_COUNTS = (500.0, 2500.0)  # photons a pixel of the open beam, from noisy to less noisy
_LEVELS = (900.0, 3800.0)  # value of the open beam, of 65,535: dark without a window
_ABSORBED = (0.35, 1.1)  # optical depth in the middle of an object
_TOGETHER = 0.6  # share of objects that are put where another one is
_FREE = 0.35  # least share of an object that no other covers


@dataclass(frozen=True, slots=True)
class Body:
    """An object and its coverage [Y, X] in 0..1."""

    thing: Thing
    cover: np.ndarray


def xrays_dataset(split: str, config: DataConfig) -> Dataset:
    """The generated X-rays of a split (train, valid or test), written to the cache if need be."""
    if split not in _SPLITS:
        raise DataError(
            f"the generated X-rays have no split {split!r}, they have {', '.join(_SPLITS)}: set "
            f"data.train_split or data.valid_split"
        )
    pictures = config.shapes_train if split == "train" else config.shapes_valid
    name = f"{config.shapes_size}px-seed{config.shapes_seed}-{split}{pictures}"
    folder = cache_folder() / f"xrays-v{_VERSION}" / name
    if not folder.is_dir():
        seed = (config.shapes_seed, _SPLITS.index(split))
        write_xrays(folder, seed=seed, pictures=pictures, size=config.shapes_size)
    return read_dataset(folder, split)


def write_xrays(
    folder: str | Path, *, seed: tuple[int, ...], pictures: int, size: int = 256
) -> None:
    """Write one split: 16-bit PNGs and `_annotations.coco.json`; all or nothing. Raises DataError."""
    with written_once(Path(folder)) as beside:
        write = partial(_write_picture, beside, seed=seed, size=size)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            written = list(pool.map(write, range(pictures)))
        annotations = [entry for _, found in written for entry in found]
        content = {
            "info": {"description": f"sam3jax X-rays, seed {seed}", "version": str(_VERSION)},
            "categories": [{"id": k, "name": name} for k, name in enumerate(_KINDS, 1)],
            "images": [image for image, _ in written],
            "annotations": [{"id": k, **entry} for k, entry in enumerate(annotations, 1)],
        }
        (beside / "_annotations.coco.json").write_text(json.dumps(content))


def draw_xray(seed: tuple[int, ...], number: int, size: int) -> tuple[np.ndarray, list[Body]]:
    """Picture `number`: values [Y, X] uint16, and its objects, whole where they overlap."""
    rng = np.random.default_rng((_VERSION, 1, *seed, number))
    bodies: list[Body] = []
    for _ in range(rng.integers(2, 7)):
        body = _place(rng, bodies, size)
        if body is not None:
            bodies.append(body)
    depth = _tissue(rng, size)
    for body in bodies:
        middle = rng.uniform(*_ABSORBED)
        inside = np.asarray(ndimage.distance_transform_edt(body.cover > 0.5))
        rounded = np.sqrt(np.clip(inside / (0.35 * body.thing.radius), 0, 1))
        depth += middle * body.cover * (0.55 + 0.45 * rounded)
    counts = rng.uniform(*_COUNTS) * np.exp(-depth)
    seen = ndimage.gaussian_filter(rng.poisson(counts).astype(np.float64), rng.uniform(0.4, 0.8))
    values = seen / counts.max() * rng.uniform(*_LEVELS) + rng.normal(0, 8, (size, size))
    return np.clip(np.rint(values), 0, 65535).astype(np.uint16), bodies


def _tissue(rng: np.random.Generator, size: int) -> np.ndarray:
    """Optical depth of what is no object: a slope, and soft blotches of two sizes."""
    y, x = (np.arange(size)[:, None] / size, np.arange(size) / size)
    angle = rng.uniform(0, 2 * np.pi)
    depth = 0.4 * (x * np.cos(angle) + y * np.sin(angle))
    for share, strength in ((0.15, 0.25), (0.05, 0.1)):
        blotches = ndimage.gaussian_filter(rng.normal(size=(size, size)), share * size)
        depth += strength * blotches / blotches.std()
    return depth - depth.min()


def _place(rng: np.random.Generator, bodies: list[Body], size: int) -> Body | None:
    """An object that leaves enough of each other object uncovered, and enough of itself."""
    for _ in range(20):
        kind = str(rng.choice(_KINDS))
        radius = size * 0.08 * (0.26 / 0.08) ** rng.random()
        centre = rng.uniform(0, size, 2)
        if bodies and rng.random() < _TOGETHER:
            other = bodies[rng.integers(len(bodies))].thing
            centre = other.centre + rng.normal(0, 0.6, 2) * (radius + other.radius)
        turn = rng.uniform(-180, 180)
        body = _body(
            Thing(
                kind, "grey", "solid", (float(centre[0]), float(centre[1])), radius, turn, (0, 0, 0)
            ),
            size,
        )
        areas = [b.cover > 0.5 for b in (*bodies, body)]
        if areas[-1].sum() < 0.6 * radius**2:
            continue  # mostly outside the picture
        layers = np.sum(areas, 0)
        if all((layers[area] == 1).mean() >= _FREE for area in areas):
            return body
    return None


def _body(thing: Thing, size: int) -> Body:
    canvas = Image.new("L", (size * _FINE, size * _FINE))
    # PIL counts pixel centres, polygons here count edges: hence the half pixel.
    corners = [tuple(p) for p in (outline(thing) * _FINE - 0.5).tolist()]
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    fine = np.asarray(canvas, np.float64) / 255
    return Body(thing, fine.reshape(size, _FINE, size, _FINE).mean((1, 3)))


def _write_picture(
    folder: Path, number: int, *, seed: tuple[int, ...], size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    values, bodies = draw_xray(seed, number, size)
    name = f"{number:05d}.png"
    Image.fromarray(values).save(folder / name)
    image = {"id": number, "file_name": name, "width": size, "height": size}
    annotations = []
    for body in bodies:
        rle = rle_codec.encode(np.asfortranarray(body.cover >= 0.5))
        annotations.append(
            {
                "image_id": number,
                "category_id": 1 + _KINDS.index(body.thing.shape),
                "bbox": rle_codec.toBbox(rle).tolist(),
                "area": int(rle_codec.area(rle)),
                "iscrowd": 0,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
        )
    return image, annotations
