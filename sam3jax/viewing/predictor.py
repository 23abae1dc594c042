"""A model to ask about pictures, in a notebook or behind the command.

predictor = Predictor.from_run("runs/run")
predictor.set_image("photograph.jpg")
found = predictor.predict("red circle")          # Detections: scores, boxes_xyxy, masks
predictor.draw({"red circle": found}).show()
found = predictor.predict(points=[[120, 80]])    # Answers: one object, three masks
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from sam3jax.config import EvalConfig
from sam3jax.data import transforms
from sam3jax.data.datasets import reading_of
from sam3jax.data.frames import Film, FrameFiles, open_frames
from sam3jax.data.ledger import DataError
from sam3jax.data.pictures import DEFAULT, Reading
from sam3jax.data.prompts import VISUAL
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.inference.clicking import Answers
from sam3jax.inference.detector import Detector, Variables
from sam3jax.inference.full_size import Detections, fetch, full_size
from sam3jax.inference.tiles import Tile, merged, put_back, tiles_of
from sam3jax.model import Interactive, Sam3
from sam3jax.types import ImageFeatures, TextFeatures
from sam3jax.video.chunks import NMS_IOU, ChunkOptions, SecondNeck
from sam3jax.video.objects import VideoFrame
from sam3jax.video.predictor import VideoPredictor
from sam3jax.viewing.asking import (
    Frames,
    Picture,
    PixelBox,
    PromptError,
    as_rgb,
    box_list,
    check_phrase,
    exemplars,
    phrase_list,
    score,
)
from sam3jax.viewing.click_heads import PARTS, has_heads, heads_below
from sam3jax.viewing.click_predictor import ClickPredictor
from sam3jax.viewing.draw import Instance, overlay
from sam3jax.weights.model_folder import load_params, load_tokenizer, open_model_folder
from sam3jax.weights.run_folder import read_run
from sam3jax.weights.start import model_folder

__all__ = ["Picture", "PixelBox", "Predictor", "PromptError"]


class Predictor:
    """Asks a model about a picture, or about several at once; the backbone runs once per picture.

    It finds all instances of a phrase or of what boxes show, and, where the weights hold the interactive
    heads, one object by points, a box or a mask.

    thresholds: phrase -> score from which a detection counts; others use config.threshold. Each thing is found
    once: config.shown_nms says from which overlap on two finds are one.
    mesh: devices of this process, over which pictures are split; None: the first one.
    reading: how files become pixels, as in the run's training.
    heads: reads the interactive heads at the first click, where `variables` do not hold them.
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
        heads: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self.config = config or EvalConfig()
        self.thresholds, self.reading = dict(thresholds or {}), reading
        self._heads = heads
        self._size = model.config.image_size
        self._detector = Detector(model, self.config, mesh)
        self._variables, self._tokenizer = self._detector.place(variables), tokenizer
        self._texts: dict[str, TextFeatures] = {}
        self._trunk: jax.Array | None = None
        self._images: ImageFeatures | None = None
        self._clicks: ClickPredictor | None = None
        self.pictures: list[Image.Image] = []

    @classmethod
    def from_run(
        cls, path: str | Path, *, base: bool = False, mesh: Mesh | None = None
    ) -> Predictor:
        """From a run folder, with its chosen thresholds; base: the model that the run started from."""
        run = read_run(path)
        thresholds = {} if base else run.thresholds
        return cls(
            run.model, run.asked(base), run.tokenizer, run.config.evaluation, thresholds, mesh,
            reading_of(run.config.data), lambda: heads_below(run.config),
        )  # fmt: skip

    @classmethod
    def from_model_folder(cls, path: str | Path, *, mesh: Mesh | None = None) -> Predictor:
        """The model as `python -m convert` wrote it, not tuned."""
        folder = open_model_folder(model_folder(path))
        variables = {"params": load_params(folder, np.float32)}
        heads = lambda: load_params(folder, np.float32, PARTS)
        return cls(Sam3(folder.config), variables, load_tokenizer(folder), mesh=mesh, heads=heads)

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

    def set_images(self, pictures: Iterable[Picture]) -> None:
        """Several pictures of any sizes, for `predict_all`. Raises DataError."""
        is_one = isinstance(pictures, np.ndarray) and pictures.ndim < 4
        is_list = isinstance(pictures, Iterable) and not isinstance(
            pictures, str | Path | Image.Image
        )
        if is_one or not is_list or not len(pictures := list(pictures)):
            raise DataError(
                "set_images takes a list of pictures, at least one; set_image takes one"
            )
        asked = [as_rgb(picture, self.reading) for picture in pictures]
        pixels = np.stack([self._square(picture) for picture in asked])
        self._trunk = self._detector.encode_trunk(self._variables, self._filled(pixels))
        self._images = self._detector.from_trunk(self._variables, self._trunk)
        self.pictures = asked

    @overload
    def predict(
        self,
        phrase: str | None = None,
        *,
        boxes: Sequence[PixelBox] = (),
        negative_boxes: Sequence[PixelBox] = (),
        threshold: float | None = None,
    ) -> Detections: ...

    @overload
    def predict(
        self,
        *,
        points: Sequence[Any] | np.ndarray | None = None,
        labels: Sequence[Any] | np.ndarray | None = None,
        boxes: Sequence[Any] | np.ndarray | None = None,
        mask: np.ndarray | None = None,
        multimask: bool | None = None,
    ) -> Answers: ...

    def predict(
        self, phrase=None, *, boxes=(), negative_boxes=(), threshold=None,
        points=None, labels=None, mask=None, multimask=None,
    ):  # fmt: skip
        """All instances of a phrase, or of what the boxes show, or of both together: Detections.

        boxes: "like this", negative_boxes: "not like this", each left, top, width, height in pixels
        of the picture.

        With points, a mask or multimask: one object, or several apart, as ClickPredictor.predict
        answers: Answers. A box is then the object's own. Raises PromptError.
        """
        if all(x is None for x in (points, labels, mask, multimask)):
            return self.predict_all(
                phrase, boxes=boxes, negative_boxes=negative_boxes, threshold=threshold
            )[0]
        if phrase is not None or box_list(negative_boxes) or threshold is not None:
            raise PromptError(
                "a phrase, negative_boxes and threshold are about all instances; points, labels, mask and "
                "multimask about one object: ask one after the other"
            )
        wanted = True if multimask is None else multimask
        return self.clicks.predict(points, labels, boxes, mask, wanted)

    @property
    def clicks(self) -> ClickPredictor:
        """The same model and picture, asked by clicks.

        Raises PromptError where it has no heads, and where several pictures were set.
        """
        if len(self.pictures) > 1:
            raise PromptError(
                f"clicks are about one picture, and {len(self.pictures)} were set: call set_image with the one"
            )
        if self._clicks is None:
            self._clicks = self._open_clicks()
        if self._trunk is not None and self._clicks.picture is not self.pictures[0]:
            self._clicks.set_trunk(self.pictures[0], self._trunk[:1])
        return self._clicks

    def _open_clicks(self) -> ClickPredictor:
        model = Interactive(self._detector.model.config)
        return ClickPredictor(model, self._with_heads(), self.reading)

    def _with_heads(self) -> Variables:
        """The variables with the interactive heads. Raises PromptError where there are none."""
        variables = self._variables
        if not has_heads(variables):
            if self._heads is None:
                raise PromptError(
                    "this model has no interactive heads, which answer points, boxes of one object and masks: "
                    "open it with Predictor.from_run or from_model_folder, of weights that have them"
                )
            heads = self._detector.place(dict(self._heads()))
            variables = {**variables, "params": {**variables["params"], **heads}}
        return variables

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
        boxes, negative_boxes = box_list(boxes), box_list(negative_boxes)
        if threshold is not None:
            threshold = score(threshold)
        if phrase is None and not boxes:
            raise PromptError(
                "nothing to look for: give a phrase, a box around an example, or points on an object"
            )
        text = self._encode(VISUAL if phrase is None else phrase)
        asked = [exemplars(boxes, negative_boxes, *p.size) for p in self.pictures]
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
        self, picture: Picture, phrases: Sequence[str], threshold: float | None = None
    ) -> list[Detections]:
        """All instances of each phrase in a large picture, looked at whole and in overlapping tiles.

        Tiles have the model's size, so that nothing in them is squashed.
        """
        picture, phrases = as_rgb(picture, self.reading), phrase_list(phrases)
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

        frames: a film, a folder of pictures, or a list or an array of pictures as `set_image` takes
        them, of one size. From the last frame to the first with `reverse`. Raises DataError and PromptError.
        """
        phrases = phrase_list(phrases)
        for phrase in phrases:
            self.check_phrase(phrase)
        if isinstance(frames, str | Path):
            frames = open_frames(frames, self.reading)
        elif not isinstance(frames, FrameFiles | Film):
            frames = Frames(frames, self.reading)
        return self.of_videos().objects(frames, phrases, reverse)

    def of_videos(
        self, *, threshold: float | None = None, nms: float = NMS_IOU, joint_presence: bool = True,
        frames_per_device: int = 1, levels: bool = False,
    ) -> VideoPredictor:  # fmt: skip
        """The same model and thresholds, for videos; frames are spread over all devices.

        threshold: one score for all phrases, instead of those chosen for each. nms: overlap of masks from
        which the weaker of two finds of a phrase is left out. joint_presence: scores are class times
        presence. frames_per_device: at a time. levels: `detections` come with the second neck's three
        levels in bfloat16, which a tracker reads. Raises PromptError where the model has no such neck.
        """
        thresholds, config = self.thresholds, self.config
        if threshold is not None:
            thresholds, config = {}, config.model_copy(update={"threshold": score(threshold)})
        model = self._detector.model
        neck = SecondNeck(model.config) if levels else None
        options = ChunkOptions(
            keep=config.max_detections, joint_presence=joint_presence, frames_per_device=frames_per_device
        )  # fmt: skip
        return VideoPredictor(
            model, self._with_heads() if levels else self._variables, self._tokenizer, config, thresholds,
            nms=score(nms), options=options, levels=neck,
        )  # fmt: skip

    def draw(self, found: Mapping[str, Detections], picture: Picture | None = None) -> Image.Image:
        """A picture, by default the first one set, with detections by phrase drawn over it."""
        instances = [
            Instance(phrase, tuple(box), rle, float(score))
            for phrase, detections in found.items()
            for score, box, rle in zip(
                detections.scores, detections.boxes_xyxy.tolist(), detections.masks, strict=True
            )
        ]
        below = self.picture if picture is None else as_rgb(picture, self.reading)
        if below is None:
            raise PromptError("no picture yet: call set_image first")
        return overlay(below, sorted(instances, key=lambda i: -(i.score or 0.0)))

    def check_phrase(self, phrase: str) -> None:
        """Raise PromptError for a phrase that the model cannot read whole."""
        check_phrase(phrase, self._tokenizer)

    def _encode(self, phrase: str) -> TextFeatures:
        self.check_phrase(phrase)
        if phrase not in self._texts:
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
