"""Small COCO folders that tests write, tidy or awkward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3jax.data.shapes import write_shapes

BOTTLES = Path(__file__).parents[1] / ".." / "shared" / "data" / "bottles"


def picture(file: Path, width: int, height: int, seed: int = 0, **options: Any) -> None:
    """A smooth coloured picture: no two places look alike."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    file.parent.mkdir(parents=True, exist_ok=True)
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, **options)


def polygon(x: float, y: float, w: float, h: float) -> list[float]:
    """An octagon that touches all four sides of the box."""
    u, v = w / 4, h / 4
    return [
        *(x + u, y, x + w - u, y, x + w, y + v, x + w, y + h - v),
        *(x + w - u, y + h, x + u, y + h, x, y + h - v, x, y + v),
    ]


def annotation(id: int, image: int, category: int, box: tuple, **more: Any) -> dict[str, Any]:
    x, y, w, h = box
    return {
        "id": id,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [polygon(x, y, w, h)],
        **more,
    }


def write(
    folder: Path,
    annotations: list[dict],
    *,
    images: int | list[dict] = 3,
    categories: tuple[str, ...] = ("things", "red cup", "blue cup", "dog"),
    size: tuple[int, int] = (60, 40),
    name: str = "_annotations.coco.json",
    pictures: bool = True,
) -> Path:
    """Pictures (ids from 0) and their JSON in one folder; category 0 is Roboflow's unused one."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(images, int):
        images = [
            {"id": k, "file_name": f"{k}.png", "width": size[0], "height": size[1]}
            for k in range(images)
        ]
    if pictures:
        for k, image in enumerate(images):
            picture(folder / image["file_name"], image["width"], image["height"], seed=k)
    coco = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": n} for k, n in enumerate(categories)],
    }
    (folder / name).write_text(json.dumps(coco))
    return folder


def write_small_shapes(folder: Path, **splits: int) -> Path:
    """The basic generated shapes at 96 pixels: so many pictures of each split, one seed a split."""
    for seed, (split, pictures) in enumerate(splits.items()):
        write_shapes(folder / split, seed=seed, pictures=pictures, concepts="basic", size=96)
    return folder
