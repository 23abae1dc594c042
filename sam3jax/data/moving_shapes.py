"""Generated videos of coloured shapes that move, cover one another, enter and leave.

The scene of a picture (`shapes.draw_scene`) is one moment of a video; before and after it each object
goes its own way. Groups of phrases are those of `shapes`. Annotated is what remains visible of an
object; where too little remains it is absent (null in the YT-VIS JSON). Video k follows from (seed,
k) alone; a data set is written once into the cache.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

from sam3jax.config import DataConfig
from sam3jax.data.pictures import DataError
from sam3jax.data.shape_pictures import SHAPES, Thing, draw, draw_background, outline
from sam3jax.data.shapes import GROUPS, Group, draw_scene, written_once
from sam3jax.data.video_json import read_json
from sam3jax.data.videos import VideoDataset
from sam3jax.files import cache_folder

_VERSION = 1  # of the drawing: another one means other videos under the same seed
_SPLITS = ("train", "valid", "test")
_SPEED = 0.045  # of the picture's shorter edge, at most, per frame
_STILL = 0.2  # share of objects that stay where they are
_LEAVING = 0.3  # share of objects that enter or leave
_SPIN = 9.0  # degrees per frame, at most
_LEAST = 0.15  # share of its area, and pixels, that an object must show to be there
_LEAST_PIXELS = 16
_RATE = 8  # frames per second, for players


def moving_shapes_dataset(split: str, config: DataConfig, frames: int) -> VideoDataset:
    """The generated videos of a split (train, valid or test), written to the cache if need be.

    data.shapes_train and data.shapes_valid count videos here; frames: of each.
    """
    if split not in _SPLITS:
        raise DataError(
            f"the generated videos have no split {split!r}, they have {', '.join(_SPLITS)}: set "
            f"data.train_split or data.valid_split"
        )
    videos = config.shapes_train if split == "train" else config.shapes_valid
    size, seed, group = config.shapes_size, config.shapes_seed, config.shapes_concepts
    name = f"{group}-{size}px-seed{seed}-{split}{videos}x{frames}"
    folder = cache_folder() / f"moving-shapes-v{_VERSION}" / name
    if not folder.is_dir():
        write_moving_shapes(
            folder,
            seed=(seed, _SPLITS.index(split)),
            videos=videos,
            frames=frames,
            concepts=group,
            size=size,
        )
    return read_json(folder / "instances.json")


def write_moving_shapes(
    folder: str | Path,
    *,
    seed: int | tuple[int, ...],
    videos: int,
    frames: int,
    concepts: str = "basic",
    size: int = 256,
) -> None:
    """Write JPEGImages/VIDEO/FRAME.png and instances.json (YT-VIS), all or nothing.

    concepts: a key of shapes.GROUPS; size: the longer edge in pixels. Raises DataError.
    """
    folder = Path(folder)
    seeds = (seed,) if isinstance(seed, int) else tuple(seed)
    group = GROUPS[concepts]
    with written_once(folder) as beside:
        write = partial(_write_video, beside, seeds=seeds, group=group, frames=frames, size=size)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            written = list(pool.map(write, range(videos)))
        raw = _ytvis(written, group, f"{concepts}, seed {seeds}, version {_VERSION}")
        (beside / "instances.json").write_text(json.dumps(raw))


def draw_video(
    seeds: tuple[int, ...], number: int, group: Group, frames: int, size: int
) -> tuple[np.ndarray, list[Thing], np.ndarray]:
    """Video `number`: frames [F, Y, X, 3], its objects, their visible parts [F, n, Y, X] bool."""
    picture, things, _ = draw_scene(seeds, number, group, size)
    height, width = picture.shape[:2]
    rng = np.random.default_rng((_VERSION, 1, *seeds, number))
    background = draw_background(rng, width, height)
    paths = [_path(rng, thing, frames, (width, height)) for thing in things]
    shown = [draw([path[t] for path in paths], background) for t in range(frames)]
    visible = np.stack([parts for _, parts, _ in shown])
    for k, thing in enumerate(things):
        least = max(_LEAST * _area(thing), _LEAST_PIXELS)
        visible[visible[:, k].sum((1, 2)) < least, k] = False
    return np.stack([pixels for pixels, _, _ in shown]), things, visible


def _path(
    rng: np.random.Generator, thing: Thing, frames: int, size: tuple[int, int]
) -> list[Thing]:
    """The object on each frame: straight on at one speed, turning as far as its name allows.

    size: width, height. Some stay where they are; some go out of the picture, or come in.
    """
    centre, edge = np.array(thing.centre), min(size)
    kind, forth = rng.random(), rng.random() < 0.5
    moment = rng.uniform(0, frames - 1)  # at which it is where the scene has it
    angle, speed = rng.uniform(0, 2 * np.pi), edge * _SPEED * np.sqrt(rng.random())
    spin = rng.uniform(-_SPIN, _SPIN)
    if kind < _STILL:
        speed = 0.0
    elif kind < _STILL + _LEAVING:
        # Straight to the nearest edge, out of sight when two thirds of the video are over.
        ways = [centre[0], centre[1], size[0] - centre[0], size[1] - centre[1]]
        nearest = int(np.argmin(ways))
        angle = np.pi * (1 + nearest / 2) + rng.uniform(-0.3, 0.3)
        speed = (ways[nearest] + 1.2 * thing.radius) / (0.65 * frames)
        moment = 0.0
        if not forth:
            speed, moment = -speed, frames - 1.0
    widest = SHAPES[thing.shape][1]
    out = []
    for t in range(frames):
        there = centre + speed * (t - moment) * np.array([np.cos(angle), np.sin(angle)])
        turn = thing.turn + spin * (t - moment)
        turn = turn if widest >= 180 else float(np.clip(turn, -widest, widest))
        out.append(replace(thing, centre=(float(there[0]), float(there[1])), turn=turn))
    return out


def _area(thing: Thing) -> float:
    x, y = outline(thing).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _write_video(
    folder: Path, number: int, *, seeds: tuple[int, ...], group: Group, frames: int, size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write the frames; the video's entry and its annotations (without ids)."""
    pixels, things, visible = draw_video(seeds, number, group, frames, size)
    name = f"{number:05d}"
    place = folder / "JPEGImages" / name
    place.mkdir(parents=True)
    files = [f"{name}/{t:05d}.png" for t in range(frames)]
    for file, frame in zip(files, pixels, strict=True):
        Image.fromarray(frame).save(folder / "JPEGImages" / file, compress_level=1)
    height, width = pixels.shape[1:3]
    entry = {
        "id": number, "width": width, "height": height, "length": frames, "fps": _RATE,
        "file_names": files,
    }  # fmt: skip
    annotations = []
    for k, thing in enumerate(things):
        masks = [_rle(visible[t, k]) for t in range(frames)]
        if not any(masks):
            continue
        boxes = [None if m is None else rle_codec.toBbox(m).tolist() for m in masks]
        for category, concept in enumerate(group.concepts, 1):
            if concept.answered_by(thing):
                annotations.append(
                    {
                        "video_id": number, "category_id": category, "iscrowd": 0,
                        "segmentations": masks, "bboxes": boxes,
                    }
                )  # fmt: skip
    return entry, annotations


def _rle(mask: np.ndarray) -> dict[str, Any] | None:
    if not mask.any():
        return None
    rle = rle_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _ytvis(
    written: list[tuple[dict[str, Any], list[dict[str, Any]]]], group: Group, description: str
) -> dict[str, Any]:
    annotations = [a for _, found in written for a in found]
    return {
        "info": {"description": f"sam3jax moving shapes: {description}", "version": str(_VERSION)},
        "categories": [
            {"id": k, "name": concept.phrase} for k, concept in enumerate(group.concepts, 1)
        ],
        "videos": [entry for entry, _ in written],
        "annotations": [{"id": k, **entry} for k, entry in enumerate(annotations, 1)],
    }
