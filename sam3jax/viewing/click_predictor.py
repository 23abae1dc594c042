"""Masks from clicks, boxes and masks, in a notebook or behind the command.

predictor = ClickPredictor.from_run("runs/clicks")
predictor.set_image("photograph.jpg")
found = predictor.predict(points=[[120, 80]], labels=[1])     # three masks: pick the best `ious`
best = found.logits[:, found.ious[0].argmax()]
found = predictor.predict(points=[[120, 80], [40, 60]], labels=[1, 0], mask=best, multimask=False)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sam3jax.data import transforms
from sam3jax.data.datasets import reading_of
from sam3jax.data.pictures import DEFAULT, Reading
from sam3jax.inference.clicking import Answers, Variables, decode, encode_picture, from_trunk
from sam3jax.model import Interactive
from sam3jax.types import ClickFeatures
from sam3jax.viewing.asking import Picture, PromptError, as_rgb, shown
from sam3jax.viewing.click_heads import has_heads, heads_below
from sam3jax.viewing.click_prompts import prompted
from sam3jax.viewing.draw import Instance, overlay
from sam3jax.weights.model_folder import load_model_folder
from sam3jax.weights.run_folder import read_run
from sam3jax.weights.scope import CLICKS
from sam3jax.weights.start import model_folder

STABILITY_OFFSET = (
    1.0  # how far the threshold moves in `Answers.stability`, as SAM's mask generator
)


class ClickPredictor:
    """Answers prompts on one picture; the backbone runs once, in `set_image`.

    reading: how files become pixels, as in the run's training.
    """

    def __init__(
        self, model: Interactive, variables: Variables, reading: Reading = DEFAULT
    ) -> None:
        self._model, self.reading = model, reading
        kept = {k: v for k, v in variables["params"].items() if k in (CLICKS.reads or ())}
        self._variables = jax.tree.map(jnp.asarray, {**variables, "params": kept})
        self._features: ClickFeatures | None = None
        self.picture: Image.Image | None = None

    @classmethod
    def from_run(cls, path: str | Path, *, base: bool = False) -> ClickPredictor:
        """From a run folder; base: the model that the run started from.

        A run of another task has no heads of its own: those of the model below it are taken.
        """
        run = read_run(path)
        variables = dict(run.asked(base))
        if not has_heads(variables):
            variables["params"] = {**heads_below(run.config), **variables["params"]}
        return cls(Interactive(run.config.model), variables, reading_of(run.config.data))

    @classmethod
    def from_model_folder(cls, path: str | Path) -> ClickPredictor:
        """The model as `sam3jax convert` wrote it, not tuned. Raises FileError where it has no heads."""
        config, params, _ = load_model_folder(
            model_folder(path), dtype=np.float32, parts=CLICKS.parts
        )
        return cls(Interactive(config), {"params": params})

    def set_image(self, picture: Picture) -> None:
        """A file, a PIL picture, or an array [Y, X, 3] or [Y, X] of uint8. Raises DataError."""
        asked = as_rgb(picture, self.reading)
        size = self._model.config.image_size
        transform = transforms.square(*asked.size, size)
        pixels = transforms.move_picture(transform, np.asarray(asked))[None]
        self._features = encode_picture(self._model, self._variables, pixels)
        self.picture = asked

    def set_trunk(self, picture: Image.Image, trunk: jax.Array) -> None:
        """A picture of mode RGB that this model's trunk has seen: trunk [1, y, x, D], its features."""
        self._features = from_trunk(self._model, self._variables, trunk)
        self.picture = picture

    def predict(
        self,
        points: Sequence[Any] | np.ndarray | None = None,
        labels: Sequence[Any] | np.ndarray | None = None,
        boxes: Sequence[Any] | np.ndarray | None = None,
        mask: np.ndarray | None = None,
        multimask: bool = True,
    ) -> Answers:
        """Masks of one object, or of B at once, each answered as if it were alone.

        points: [A, 2] x, y in the picture's pixels, or a list of such, one for each object, of any
        lengths; labels: 1 inside, 0 outside, default inside. boxes: left, top, width, height. mask:
        logits of an earlier answer, [4g, 4g] or one for each object. multimask: three masks, for a
        prompt that may mean several things; else one. Raises PromptError.
        """
        picture, c = self.picture, self._model.config
        if picture is None or self._features is None:
            raise PromptError("no picture yet: call set_image first")
        if not isinstance(multimask, bool | np.bool_ | int):
            raise PromptError(f"multimask is {shown(multimask)}: expected True or False")
        asked = prompted(
            points, labels, boxes, mask,
            width=picture.width, height=picture.height, size=c.image_size, grid=c.grid,
        )  # fmt: skip
        return decode(
            self._model, self._variables, self._features, asked, (picture.height, picture.width),
            multimask=bool(multimask), offset=STABILITY_OFFSET,
        )  # fmt: skip

    def draw(
        self, masks: np.ndarray, points: Sequence[Any] = (), labels: Sequence[Any] | None = None
    ) -> Image.Image:
        """The picture with masks [B, Y, X] (or one, [Y, X]), clicks inside in green and outside in red."""
        if self.picture is None:
            raise PromptError("no picture yet: call set_image first")
        masks, (width, height) = np.asarray(masks), self.picture.size
        masks = masks[None] if masks.ndim == 2 else masks
        if len(masks) and masks.shape[1:] != (height, width):
            raise PromptError(
                f"masks have the shape {list(masks.shape)}: expected [B, {height}, {width}] of this picture, such as "
                "found.masks[0]"
            )
        kinds = [1] * len(points) if labels is None else labels
        if len(kinds) != len(points):
            raise PromptError(
                f"{len(points)} points but {len(kinds)} labels: give one for each point"
            )
        clicks = tuple(
            (float(x), float(y), bool(k)) for (x, y), k in zip(points, kinds, strict=True)
        )
        shown = [Instance("", (0, 0, 0, 0), m, number=k) for k, m in enumerate(masks)]
        marks = Instance("", (0, 0, 0, 0), clicks=clicks)
        return overlay(self.picture, [*shown, marks])
