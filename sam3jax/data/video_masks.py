"""Videos annotated in files beside their frames: palette PNG (DAVIS, MOSE, YouTube-VOS), MOT."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

from sam3jax.data.coco import Annotation, load_json
from sam3jax.data.folders import PICTURES
from sam3jax.data.frames import FrameFiles, by_number
from sam3jax.data.pictures import DataError
from sam3jax.data.video_json import OBJECT
from sam3jax.data.videos import (
    NOT_ANNOTATED,
    VOID,
    FrameLabels,
    Video,
    VideoDataset,
    annotation_of_mask,
)


def read_masks(root: Path, split: str | None = None) -> VideoDataset:
    """JPEGImages/VIDEO/*.jpg with Annotations/VIDEO/*.png, the pixel value the object, 255 void.

    A frame without a PNG is not annotated, which is not empty. Annotations/VIDEO/OBJECT/*.png (SA-V):
    one folder an object. meta.json (YouTube-VOS) names categories; without it all are "object".
    """
    pictures, masks = _resolution(root / "JPEGImages"), _resolution(root / "Annotations")
    names = _listed(root, split) or [p.name for p in sorted(pictures.iterdir()) if p.is_dir()]
    meta = load_json(root / "meta.json") if (root / "meta.json").is_file() else {}
    categories: dict[str, int] = {}
    problems: Counter[str] = Counter()
    videos = []
    for number, name in enumerate(names):
        files = [f for f in (pictures / name).glob("*") if f.suffix.lower() in PICTURES]
        if not files:
            raise DataError(f"video {name} has no frame in {pictures / name}")
        frames = FrameFiles(sorted(files, key=by_number))
        if not (masks / name).is_dir():
            problems["video left out: no folder in Annotations"] += 1
            continue
        known = (meta.get("videos", {}).get(name) or {}).get("objects", {})
        phrases = {int(k): str(v.get("category", OBJECT)) for k, v in known.items()}
        category = lambda i, phrases=phrases: categories.setdefault(
            phrases.get(i, OBJECT), len(categories) + 1
        )
        if any(p.is_dir() for p in (masks / name).iterdir()):
            labels = _by_object(masks / name, frames, category)
        else:
            labels = _palette(masks / name, frames, category, problems)
        videos.append(Video(number, name, frames, labels))
    if not videos:
        raise DataError(f"no video of {root} has masks in {masks}")
    return VideoDataset(
        str(root), tuple(videos), {i: n for n, i in categories.items()}, dict(problems)
    )


def read_indices(file: Path, width: int, height: int) -> np.ndarray:
    """Object numbers [Y, X] of a mask file. Raises DataError."""
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"mask {file} cannot be read ({error}): replace the file") from error
    if image.size != (width, height):
        raise DataError(
            f"mask {file} is {image.size[0]} x {image.size[1]} pixels, its frame {width} x {height}: "
            f"export frames and masks together"
        )
    if image.mode not in ("P", "L", "1", "I;16", "I"):  # colours are not object numbers
        raise DataError(
            f"mask {file} is in colour ({image.mode}), expected a palette or grey PNG whose values are "
            f"object numbers: save it without converting it to RGB"
        )
    return np.asarray(image).astype(np.int64)


def _palette(folder: Path, frames: FrameFiles, category, problems: Counter) -> tuple:
    by_stem = {f.stem: f for f in folder.glob("*.png")}
    unknown = set(by_stem) - {f.stem for f in frames.files}
    if unknown:
        problems["mask without a frame of its name (left out)"] += len(unknown)
    files = [by_stem.get(f.stem) for f in frames.files]
    if not any(files):
        raise DataError(f"no mask in {folder} has the name of a frame of {frames.files[0].parent}")
    read = lambda f: None if f is None else read_indices(f, frames.width, frames.height)
    with ThreadPoolExecutor(4) as pool:
        indices = list(pool.map(read, files))
    values = set().union(*(np.unique(i).tolist() for i in indices if i is not None))
    binary = values <= {0, VOID} and VOID in values  # DAVIS 2016: there 255 is the object
    if binary:
        problems["video whose masks hold 0 and 255 only: 255 is taken for object 1"] += 1
    labels = []
    for index in indices:
        if index is None:
            labels.append(NOT_ANNOTATED)
            continue
        index = np.where(index == VOID, 1, index) if binary else index
        objects = [int(i) for i in np.unique(index) if i not in (0, VOID)]
        found = [annotation_of_mask(index == i, i, category(i)) for i in objects]
        void = index == VOID
        rle = rle_codec.encode(np.asfortranarray(void.astype(np.uint8))) if void.any() else None
        labels.append(FrameLabels(tuple(a for a in found if a is not None), void=rle))
    return tuple(labels)


def _by_object(folder: Path, frames: FrameFiles, category) -> tuple:
    """A folder of masks for each object; a frame that any of them has is annotated."""
    found: dict[str, list[Annotation]] = defaultdict(list)
    seen: set[str] = set()
    for part in sorted((p for p in folder.iterdir() if p.is_dir()), key=by_number):
        object_id = int(part.name) if part.name.isdigit() else len(seen) + 1
        for file in part.glob("*.png"):
            seen.add(file.stem)
            mask = read_indices(file, frames.width, frames.height) > 0
            annotation = annotation_of_mask(mask, object_id, category(object_id))
            if annotation is not None:
                found[file.stem].append(annotation)
    return tuple(
        FrameLabels(tuple(found[f.stem])) if f.stem in seen else NOT_ANNOTATED for f in frames.files
    )


def mot_folders(root: Path) -> list[Path]:
    """Folders of MOT videos below (or at) `root`."""
    places = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
    return [p for p in places if (p / "gt" / "gt.txt").is_file() and (p / "img1").is_dir()]


def read_mot(root: Path, folders: list[Path]) -> VideoDataset:
    """gt.txt: frame (from 1), object, left, top, width, height, considered, class, visibility."""
    videos, problems = [], Counter[str]()
    categories: set[int] = set()
    for number, folder in enumerate(folders):
        files = [f for f in (folder / "img1").iterdir() if f.suffix.lower() in PICTURES]
        frames = FrameFiles(sorted(files, key=by_number), 30.0)
        found: list[list[Annotation]] = [[] for _ in range(len(frames))]
        with (folder / "gt" / "gt.txt").open() as stream:
            for row in csv.reader(stream):
                values = [float(v) for v in row]
                frame, object_id, considered = (
                    int(values[0]) - 1,
                    int(values[1]),
                    values[6:7] != [0],
                )
                if not 0 <= frame < len(frames) or not considered:
                    problems["row left out: not to be considered, or no such frame"] += 1
                    continue
                category = max(int(values[7]), 1) if len(values) > 7 else 1
                left, top = max(values[2], 0.0), max(values[3], 0.0)
                right = min(values[2] + values[4], frames.width)
                bottom = min(values[3] + values[5], frames.height)
                if right <= left or bottom <= top:
                    problems["row left out: box outside the frame"] += 1
                    continue
                categories.add(category)
                box = (left, top, right - left, bottom - top)
                area = box[2] * box[3]
                found[frame].append(Annotation(object_id, category, box, None, False, area))
        labels = tuple(FrameLabels(tuple(a)) for a in found)
        videos.append(Video(number, folder.name, frames, labels))
    names = {i: "pedestrian" if i == 1 else f"class {i}" for i in sorted(categories)}
    return VideoDataset(str(root), tuple(videos), names, dict(problems))


def _resolution(folder: Path) -> Path:
    """DAVIS keeps a folder for each resolution between: the one of 480 lines, else the first."""
    for name in ("480p", "Full-Resolution", "1080p"):
        if (folder / name).is_dir():
            return folder / name
    return folder


def _listed(root: Path, split: str | None) -> list[str]:
    """Names in ImageSets/**/SPLIT.txt, if there is such a file."""
    files = sorted((root / "ImageSets").rglob(f"{split}.txt")) if split else []
    return files[-1].read_text().split() if files else []
