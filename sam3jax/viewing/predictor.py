"""A model to ask about pictures, in a notebook or behind the command.

predictor = Predictor.from_run("runs/run")
predictor.set_image("photograph.jpg")
found = predictor.predict("red circle")          # Detections: scores, boxes_xyxy, masks
predictor.draw({"red circle": found}).show()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from sam3jax.config import EvalConfig
from sam3jax.data import transforms
from sam3jax.data.datasets import reading_of
from sam3jax.data.frames import open_frames
from sam3jax.data.pictures import DEFAULT, DataError, Reading, open_rgb
from sam3jax.data.prompts import VISUAL
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.errors import UserError
from sam3jax.inference.detector import Detector, Variables
from sam3jax.inference.full_size import Detections, fetch, full_size
from sam3jax.inference.tiles import Tile, merged, put_back, tiles_of
from sam3jax.model import Sam3
from sam3jax.types import ImageFeatures, Prompts, TextFeatures
from sam3jax.video.chunks import ChunkOptions
from sam3jax.video.objects import VideoFrame
from sam3jax.video.predictor import VideoPredictor
from sam3jax.viewing.draw import Instance, overlay
from sam3jax.weights.model_folder import load_model_folder
from sam3jax.weights.run_folder import read_run
from sam3jax.weights.start import model_folder

PixelBox = Sequence[float]  # left, top, width, height in the picture's pixels
Picture = str | Path | Image.Image | np.ndarray


class PromptError(UserError):
    """What is asked cannot be asked; the message says why and what to do."""


class Predictor:
    """Asks a model about a picture, or about several at once; the backbone runs once per picture.

    It finds all instances of a phrase or of what boxes show. One object by points, a box or a mask:
    sam3jax.ClickPredictor.

    thresholds: phrase -> score from which a detection counts; others use config.threshold. Each thing is found
    once: config.shown_nms says from which overlap on two finds are one.
    mesh: devices of this process, over which pictures are split; None: the first one.
    reading: how files become pixels, as in the run's training.
    """

    def __init__(
        self,
        model: Sam3,
        variables: Variables,
        tokenizer: Tokenizer,
        config: EvalConfig | None = None,
        thresholds: Mapping[str, float] | None = None,
        mesh: Mesh | None = None,
        reading: Reading = DEFAULT,
    ) -> None:
        self.config = config or EvalConfig()
        self.thresholds, self.reading = dict(thresholds or {}), reading
        self._size = model.config.image_size
        self._detector = Detector(model, self.config, mesh)
        self._variables, self._tokenizer = self._detector.place(variables), tokenizer
        self._texts: dict[str, TextFeatures] = {}
        self._images: ImageFeatures | None = None
        self.pictures: list[Image.Image] = []

    @classmethod
    def from_run(
        cls, path: str | Path, *, base: bool = False, mesh: Mesh | None = None
    ) -> Predictor:
        """From a run folder, with its chosen thresholds; base: the model that the run started from."""
        run = read_run(path)
        thresholds = {} if base else run.thresholds
        reading = reading_of(run.config.data)
        return cls(
            run.model,
            run.asked(base),
            run.tokenizer,
            run.config.evaluation,
            thresholds,
            mesh,
            reading,
        )

    @classmethod
    def from_model_folder(cls, path: str | Path, *, mesh: Mesh | None = None) -> Predictor:
        """The model as `python -m convert` wrote it, not tuned."""
        config, params, tokenizer = load_model_folder(model_folder(path), dtype=np.float32)
        return cls(Sam3(config), {"params": params}, tokenizer, mesh=mesh)

    @property
    def picture(self) -> Image.Image | None:
        """The picture that is asked about, mode RGB."""
        return self.pictures[0] if self.pictures else None

    @property
    def at_once(self) -> int:
        """How many pictures the devices look at in the time of one."""
        return self._detector.mesh.size

    def set_image(self, picture: Picture) -> None:
        """A file, a PIL picture, or an array [Y, X, 3] or [Y, X] of uint8. Raises DataError."""
        self.set_images([picture])

    def set_images(self, pictures: Sequence[Picture]) -> None:
        """Several pictures of any sizes, for `predict_all`. Raises DataError."""
        self.pictures = [as_rgb(picture, self.reading) for picture in pictures]
        pixels = np.stack([self._square(picture) for picture in self.pictures])
        self._images = self._detector.encode_image(self._variables, self._filled(pixels))

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
        found = self.predict_all(
            phrase, boxes=boxes, negative_boxes=negative_boxes, threshold=threshold
        )
        return found[0]

    def predict_all(
        self,
        phrase: str | None = None,
        *,
        boxes: Sequence[PixelBox] = (),
        negative_boxes: Sequence[PixelBox] = (),
        threshold: float | None = None,
    ) -> list[Detections]:
        """`predict` for each of the pictures given to `set_images`."""
        if self._images is None:
            raise PromptError("no picture yet: call set_image first")
        if phrase is None and not boxes:
            raise PromptError("nothing to look for: give a phrase, or a box around an example")
        text = self._encode(VISUAL if phrase is None else phrase)
        asked = [_prompts(boxes, negative_boxes, *p.size) for p in self.pictures]
        prompts = jax.tree.map(lambda *rows: self._filled(np.concatenate(rows)), *asked)
        candidates = self._detector.ask(self._variables, self._images, text, prompts)
        if threshold is None:
            threshold = self.thresholds.get(phrase or VISUAL, self.config.threshold)
        candidates = fetch(candidates, threshold)
        pixel = self.config.mask_threshold
        return [
            full_size(
                candidates,
                row,
                picture.height,
                picture.width,
                floor=threshold,
                mask_threshold=pixel,
            ).distinct(self.config.shown_nms)
            for row, picture in enumerate(self.pictures)
        ]

    @property
    def size(self) -> int:
        """Edge of the square that a picture is squashed to, in pixels."""
        return self._size

    def predict_tiled(
        self, picture: Image.Image, phrases: Sequence[str], threshold: float | None = None
    ) -> list[Detections]:
        """All instances of each phrase in a large picture, looked at whole and in overlapping tiles.

        Tiles have the model's size, so that nothing in them is squashed.
        """
        width, height = picture.size
        tiles = [Tile(0, 0, width, height), *tiles_of(width, height, self._size)]
        parts: list[list[tuple[Detections, Tile]]] = [[] for _ in phrases]
        for start in range(0, len(tiles), self.at_once):
            group = tiles[start : start + self.at_once]
            self.set_images([picture.crop(t.box) if t != tiles[0] else picture for t in group])
            for phrase, found in zip(phrases, parts, strict=True):
                here = zip(self.predict_all(phrase, threshold=threshold), group, strict=True)
                found += [(put_back(f, tile, width, height), tile) for f, tile in here]
        return [merged(found, width, height) for found in parts]

    def video(
        self, frames: Any, phrases: Sequence[str], reverse: bool = False
    ) -> Iterator[VideoFrame]:
        """The objects of each frame of a video, with identities: plain tracking by detection.

        frames: a film, a folder of pictures, or arrays [Y, X, 3] uint8 with a length. From the last
        frame to the first with `reverse`. Raises DataError and PromptError.
        """
        for phrase in phrases:
            self.check_phrase(phrase)
        if isinstance(frames, str | Path):
            frames = open_frames(frames, self.reading)
        return self.of_videos().objects(frames, phrases, reverse)

    def of_videos(
        self, *, threshold: float | None = None, options: ChunkOptions | None = None
    ) -> VideoPredictor:
        """The same model and thresholds, for videos; frames are spread over all devices.

        threshold: one score for all phrases, instead of those chosen for each.
        """
        thresholds, config = self.thresholds, self.config
        if threshold is not None:
            thresholds, config = {}, config.model_copy(update={"threshold": threshold})
        ask = self._detector
        return VideoPredictor(
            ask.model, self._variables, self._tokenizer, config, thresholds, options=options or ChunkOptions()
        )  # fmt: skip

    def draw(
        self, found: Mapping[str, Detections], picture: Image.Image | None = None
    ) -> Image.Image:
        """A picture, by default the first one set, with detections by phrase drawn over it."""
        instances = [
            Instance(phrase, tuple(box), rle, float(score))
            for phrase, detections in found.items()
            for score, box, rle in zip(
                detections.scores, detections.boxes_xyxy.tolist(), detections.masks, strict=True
            )
        ]
        picture = picture or self.picture
        if picture is None:
            raise PromptError("no picture yet: call set_image first")
        return overlay(picture, sorted(instances, key=lambda i: -(i.score or 0.0)))

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

    def _square(self, picture: Image.Image) -> np.ndarray:
        transform = transforms.square(*picture.size, self._size)
        return transforms.move_picture(transform, np.asarray(picture))

    def _filled(self, rows: np.ndarray) -> Any:
        """Rows repeated up to a multiple of the mesh's size, and split over it."""
        short = -len(rows) % self.at_once
        return self._detector.rows(np.concatenate([rows, *[rows[-1:]] * short]))


def as_rgb(picture: Picture, reading: Reading = DEFAULT) -> Image.Image:
    """A file, a PIL picture or an array of uint8 as a picture of mode RGB. Raises DataError."""
    if isinstance(picture, str | Path):
        return open_rgb(picture, reading=reading)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            raise DataError(
                f"the picture is an array of {picture.dtype}, expected uint8 values 0..255"
            )
        picture = Image.fromarray(picture)
    return picture.convert("RGB")


def _prompts(
    positive: Sequence[PixelBox], negative: Sequence[PixelBox], width: int, height: int
) -> Prompts:
    """One prompt, its exemplars padded to 0, 4, 8, 16, ...: few shapes to compile for."""
    boxes = [box_in_picture(box, width, height) for box in (*positive, *negative)]
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
