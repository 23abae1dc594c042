"""Find phrases in pictures: `python -m sam3jax.predict PICTURES --run RUN --phrase "red circle"`.

In a notebook:

    predictor = Predictor.from_run("runs/run")
    predictor.set_image("photograph.jpg")
    found = predictor.predict("red circle")          # Detections: scores, boxes_xyxy, masks
    predictor.draw({"red circle": found}).show()
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("predict"))

import jax
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from sam3jax.config import EvalConfig
from sam3jax.data import transforms
from sam3jax.data.folders import PICTURES
from sam3jax.data.pictures import DataError, open_rgb
from sam3jax.data.prompts import VISUAL
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.errors import UserError, exit_status
from sam3jax.files import make_folder, write_text
from sam3jax.inference.detector import Detector, Variables, open_run
from sam3jax.inference.postprocess import Detections, full_size
from sam3jax.model import Sam3
from sam3jax.options import parse
from sam3jax.types import ImageFeatures, Prompts, TextFeatures
from sam3jax.viewing.draw import Instance, overlay
from sam3jax.weights.model_folder import load_model_folder

PixelBox = Sequence[float]  # left, top, width, height in the picture's pixels


class PromptError(UserError):
    """What is asked cannot be asked; the message says why and what to do."""


class Predictor:
    """Asks a model about one picture at a time; the backbone runs once per picture.

    thresholds: phrase -> score from which a detection counts; others use config.threshold.
    """

    def __init__(
        self,
        model: Sam3,
        variables: Variables,
        tokenizer: Tokenizer,
        config: EvalConfig | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        self.config = config or EvalConfig()
        self.thresholds = dict(thresholds or {})
        self._size = model.config.image_size
        self._detector = Detector(model, self.config)
        self._variables, self._tokenizer = jax.device_put(variables), tokenizer
        self._texts: dict[str, TextFeatures] = {}
        self._image: ImageFeatures | None = None
        self.picture: Image.Image | None = None

    @classmethod
    def from_run(cls, path: str | Path, *, base: bool = False) -> Predictor:
        """From a run folder, with its chosen thresholds; base: the model that the run started from."""
        run = open_run(path)
        variables = run.base_variables if base else run.variables
        thresholds = {} if base else run.thresholds
        return cls(run.model, variables, run.tokenizer, run.config.evaluation, thresholds)

    @classmethod
    def from_model_folder(cls, path: str | Path) -> Predictor:
        """The model as `python -m convert` wrote it, not tuned."""
        config, params, tokenizer = load_model_folder(path, dtype=np.float32)
        return cls(Sam3(config), {"params": params}, tokenizer)

    def set_image(self, picture: str | Path | Image.Image | np.ndarray) -> None:
        """A file, a PIL picture, or an array [Y, X, 3] or [Y, X] of uint8. Raises DataError."""
        if isinstance(picture, str | Path):
            picture = open_rgb(picture)
        elif isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8:
                raise DataError(
                    f"the picture is an array of {picture.dtype}, expected uint8 values 0..255"
                )
            picture = Image.fromarray(picture)
        self.picture = picture.convert("RGB")
        transform = transforms.square(*self.picture.size, self._size)
        pixels = transforms.move_picture(transform, np.asarray(self.picture))
        self._image = self._detector.encode_image(self._variables, pixels[None])

    def predict(
        self,
        phrase: str | None = None,
        *,
        boxes: Sequence[PixelBox] = (),
        negative_boxes: Sequence[PixelBox] = (),
        threshold: float | None = None,
    ) -> Detections:
        """All instances of a phrase, or of what the boxes show, or of both together.

        boxes: "like this", negative_boxes: "not like this", each left, top, width, height in pixels
        of the picture. Raises PromptError.
        """
        if self._image is None or self.picture is None:
            raise PromptError("no picture yet: call set_image first")
        if phrase is None and not boxes:
            raise PromptError("nothing to look for: give a phrase, or a box around an example")
        text = self._encode(VISUAL if phrase is None else phrase)
        prompts = self._prompts(boxes, negative_boxes)
        candidates = self._detector.ask(self._variables, self._image, text, prompts)
        if threshold is None:
            threshold = self.thresholds.get(phrase or VISUAL, self.config.threshold)
        return full_size(
            jax.device_get(candidates),
            0,
            self.picture.height,
            self.picture.width,
            floor=threshold,
            mask_threshold=self.config.mask_threshold,
        )

    def draw(self, found: Mapping[str, Detections]) -> Image.Image:
        """The picture with detections by phrase drawn over it."""
        instances = [
            Instance(phrase, tuple(box), rle, float(score))
            for phrase, detections in found.items()
            for score, box, rle in zip(
                detections.scores, detections.boxes_xyxy.tolist(), detections.masks, strict=True
            )
        ]
        return overlay(self.picture, sorted(instances, key=lambda i: -i.score))

    def check_phrase(self, phrase: str) -> None:
        """Raise PromptError for a phrase that the model cannot read whole."""
        if not phrase.strip():
            raise PromptError("the phrase is empty: say what to look for, for example 'red circle'")
        if not self._tokenizer.fits(phrase):
            raise PromptError(
                f"phrase {phrase!r} is {len(self._tokenizer.encode(phrase))} tokens long, this "
                f"model reads {self._tokenizer.length - 2}: use fewer words"
            )

    def _encode(self, phrase: str) -> TextFeatures:
        if phrase not in self._texts:
            self.check_phrase(phrase)
            tokens = self._tokenizer([phrase])
            self._texts[phrase] = self._detector.encode_text(self._variables, tokens)
        return self._texts[phrase]

    def _prompts(self, positive: Sequence[PixelBox], negative: Sequence[PixelBox]) -> Prompts:
        """One prompt, its exemplars padded to 0, 4, 8, 16, ...: few shapes to compile for."""
        boxes = [box_in_picture(box, *self.picture.size) for box in (*positive, *negative)]
        room = max(4, 1 << (len(boxes) - 1).bit_length()) if boxes else 0
        padded = np.zeros((1, 1, room, 4), np.float32)
        padded[0, 0, : len(boxes)] = np.reshape(boxes, (-1, 4))
        slots = np.arange(room)[None, None]
        return Prompts(
            text_id=np.zeros((1, 1), np.int32),
            valid=np.ones((1, 1), bool),
            boxes=padded,
            box_labels=(slots < len(positive)).astype(np.int32),
            box_valid=slots < len(boxes),
        )


def box_in_picture(box: PixelBox, width: int, height: int) -> list[float]:
    """left, top, width, height in pixels -> centre x, centre y, width, height in 0..1.

    What reaches over the edge is cut. Raises PromptError where nothing is left.
    """
    if len(box) != 4 or not np.isfinite(np.asarray(box, float)).all():
        raise PromptError(
            f"box {list(box)}: expected four numbers, left,top,width,height in pixels"
        )
    left, right = np.clip([box[0], box[0] + box[2]], 0, width)
    top, bottom = np.clip([box[1], box[1] + box[3]], 0, height)
    if box[2] <= 0 or box[3] <= 0:
        raise PromptError(f"box {list(box)} has no area: left,top,width,height in pixels")
    if right - left < 1 or bottom - top < 1:
        raise PromptError(
            f"box {list(box)} lies outside the picture, which is {width} x {height} pixels: "
            f"boxes are left,top,width,height in pixels"
        )
    return [
        (left + right) / 2 / width, (top + bottom) / 2 / height,
        (right - left) / width, (bottom - top) / height,
    ]  # fmt: skip


def find_pictures(patterns: Iterable[str]) -> list[Path]:
    """Files named, matched by a glob, or lying in a folder (and below), without repeats.

    Raises DataError naming what matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = [f for f in path.rglob("*") if f.suffix.lower() in PICTURES and f.is_file()]
            what = "holds no picture (" + " ".join(sorted(PICTURES)) + ")"
        elif path.exists():
            files, what = [path], ""
        else:
            files = [Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file()]
            what = "does not exist" if not glob.has_magic(str(path)) else "matches no file"
        if not files:
            raise DataError(f"no pictures: {pattern} {what}")
        found |= dict.fromkeys(sorted(files))
    return list(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all done; 1: some pictures failed, each named; 2: nothing could be done."""
    options = parse("predict", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if not options.phrase and not options.box:
        raise PromptError("nothing to look for: give --phrase, or --box around an example")
    files = find_pictures(options.pictures)
    predictor = (
        Predictor.from_model_folder(options.model)
        if options.model
        else Predictor.from_run(options.run, base=options.base)
    )
    for phrase in options.phrase or [VISUAL]:
        predictor.check_phrase(phrase)
    output = make_folder(options.output)
    failed = predict_files(predictor, files, output, options)
    done = len(files) - failed
    print(f"{done} pictures done, results in {output / 'predictions.json'}")
    if failed:
        print(f"error: {failed} of {len(files)} pictures failed, see above", file=sys.stderr)
    return 1 if failed else 0


def predict_files(
    predictor: Predictor, files: Sequence[Path], output: Path, options: argparse.Namespace
) -> int:
    """Ask every phrase of every picture, write overlays and predictions.json; how many failed."""
    phrases = options.phrase or [None]
    record: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "categories": [{"id": i, "name": p or VISUAL} for i, p in enumerate(phrases, start=1)],
        "annotations": [],
    }
    names: set[str] = set()
    failed = 0
    for number, (file, picture) in enumerate(_read_ahead(files), start=1):
        try:
            if isinstance(picture, Exception):
                raise picture
            predictor.set_image(picture)
            found = {
                phrase or VISUAL: predictor.predict(
                    phrase,
                    boxes=options.box,
                    negative_boxes=options.negative_box,
                    threshold=options.threshold,
                )
                for phrase in phrases
            }
        except (DataError, PromptError) as error:
            failed += 1
            print(f"{file}: {error}", file=sys.stderr)
            continue
        width, height = picture.size
        image = {"id": number, "file_name": str(file), "width": width, "height": height}
        record["images"].append(image)
        for category, detections in enumerate(found.values(), start=1):
            for result in detections.to_coco(number, category):
                area = float(coco_mask.area(result["segmentation"]))
                result |= {"id": len(record["annotations"]) + 1, "iscrowd": 0, "area": area}
                record["annotations"].append(result)
        if not options.no_overlay:
            predictor.draw(found).save(output / _free_name(file, names))
        counts = ", ".join(f"{len(d)} {phrase}" for phrase, d in found.items())
        print(f"[{number}/{len(files)}] {file}: {counts}")
    write_text(output / "predictions.json", json.dumps(record))
    return failed


def _read_ahead(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image | Exception]]:
    """Pictures, or the error of each; the next is decoded while this one is looked at."""

    def read(file: Path) -> Image.Image | Exception:
        try:
            return open_rgb(file)
        except DataError as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read, files[0])
        for k, file in enumerate(files):
            picture = following.result()
            if k + 1 < len(files):
                following = pool.submit(read, files[k + 1])
            yield file, picture


def _free_name(file: Path, taken: set[str]) -> str:
    """A file name for the overlay; pictures of equal names in different folders do not collide."""
    name, number = f"{file.stem}.png", 1
    while name.lower() in taken:
        number += 1
        name = f"{file.stem}_{number}.png"
    taken.add(name.lower())
    return name
