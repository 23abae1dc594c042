"""What a page to click in does, without the page: open a picture, ask, take back, save.

Two models may answer side by side, the tuned one first. A session holds one picture and what was asked.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sam3jax.data.collecting import add_to_set
from sam3jax.data.pictures import open_rgb
from sam3jax.viewing.draw import Instance, overlay
from sam3jax.viewing.predictor import Predictor, PromptError

Click = tuple[float, float, int]  # x, y in the picture's pixels, and 1 inside or 0 outside


class Side(NamedTuple):
    """One model, and what the page calls it."""

    name: str
    model: Predictor


class Round(NamedTuple):
    """What a click gave: each side's mask [Y, X] bool, its predicted IoU, and logits to be shown again."""

    click: Click
    masks: tuple[np.ndarray, ...]
    ious: tuple[float, ...]
    logits: tuple[np.ndarray, ...]


@dataclass
class Work:
    """One visitor's picture: rounds of the object that is clicked on, and masks that are done, by side."""

    file: Path | None = None
    picture: Image.Image | None = None
    rounds: list[Round] = field(default_factory=list)
    done: list[list[np.ndarray]] = field(default_factory=list)

    @property
    def clicks(self) -> list[Click]:
        return [r.click for r in self.rounds]

    def masks(self, side: int) -> list[np.ndarray]:
        """What is shown of a side: the masks that are done, then the current one."""
        done = self.done[side] if self.done else []
        current = [self.rounds[-1].masks[side]] if self.rounds else []
        return [*done, *current]


class Studio:
    """The models, shared by all visitors, who take turns."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = tuple(sides)
        self._turn = threading.Lock()
        self._at: dict[int, Image.Image] = {}  # of each predictor, the picture it was given last

    def open(self, file: Path) -> Work:
        """Begin with another picture. Raises DataError."""
        picture = open_rgb(file, reading=self.sides[0].model.reading)
        return Work(file, picture, done=[[] for _ in self.sides])

    def click(self, work: Work, x: float, y: float, label: int) -> Round:
        """One click more on the current object. Raises PromptError."""
        picture = _picture(work)
        asked = [*work.clicks, (x, y, label)]
        if not any(kind for *_, kind in asked):
            raise PromptError("the first click lies outside: begin with one inside the object")
        points, labels = [c[:2] for c in asked], [c[2] for c in asked]
        answers = []
        with self._turn:
            for k, side in enumerate(self.sides):
                self._set(side.model, picture)
                before = work.rounds[-1].logits[k] if work.rounds else None
                first = before is None  # one click may mean several things
                found = side.model.predict(
                    points=points, labels=labels, mask=before, multimask=first
                )
                best = int(found.ious[0].argmax())
                answers.append((found.masks[0, best], float(found.ious[0, best]), found.logits[0, best]))  # fmt: skip
        masks, ious, logits = zip(*answers, strict=True)
        work.rounds.append(Round((x, y, label), masks, ious, logits))
        return work.rounds[-1]

    def find(self, work: Work, phrase: str) -> list[int]:
        """All instances of a phrase become masks that are done; how many each side found."""
        picture = _picture(work)
        for side in self.sides:
            side.model.check_phrase(phrase)
        work.rounds, counts = [], []
        with self._turn:
            for k, side in enumerate(self.sides):
                self._set(side.model, picture)
                masks = [m for m in side.model.predict(phrase).decode_masks() if m.any()]
                work.done[k] = masks
                counts.append(len(masks))
        return counts

    def finish(self, work: Work) -> None:
        """The current object is done; the next click begins another one."""
        for k, done in enumerate(work.done):
            if work.rounds and work.rounds[-1].masks[k].any():
                done.append(work.rounds[-1].masks[k])
        work.rounds = []

    def save(self, work: Work, folder: str | Path, phrase: str) -> tuple[Path, int]:
        """What the first side shows, into a training set. Raises DataError and FileError."""
        picture = _picture(work)
        assert work.file is not None
        self.finish(work)
        return add_to_set(folder, work.file, picture.size, phrase, work.masks(0))

    def draw(self, work: Work, side: int) -> Image.Image:
        """The picture with a side's masks, clicks inside in green and outside in red."""
        shown = [Instance("", (0, 0, 0, 0), m, number=k) for k, m in enumerate(work.masks(side))]
        marks = Instance("", (0, 0, 0, 0), clicks=tuple((x, y, bool(k)) for x, y, k in work.clicks))
        return overlay(_picture(work), [*shown, marks])

    def _set(self, asked: Predictor, picture: Image.Image) -> None:
        """The trunk looks at a picture once, however often it is asked about."""
        if self._at.get(id(asked)) is not picture:
            asked.set_image(picture)
            self._at[id(asked)] = picture


def _picture(work: Work) -> Image.Image:
    if work.picture is None:
        raise PromptError("no picture yet: open one first")
    return work.picture
