"""Videos annotated in files beside their frames: palette PNG (DAVIS, MOSE, YouTube-VOS), MOT."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

from sam3jax.data.boxes import place_box
from sam3jax.data.coco import Annotation, load_json
from sam3jax.data.folders import entries, is_hidden, names_of
from sam3jax.data.frames import FrameFiles, by_number, frame_files
from sam3jax.data.ids import Ids
from sam3jax.data.ledger import Ledger, shown
from sam3jax.data.names import phrase_key, visible
from sam3jax.data.numbers import number, whole
from sam3jax.data.pictures import BROKEN, DataError, stored_values
from sam3jax.data.video_json import OBJECT
from sam3jax.data.videos import (
    NOT_ANNOTATED,
    VOID,
    FrameLabels,
    Video,
    VideoDataset,
    annotation_of_mask,
)

Category = Callable[[int], int]  # of an object's number


def read_masks(root: Path, split: str | None = None) -> VideoDataset:
    """JPEGImages/VIDEO/*.jpg with Annotations/VIDEO/*.png, the pixel value the object, 255 void.

    A frame without a PNG is not annotated, which is not empty. Annotations/VIDEO/OBJECT/*.png (SA-V):
    one folder an object. meta.json (YouTube-VOS) names categories; without it all are "object".
    """
    pictures, masks = _resolution(root / "JPEGImages"), _resolution(root / "Annotations")
    names = listed_videos(root, split) or [p.name for p in entries(pictures) if p.is_dir()]
    meta = load_json(root / "meta.json") if (root / "meta.json").is_file() else {}
    categories: dict[str, tuple[int, str]] = {}  # by what the model reads
    ledger = Ledger()
    videos = []
    for place, name in enumerate(names):
        files = frame_files(pictures / name) if (pictures / name).is_dir() else []
        if not files:
            raise DataError(f"video {shown(name)} has no frame in {pictures / name}")
        frames = FrameFiles(files)
        if not (masks / name).is_dir():
            ledger.add("video left out: no folder in Annotations", name)
            continue
        phrases = _phrases(meta, name, ledger)

        def category(i: int, phrases: dict[int, str] = phrases) -> int:
            phrase = phrases.get(i, OBJECT)
            key = phrase_key(phrase)
            return categories.setdefault(key, (len(categories) + 1, phrase))[0]

        if any(p.is_dir() for p in entries(masks / name)):
            labels = _by_object(masks / name, frames, category, ledger)
        else:
            labels = _palette(masks / name, frames, category, ledger)
        videos.append(Video(place, name, frames, labels))
    if not videos:
        raise DataError(f"no video of {root} has masks in {masks}")
    return VideoDataset(str(root), tuple(videos), dict(categories.values()), ledger)


def _phrases(meta: Any, name: str, ledger: Ledger) -> dict[int, str]:
    """Object -> category of a video, from YouTube-VOS's meta.json."""
    for key in ("videos", name, "objects"):
        meta = meta.get(key) if isinstance(meta, dict) else None
    found: dict[int, str] = {}
    for key, value in meta.items() if isinstance(meta, dict) else ():
        phrase = value.get("category") if isinstance(value, dict) else value
        object_id = whole(key)
        if object_id is None or not isinstance(phrase, str) or not phrase_key(phrase):
            ledger.add("object of meta.json has no number or no category (called object)", name, key, value)  # fmt: skip
        else:
            found[object_id] = visible(phrase).strip()
    return found


def read_indices(file: Path, width: int, height: int) -> np.ndarray:
    """Object numbers [Y, X] of a mask file. Raises DataError."""
    try:
        with Image.open(file) as image:
            values = stored_values(image)
    except BROKEN as error:
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
    return values.astype(np.int64)


def _palette(folder: Path, frames: FrameFiles, category: Category, ledger: Ledger) -> tuple:
    by_stem = _masks_of(folder, frames, ledger)
    files = [by_stem.get(f.stem) for f in frames.files]
    if not any(files):
        raise DataError(
            f"no mask (PNG) in {folder} has the name of a frame of {frames.files[0].parent}"
        )
    read = lambda f: None if f is None else read_indices(f, frames.width, frames.height)
    with ThreadPoolExecutor(4) as pool:
        indices = list(pool.map(read, files))
    values = set().union(*(np.unique(i).tolist() for i in indices if i is not None))
    binary = values <= {0, VOID} and VOID in values  # DAVIS 2016: there 255 is the object
    if binary:
        ledger.add("video whose masks hold 0 and 255 only: 255 is taken for object 1", folder.name)
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


def _by_object(folder: Path, frames: FrameFiles, category: Category, ledger: Ledger) -> tuple:
    """A folder of masks for each object; a frame that any of them has is annotated."""
    found: dict[str, list[Annotation]] = defaultdict(list)
    seen: set[str] = set()
    parts = sorted((p for p in entries(folder) if p.is_dir()), key=by_number)
    ids = Ids(part.name for part in parts)
    for part in parts:
        object_id = ids.find(part.name)
        assert object_id is not None  # a folder's name names something
        for stem, file in _masks_of(part, frames, ledger).items():
            seen.add(stem)
            mask = read_indices(file, frames.width, frames.height) > 0
            annotation = annotation_of_mask(mask, object_id, category(object_id))
            if annotation is not None:
                found[stem].append(annotation)
    return tuple(
        FrameLabels(tuple(found[f.stem])) if f.stem in seen else NOT_ANNOTATED for f in frames.files
    )


def _masks_of(folder: Path, frames: FrameFiles, ledger: Ledger) -> dict[str, Path]:
    """Stem -> mask file of a frame."""
    known = {f.stem for f in frames.files}
    files = {f.stem: f for f in entries(folder) if f.suffix.lower() == ".png"}
    for stem in sorted(files.keys() - known):
        ledger.add("mask without a frame of its name (left out)", f"{folder.name}/{files[stem].name}")  # fmt: skip
    return {stem: file for stem, file in files.items() if stem in known}


def mot_folders(root: Path) -> list[Path]:
    """Folders of MOT videos below (or at) `root`."""
    places = [root, *(p for p in entries(root) if p.is_dir())]
    return [p for p in places if (p / "gt" / "gt.txt").is_file() and (p / "img1").is_dir()]


def read_mot(root: Path, folders: list[Path]) -> VideoDataset:
    """gt.txt: frame (from 1), object, left, top, width, height, considered, class, visibility."""
    videos, ledger = [], Ledger()
    categories: set[int] = set()
    for place, folder in enumerate(folders):
        frames = FrameFiles(frame_files(folder / "img1"), 30.0)
        found: list[dict[int, Annotation]] = [{} for _ in range(len(frames))]
        file = folder / "gt" / "gt.txt"
        text = file.read_text("utf-8-sig", "replace")
        for line, row in enumerate(filter(str.strip, text.split("\n")), 1):
            where = (f"{folder.name}/gt.txt", line)
            values = [number(v) for v in row.replace(",", " ").split()]
            numbers = [v for v in values[:6] if v is not None]
            if len(numbers) < 6 or not (numbers[0].is_integer() and numbers[1].is_integer()):
                ledger.add("row left out: not a frame, an object and its box", *where, row)
                continue
            frame, object_id = int(numbers[0]) - 1, int(numbers[1])
            if not 0 <= frame < len(frames) or values[6:7] == [0]:
                ledger.add("row left out: not to be considered, or no such frame", *where)
                continue
            stated = (numbers[2], numbers[3], numbers[4], numbers[5])
            box, _ = place_box(stated, None, frames.width, frames.height, ledger, (*where, row))
            if box is None:
                continue
            if object_id in found[frame]:
                ledger.add("row left out: its object is in that frame already", *where)
                continue
            kind = values[7] if len(values) > 7 else None
            category = max(int(kind or 1), 1)
            categories.add(category)
            found[frame][object_id] = Annotation(object_id, category, box, None, False, box[2] * box[3])  # fmt: skip
        labels = tuple(FrameLabels(tuple(a.values())) for a in found)
        videos.append(Video(place, folder.name, frames, labels))
    if not categories:
        raise DataError(
            f"{root}: no row of gt.txt can be used (for example {ledger.examples('', 2)}): expected frame, "
            f"object, left, top, width, height, considered, class, visibility"
        )
    names = {i: "pedestrian" if i == 1 else f"class {i}" for i in sorted(categories)}
    return VideoDataset(str(root), tuple(videos), names, ledger)


def _resolution(folder: Path) -> Path:
    """DAVIS keeps a folder for each resolution between: the one of 480 lines, else the first."""
    for name in ("480p", "Full-Resolution", "1080p"):
        if (folder / name).is_dir():
            return folder / name
    return folder


def listed_videos(root: Path, split: str | None) -> list[str]:
    """Names in ImageSets/**/SPLIT.txt; [] where nothing lists any. DAVIS 2016 lists frames, not videos.

    Raises DataError where other splits are listed only.
    """
    files = sorted(f for f in (root / "ImageSets").rglob("*.txt") if not is_hidden(f))
    own = [f for f in files if split and f.stem in names_of(split)]
    if not own:
        if files and split:
            found = ", ".join(sorted({f.stem for f in files}))
            raise DataError(
                f"{root / 'ImageSets'} lists no split {split!r}, it lists {found}: set data.train_split or "
                f"data.valid_split"
            )
        return []
    lines = own[-1].read_text("utf-8-sig", "replace").split("\n")
    names = [Path(words[0]).parent.name if "." in words[0] else words[0] for line in lines if (words := line.split())]  # fmt: skip
    if bad := [name for name in names if name != Path(name).name or not name]:
        raise DataError(f"{own[-1]} names {shown(bad[0])}, which is no folder of frames")
    return list(dict.fromkeys(names))
