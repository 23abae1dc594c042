"""Videos annotated in JSON: YT-VIS and SA-Co (one file), SA-V (one file a film)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3jax.data.coco import Annotation, load_json
from sam3jax.data.folders import PICTURES
from sam3jax.data.frames import Film, FrameFiles, by_number
from sam3jax.data.ledger import Ledger
from sam3jax.data.pictures import DataError
from sam3jax.data.segmentations import read_segmentation
from sam3jax.data.videos import (
    NOT_ANNOTATED,
    FrameLabels,
    Video,
    VideoDataset,
    annotation_of_rle,
)

_SAV_STRIDE = 4  # annotations at 6 frames per second of films at 24
OBJECT = "object"  # the phrase of data without categories


def read_json(file: Path, split: str | None = None) -> VideoDataset:
    """YT-VIS: `videos` (file_names), `annotations` (one an object: segmentations, null = absent).

    A `noun_phrase` of an annotation goes before its category's name. `video_np_pairs` (SA-Co) are
    what is known of each video: pairs without an object are its negatives, other phrases unknown.
    """
    raw = load_json(file)
    wanted = ("videos", "annotations", "categories")
    missing = [k for k in wanted if not isinstance(raw, dict) or not isinstance(raw.get(k), list)]
    if missing:
        found = ", ".join(list(raw)[:6]) if isinstance(raw, dict) else type(raw).__name__
        raise DataError(
            f"{file} is not a video data set: no list `{'`, `'.join(missing)}` (found: {found}); "
            f"expected YT-VIS, with `videos`, `annotations` and `categories`"
        )
    problems: Counter[str] = Counter()
    names = {c["id"]: str(c["name"]).strip() for c in raw["categories"]}
    first = {}
    merged = {i: first.setdefault(name, i) for i, name in names.items()}
    by_video: dict[Any, list[dict]] = defaultdict(list)
    for item in raw["annotations"]:
        by_video[item.get("video_id")].append(item)
    pairs: dict[Any, set[int]] = defaultdict(set)
    for pair in raw.get("video_np_pairs") or ():
        asked = pairs[pair["video_id"]]
        if (category := _phrase_id(pair, merged, first, names)) is not None:
            asked.add(category)
    videos: list[Video] = []
    for entry in raw["videos"]:
        frames = _frames(entry, file, split)
        labels = _labels(by_video.pop(entry["id"], []), frames, merged, first, names, problems)
        known = pairs.get(entry["id"])
        if known is None and "neg_category_ids" in entry:
            known = {merged[i] for i in entry["neg_category_ids"] if i in merged}
        videos.append(
            Video(
                id=entry["id"],
                name=_name(entry),
                frames=frames,
                labels=labels,
                negative_ids=None if known is None else frozenset(known),
                not_exhaustive_ids=frozenset(
                    merged[i] for i in entry.get("not_exhaustive_category_ids") or () if i in merged
                ),
            )
        )
    if by_video:
        problems["object left out: its video is not listed"] += sum(map(len, by_video.values()))
    if not videos:
        raise DataError(f"{file} lists no video: export the videos together with their frames")
    own = {i: name for i, name in names.items() if first[name] == i}
    return VideoDataset(str(file), tuple(videos), own, dict(problems))


def read_sav(root: Path) -> VideoDataset:
    """SA-V: FILM_manual.json, RLE of every 4th frame, beside FILM.mp4 or a folder of frames."""
    videos, problems = [], Counter[str]()
    for number, file in enumerate(sorted(root.glob("*_manual.json"), key=by_number)):
        raw, name = load_json(file), file.name.removesuffix("_manual.json")
        films = [p for p in (root / f"{name}.mp4", root / name) if p.exists()]
        if not films:
            raise DataError(f"{file} has no {name}.mp4 beside it: put films and JSON together")
        frames = Film(films[0]) if films[0].is_file() else _folder(films[0])
        ids = raw.get("masklet_id") or list(range(raw.get("masklet_num", 0)))
        labels = [NOT_ANNOTATED] * len(frames)
        for step, masks in enumerate(raw["masklet"]):
            if step * _SAV_STRIDE >= len(frames):
                problems["annotated frame behind the film's end (left out)"] += 1
                continue
            found = []
            for object_id, value in zip(ids, masks):
                rle, extent, _ = read_segmentation(value, frames.width, frames.height, Ledger())
                if isinstance(rle, Mapping) and extent is not None:
                    found.append(annotation_of_rle(rle, int(object_id), 1))
            labels[step * _SAV_STRIDE] = FrameLabels(tuple(found))
        videos.append(Video(number, name, frames, tuple(labels)))
    return VideoDataset(str(root), tuple(videos), {1: OBJECT}, dict(problems))


def _labels(
    items: list[dict],
    frames: FrameFiles | Film,
    merged: Mapping[int, int],
    first: dict[str, int],
    names: dict[int, str],
    problems: Counter[str],
) -> tuple[FrameLabels, ...]:
    """null is "not in this frame": the frame is annotated, the object's slot stays."""
    found: list[list[Annotation]] = [[] for _ in range(len(frames))]
    for number, item in enumerate(items):
        category = _phrase_id(item, merged, first, names)
        if category is None:
            problems["object left out: its category is not listed"] += 1
            continue
        masks = item.get("segmentations") or [None] * len(frames)
        boxes = item.get("bboxes") or [None] * len(frames)
        if len(masks) != len(frames) or len(boxes) != len(frames):
            problems["object left out: not one entry for each frame"] += 1
            continue
        object_id = int(item.get("object_id", number + 1))
        for k, (mask, box) in enumerate(zip(masks, boxes)):
            annotation = _one(mask, box, object_id, category, item, frames, problems)
            if annotation is not None:
                found[k].append(annotation)
    return tuple(FrameLabels(tuple(a)) for a in found)


def _one(
    mask: Any, box: Any, object_id: int, category: int, item: dict,
    frames: FrameFiles | Film, problems: Counter[str],
) -> Annotation | None:  # fmt: skip
    crowd = bool(item.get("iscrowd", 0))
    ledger = Ledger()
    rle, extent, _ = read_segmentation(mask, frames.width, frames.height, ledger)
    problems.update(dict(ledger))
    if isinstance(rle, Mapping):
        return annotation_of_rle(rle, object_id, category, crowd)
    if extent is not None:  # polygons
        left, top = max(extent[0], 0.0), max(extent[1], 0.0)
        right, bottom = min(extent[2], frames.width), min(extent[3], frames.height)
        if right <= left or bottom <= top:
            problems["object left out: its mask lies outside the frame"] += 1
            return None
        size = (left, top, right - left, bottom - top)
        return Annotation(object_id, category, size, rle, crowd, size[2] * size[3])
    if mask or not box or len(box) != 4 or min(box[2:]) <= 0:
        return None
    problems["object with a box and no mask in a frame (its box still trains)"] += 1
    left, top, width, height = (float(v) for v in box)
    size = (left, top, width, height)
    return Annotation(object_id, category, size, None, crowd, size[2] * size[3])


def _phrase_id(
    item: dict, merged: Mapping[Any, int], first: dict[str, int], names: dict[int, str]
) -> int | None:
    """The category that an object answers; a phrase of its own becomes a category of its own."""
    phrase = str(item.get("noun_phrase") or "").strip()
    if not phrase:
        return merged.get(item.get("category_id"))
    if phrase not in first:
        first[phrase] = max((*names, 0)) + 1
        names[first[phrase]] = phrase
    return first[phrase]


def _frames(entry: dict, file: Path, split: str | None) -> FrameFiles | Film:
    listed = entry.get("file_names")
    if not listed:
        raise DataError(f"{file}: video {entry.get('id')!r} lists no frame (`file_names`)")
    tops = [
        file.parent,
        *(file.parent.parent / s for s in (split, file.stem) if s),
        file.parent.parent,
    ]
    folders = [
        t / sub if sub else t for t in tops for sub in ("JPEGImages", "", "images", "frames")
    ]
    for folder in folders:
        if (folder / listed[0]).is_file():
            files = [folder / name for name in listed]
            missing = [f for f in files if not f.is_file()]
            if missing:
                raise DataError(
                    f"{len(missing)} of {len(files)} frames of video {_name(entry)} are missing, the "
                    f"first is {missing[0]}: put them there, or take the video out of the JSON"
                )
            frames = FrameFiles(files, float(entry.get("fps") or entry.get("frame_rate") or 10.0))
            size = (entry.get("width"), entry.get("height"))
            if all(size) and size != (frames.width, frames.height):
                raise DataError(
                    f"video {_name(entry)} has frames of {frames.width} x {frames.height} pixels, its "
                    f"annotations are for {size[0]} x {size[1]}: export them together"
                )
            return frames
    raise DataError(
        f"frame {listed[0]} of {file} is not beside it: looked in "
        f"{', '.join(str(f) for f in folders[:3])}"
    )


def _folder(path: Path) -> FrameFiles:
    files = [f for f in path.iterdir() if f.suffix.lower() in PICTURES]
    return FrameFiles(sorted(files, key=by_number), 24.0)


def _name(entry: dict) -> str:
    listed = entry.get("file_names") or [""]
    return str(
        entry.get("name") or entry.get("video_name") or Path(listed[0]).parent or entry["id"]
    )
