"""Files of what was found in a video: YT-VIS JSON, COCO by frame, palette PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

from sam3jax.video.objects import VideoFrame

_MOST = 254  # objects that a palette PNG can hold: 0 is nothing, 255 is void


class VideoResults:
    """Collects frames, in any order, and writes them in order. Holds run lengths, no pixels."""

    def __init__(self, name: str, phrases: Sequence[str], frames: int) -> None:
        self.name, self.phrases, self.length = name, tuple(phrases), frames
        self.frames: dict[int, VideoFrame] = {}

    def add(self, frame: VideoFrame) -> None:
        self.frames[frame.number] = frame

    def ids(self) -> list[int]:
        """Ids of all objects, in increasing order."""
        return sorted({o.id for f in self.frames.values() for o in f.objects})

    def ytvis(self, video_id: int = 1) -> list[dict[str, Any]]:
        """YT-VIS results: one entry an object, null where it is not seen, its mean score."""
        entries = []
        for i in self.ids():
            seen = {n: o for n, f in self.frames.items() for o in f.objects if o.id == i}
            first = next(iter(seen.values()))
            masks = [_text(seen[n].mask) if n in seen else None for n in range(self.length)]
            boxes = [_box(seen[n].box_xyxy) if n in seen else None for n in range(self.length)]
            entries.append(
                {
                    "video_id": video_id,
                    "category_id": self.phrases.index(first.phrase) + 1,
                    "object_id": i,
                    "score": float(np.mean([o.score for o in seen.values()])),
                    "scores": [seen[n].score if n in seen else None for n in range(self.length)],
                    "segmentations": masks,
                    "bboxes": boxes,
                }
            )
        return entries

    def coco(self) -> dict[str, Any]:
        """COCO: every frame a picture, `track_id` the object."""
        numbers = sorted(self.frames)
        annotations = []
        for n in numbers:
            for o in self.frames[n].objects:
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": n, "track_id": o.id,
                        "category_id": self.phrases.index(o.phrase) + 1, "score": o.score,
                        "bbox": _box(o.box_xyxy), "iscrowd": 0,
                        "area": float(rle_codec.area(o.mask)), "segmentation": _text(o.mask),
                    }
                )  # fmt: skip
        images = [
            {"id": n, "file_name": f"{n:05d}", "width": f.width, "height": f.height}
            for n, f in sorted(self.frames.items())
        ]
        return {"images": images, "categories": self.categories(), "annotations": annotations}

    def categories(self) -> list[dict[str, Any]]:
        return [{"id": k, "name": phrase} for k, phrase in enumerate(self.phrases, 1)]

    def write(self, folder: Path) -> list[str]:
        """ytvis.json, coco.json and masks/00000.png ...; lines about what could not be written."""
        folder.mkdir(parents=True, exist_ok=True)
        video = {"id": 1, "name": self.name, "length": self.length}
        raw = {"videos": [video], "categories": self.categories(), "annotations": self.ytvis()}
        (folder / "ytvis.json").write_text(json.dumps(raw))
        (folder / "coco.json").write_text(json.dumps(self.coco()))
        ids = self.ids()
        shown, left = ids[:_MOST], ids[_MOST:]
        (folder / "masks").mkdir(exist_ok=True)
        values = {i: k for k, i in enumerate(shown, 1)}
        for n in sorted(self.frames):
            index = palette_mask(self.frames[n], values)
            image = Image.fromarray(index)
            image.putpalette(_palette())
            image.save(folder / "masks" / f"{n:05d}.png")
        if left:
            return [f"{len(left)} of {len(ids)} objects are not in masks/: a palette holds {_MOST}"]
        return []


def palette_mask(frame: VideoFrame, values: dict[int, int]) -> np.ndarray:
    """[Y, X] uint8: the value of the strongest object that covers each pixel, 0 where there is none."""
    index = np.zeros((frame.height, frame.width), np.uint8)
    for o in reversed(frame.objects):  # strongest first, so it is painted last
        if o.id in values:
            index[rle_codec.decode(o.mask) > 0] = values[o.id]
    return index


def _palette() -> list[int]:
    """DAVIS's colours: bit 0, 1, 2 of the value are the highest bits of red, green, blue, and so on."""
    colours = np.zeros((256, 3), int)
    for value in range(256):
        rest = value
        for bit in range(8):
            colours[value] |= [((rest >> c) & 1) << (7 - bit) for c in range(3)]
            rest >>= 3
    return colours.reshape(-1).tolist()


def _box(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def _text(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {
        "size": list(rle["size"]),
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }
