"""Videos annotated in JSON: YT-VIS and SA-Co (one file), SA-V (one file a film)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3jax.data.boxes import BoxJudge, parse_box, place_box
from sam3jax.data.coco import Annotation, load_json
from sam3jax.data.finder import Finder
from sam3jax.data.folders import entries
from sam3jax.data.frames import Film, FrameFiles, by_number, frame_files
from sam3jax.data.ids import Ids
from sam3jax.data.judgements import judge_crowds
from sam3jax.data.ledger import DataError, Ledger, shown
from sam3jax.data.names import phrase_key, read_categories, visible
from sam3jax.data.numbers import flag, number, whole
from sam3jax.data.segmentations import Extent, Polygons, Rle, read_segmentation, segmentation_area
from sam3jax.data.videos import (
    NOT_ANNOTATED,
    FrameLabels,
    Video,
    VideoDataset,
    annotation_of_rle,
)

_SAV_STRIDE = 4  # annotations at 6 frames per second of films at 24
_SAV_RATE = 24.0  # frames per second of SA-V
_RATE = 10.0  # frames per second where nothing says it
_LEFT_OUT = "object left out"
_EMPTY = "mask left out: RLE without a pixel"  # how SA-V says that an object is not there
OBJECT = "object"  # the phrase of data without categories


def read_json(
    file: Path, split: str | None = None, *, root: Path | None = None, allow_outside: bool = False
) -> VideoDataset:
    """YT-VIS: `videos` (file_names), `annotations` (one an object: segmentations, null = absent).

    A `noun_phrase` of an annotation goes before its category's name. `video_np_pairs` (SA-Co) are
    what is known of each video: pairs without an object are its negatives, other phrases unknown.
    allow_outside: frames may lie outside `root`, by default the JSON's folder. Raises DataError.
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
    ledger = Ledger()
    phrases = _Phrases(raw["categories"], ledger, str(file))
    ids = _video_ids(raw["videos"], file)
    by_video: dict[int, list[dict]] = defaultdict(list)
    for item in raw["annotations"]:
        own = ids.find(item.get("video_id")) if isinstance(item, dict) else None
        if own is None:
            ledger.add(f"{_LEFT_OUT}: its video is not listed", found=item)
        else:
            by_video[own].append(item)
    pairs: dict[int | None, set[int]] = defaultdict(set)
    for pair in _listed(raw, "video_np_pairs", ledger):
        if isinstance(pair, dict):
            asked = pairs[ids.find(pair.get("video_id"))]
            if (category := phrases.find(pair)) is not None:
                asked.add(category)
    videos: list[Video] = []
    judge, stated = BoxJudge(), 0
    find = Finder(_folders(file, split), root or file.parent, allow_outside=allow_outside)
    taken: dict[Path, str] = {}
    for entry in raw["videos"]:
        own = ids.find(entry["id"])
        assert own is not None  # looked at by `_video_ids`
        frames = _frames(entry, file, find, taken)
        known = pairs.get(own)
        if known is None and "neg_category_ids" in entry:
            known = phrases.categories(entry, "neg_category_ids", ledger)
        unknown = phrases.categories(entry, "not_exhaustive_category_ids", ledger)
        name = _name(entry)
        labels, masks = _labels(by_video[own], frames, phrases, ledger, name, judge)
        stated += masks
        videos.append(
            Video(
                id=own,
                name=name,
                frames=frames,
                labels=labels,
                negative_ids=None if known is None else frozenset(known),
                not_exhaustive_ids=frozenset(unknown),
            )
        )
    if not videos:
        raise DataError(f"{file} lists no video: export the videos together with their frames")
    left = ledger.total(_LEFT_OUT)
    if left and left >= len(raw["annotations"]):
        raise DataError(
            f"{file}: none of {left:,} objects can be used (for example {ledger.examples(_LEFT_OUT, 2)}): "
            f"{next(s for s in ledger if s.startswith(_LEFT_OUT))}; export the videos again"
        )
    judge.check(str(file), ledger)
    judge_crowds((frame.annotations for video in videos for frame in video.labels), str(file))
    return VideoDataset(str(file), tuple(videos), phrases.names, ledger, stated)


class _Phrases:
    """Which category an object answers: that of its own phrase, else the one it names. names: of all."""

    def __init__(self, items: list, ledger: Ledger, source: str) -> None:
        self._listed = read_categories(items, ledger, source)
        self.names = dict(self._listed.own)
        self._numbers = {phrase_key(name): i for i, name in self.names.items()}

    def find(self, item: Mapping[str, Any]) -> int | None:
        """The category of an object or a pair; a phrase of its own becomes a category of its own."""
        raw = item.get("noun_phrase")
        phrase = visible(raw).strip() if isinstance(raw, str) else ""
        key = phrase_key(phrase)
        if not key:
            return self._category(item.get("category_id"))
        if key not in self._numbers:
            self._numbers[key] = max((*self._listed.names, *self.names, 0)) + 1
            self.names[self._numbers[key]] = phrase
        return self._numbers[key]

    def categories(self, entry: Mapping[str, Any], field: str, ledger: Ledger) -> set[int]:
        """Those of a list of ids that are there; others are counted."""
        found = set()
        for raw in _listed(entry, field, ledger):
            if (category := self._category(raw)) is None:
                ledger.add(f"`{field}` has a category that is not listed (left out)", _name(entry), entry["id"], raw)  # fmt: skip
            else:
                found.add(category)
        return found

    def _category(self, raw: Any) -> int | None:
        found = self._listed.find(raw)
        return self._listed.find_by_name(raw) if found is None else found


def _video_ids(entries: list, file: Path) -> Ids:
    """The ids of the videos. Raises DataError for one without, or with that of another."""
    ids, seen = Ids(e.get("id") for e in entries if isinstance(e, dict)), set()
    for entry in entries:
        own = ids.find(entry.get("id")) if isinstance(entry, dict) else None
        if own is None:
            raise DataError(f"{file}: video {shown(entry)} needs an `id`, a number or a text")
        if own in seen:
            raise DataError(
                f"{file}: video id {shown(entry['id'])} is used twice, so nobody can tell whose objects "
                f"are whose: give each video an id of its own"
            )
        seen.add(own)
    return ids


def _listed(item: Mapping[str, Any], field: str, ledger: Ledger) -> list:
    value = item.get(field)
    if value is not None and not isinstance(value, list):
        ledger.add(f"`{field}` is no list (taken as empty)", found=value)
    return value if isinstance(value, list) else []


def read_sav(root: Path) -> VideoDataset:
    """SA-V: FILM_manual.json, RLE of every 4th frame, beside FILM.mp4 or a folder of frames."""
    videos, ledger = [], Ledger()
    manual = [f for f in entries(root) if f.name.endswith("_manual.json")]
    for row, file in enumerate(sorted(manual, key=by_number)):
        raw, name = load_json(file), file.name.removesuffix("_manual.json")
        if not isinstance(raw, dict) or not isinstance(raw.get("masklet"), list):
            raise DataError(f"{file} has no list `masklet`, as SA-V has it: download it again")
        films = [p for p in (root / f"{name}.mp4", root / name) if p.exists()]
        if not films:
            raise DataError(f"{file} has no {name}.mp4 beside it: put films and JSON together")
        film = films[0].is_file()
        frames = Film(films[0]) if film else FrameFiles(frame_files(films[0]), _SAV_RATE)
        listed = _listed(raw, "masklet_id", ledger)
        ids = Ids(listed)
        labels = [NOT_ANNOTATED] * len(frames)
        for step, masks in enumerate(raw["masklet"]):
            if step * _SAV_STRIDE >= len(frames):
                ledger.add("annotated frame behind the film's end (left out)", file.name, step)
                continue
            found = []
            if not isinstance(masks, list):
                ledger.add("frame of SA-V is no list of masks (left out)", file.name, step, masks)
                continue
            for k, value in enumerate(masks):
                own = ids.find(listed[k]) if k < len(listed) else k
                odd = Ledger()
                rle, extent, _ = read_segmentation(value, frames.width, frames.height, odd)
                for sentence in odd:
                    if sentence != _EMPTY:
                        ledger.add(sentence, file.name, own)
                if isinstance(rle, Mapping) and extent is not None and own is not None:
                    found.append(annotation_of_rle(rle, own, 1))
            labels[step * _SAV_STRIDE] = FrameLabels(tuple(found))
        videos.append(Video(row, name, frames, tuple(labels)))
    return VideoDataset(str(root), tuple(videos), {1: OBJECT}, ledger)


def _labels(
    items: list[dict],
    frames: FrameFiles,
    phrases: _Phrases,
    ledger: Ledger,
    name: str,
    judge: BoxJudge,
) -> tuple[tuple[FrameLabels, ...], int]:
    """null is "not in this frame": the frame is annotated, the object's slot stays. And the number of
    masks that are stated, readable or not."""
    stated = 0
    found: list[list[Annotation]] = [[] for _ in range(len(frames))]
    ids = Ids(item.get("object_id") for item in items)
    named = [ids.find(item.get("object_id")) for item in items]
    largest = max((n for n in named if n is not None), default=0)
    for place, item in enumerate(items):
        where = (name, item.get("id"))
        category = phrases.find(item)
        if category is None:
            ledger.add(f"{_LEFT_OUT}: its category is not listed", *where, item.get("category_id"))
            continue
        masks = item.get("segmentations") or [None] * len(frames)
        boxes = item.get("bboxes") or [None] * len(frames)
        if any(not isinstance(v, list) or len(v) != len(frames) for v in (masks, boxes)):
            ledger.add(f"{_LEFT_OUT}: not one entry for each frame", *where)
            continue
        crowd = flag(item.get("iscrowd"))
        if crowd is None:
            ledger.add("iscrowd is neither 0 nor 1 (read as 0)", *where, item["iscrowd"])
        own = named[place]
        own = largest + 1 + place if own is None else own
        for k, (mask, box) in enumerate(zip(masks, boxes)):
            outline, extent, meant = read_segmentation(
                mask, frames.width, frames.height, ledger, where
            )
            judge.add(parse_box(box), extent, frames.width, frames.height)
            annotation = _one(
                outline, extent, box, own, category, bool(crowd), frames, ledger, where
            )
            if annotation is not None:
                stated += meant
                found[k].append(annotation)
    return tuple(FrameLabels(tuple(a)) for a in found), stated


def _one(
    found: Polygons | Rle | None, extent: Extent | None, box: Any, object_id: int, category: int,
    crowd: bool, frames: FrameFiles, ledger: Ledger, where: tuple[str, Any],
) -> Annotation | None:  # fmt: skip
    """An object in one frame; None where it is not there."""
    if isinstance(found, Mapping):
        return annotation_of_rle(found, object_id, category, crowd)
    if extent is None and not box:
        return None
    stated = parse_box(box) if extent is None else _box_of(extent)
    placed, _ = place_box(stated, extent, frames.width, frames.height, ledger, (*where, box))
    if placed is None:
        return None
    if found is None:
        ledger.add("object with a box and no mask in a frame (its box still trains)", *where)
    area = segmentation_area(found, frames.height, frames.width, cut=True)
    return Annotation(object_id, category, placed, found, crowd, area or placed[2] * placed[3])


def _box_of(extent: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    return extent[0], extent[1], extent[2] - extent[0], extent[3] - extent[1]


def _folders(file: Path, split: str | None) -> list[Path]:
    """Where the frames of a JSON may lie, most likely first."""
    above = file.parent.parent
    tops = [file.parent, *(above / s for s in (split, file.stem) if s), above]
    return [t / sub if sub else t for t in tops for sub in ("JPEGImages", "", "images", "frames")]


def _frames(entry: dict, file: Path, find: Finder, taken: dict[Path, str]) -> FrameFiles:
    """The frames of a video. taken: file -> the name that it was found by, of all videos so far."""
    listed = entry.get("file_names")
    if not isinstance(listed, list) or not listed or not all(isinstance(n, str) for n in listed):
        raise DataError(f"{file}: video {shown(entry['id'])} lists no frame (`file_names`)")
    files = [find(name) for name in listed]
    missing = [name for name, found in zip(listed, files) if found is None]
    if missing:
        near = find.near(missing[0])
        raise DataError(
            f"{len(missing)} of {len(files)} frames of video {_name(entry)} are missing, the first is "
            f"{shown(missing[0])}{f' (there is {near})' if near else ''}: put them beside {file}, or take the "
            f"video out of it"
        )
    there = [found for found in files if found is not None]
    for name, found in zip(listed, there):
        if (other := taken.setdefault(found, name)) != name:
            raise DataError(
                f"{file}: {shown(name)} is missing: the only file of that name is {found}, which is "
                f"{shown(other)}; put each into its folder"
            )
    rates = (number(entry.get(key)) for key in ("fps", "frame_rate"))
    frames = FrameFiles(there, next((r for r in rates if r is not None and r > 0), _RATE))
    columns, rows = whole(entry.get("width")), whole(entry.get("height"))
    if columns and rows and (columns, rows) != (frames.width, frames.height):
        raise DataError(
            f"video {_name(entry)} has frames of {frames.width} x {frames.height} pixels, its "
            f"annotations are for {columns} x {rows}: export them together"
        )
    return frames


def _name(entry: Mapping[str, Any]) -> str:
    listed = entry.get("file_names") or [""]
    return str(
        entry.get("name") or entry.get("video_name") or Path(listed[0]).parent or entry["id"]
    )
