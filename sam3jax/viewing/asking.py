"""What people hand to a predictor: pictures in any form, boxes in pixels; each mistake by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3jax.data.depth import to_bytes
from sam3jax.data.names import phrase_key
from sam3jax.data.pictures import DEFAULT, DataError, Reading, open_rgb
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.errors import UserError
from sam3jax.types import Prompts

PixelBox = Sequence[float]  # left, top, width, height in the picture's pixels
Picture = str | Path | Image.Image | np.ndarray

_CHANNELS = (1, 3, 4)  # grey, RGB, RGB and transparency


class PromptError(UserError):
    """What is asked cannot be asked; the message says why and what to do."""


def as_rgb(picture: Picture, reading: Reading = DEFAULT) -> Image.Image:
    """A file, a PIL picture or an array as a picture of mode RGB, as the file of it would be read.

    Arrays: [Y, X], [Y, X, 3] or [Y, X, 4] of uint8, or grey ones of uint16. Raises DataError.
    """
    if isinstance(picture, str | Path):
        if "://" in str(picture):
            raise DataError(f"{picture} is a web address: download the picture and give its file")
        picture = Path(picture).expanduser()
        if Path(picture).is_dir():
            raise DataError(f"{picture} is a folder: give one picture of it at a time")
        return open_rgb(picture, reading=reading)
    if isinstance(picture, np.ndarray):
        picture = _of_array(picture)
    if not isinstance(picture, Image.Image):
        raise DataError(
            f"the picture is of type {type(picture).__name__}: expected the path of a file, a PIL picture, or "
            "an array [Y, X, 3] of uint8"
        )
    if not all(picture.size):
        raise DataError(f"the picture is {picture.width} x {picture.height}, without a pixel")
    try:
        return _without_depth(picture, reading)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reads a file when it is used first
        raise DataError(f"the picture cannot be read ({error})") from error


def _without_depth(picture: Image.Image, reading: Reading) -> Image.Image:
    """Eight bits a channel, what is clear over white, as of a file."""
    if picture.mode.startswith(("I", "F")):
        return Image.fromarray(to_bytes(np.asarray(picture), reading.window)).convert("RGB")
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        rgb = Image.new("RGB", picture.size, (255, 255, 255))
        rgb.paste(clear, mask=clear.getchannel("A"))
        return rgb
    return picture.convert("RGB")


def _of_array(pixels: np.ndarray) -> Image.Image:
    shape = list(pixels.shape)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    is_grey = pixels.ndim == 2
    if not (is_grey or (pixels.ndim == 3 and pixels.shape[2] in _CHANNELS)):
        first = pixels.ndim == 3 and pixels.shape[0] in _CHANNELS
        remedy = ": channels come last, picture.transpose(1, 2, 0)" if first else ""
        raise DataError(f"the picture is an array {shape}, expected [Y, X, 3] or [Y, X]{remedy}")
    if not pixels.size:
        raise DataError(f"the picture is an array {shape}, without a pixel")
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2 and is_grey:
        pixels = pixels.astype(np.uint16)  # in the byte order of this machine
    elif pixels.dtype != np.uint8:
        raise DataError(
            f"the picture is an array of {pixels.dtype}, expected uint8 values 0..255, or uint16 where it is grey"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


class Frames(Sequence[np.ndarray]):
    """Frames in memory, each in any form that a picture has, as [Y, X, 3] uint8 of one size.

    Raises DataError: here where they are no list, and at a frame that is no picture or of another size.
    """

    def __init__(self, frames: Any, reading: Reading = DEFAULT) -> None:
        if not (hasattr(frames, "__len__") and hasattr(frames, "__getitem__")):
            raise DataError(
                f"the frames are of type {type(frames).__name__}: expected a film, a folder of pictures, or frames in "
                "a list or an array"
            )
        self._frames, self._reading = frames, reading
        self._shape = self[0].shape if len(frames) else None

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, number: Any) -> Any:
        try:
            frame = np.asarray(as_rgb(self._frames[number], self._reading))
        except DataError as error:
            raise DataError(f"frame {number}: {error}") from error
        first = getattr(self, "_shape", None) or frame.shape
        if frame.shape != first:
            raise DataError(
                f"frame {number} has {frame.shape[1]} x {frame.shape[0]} pixels, the first one {first[1]} x "
                f"{first[0]}: frames of a video are of one size"
            )
        return frame


def phrase_list(phrases: Sequence[str] | str) -> list[str]:
    """Phrases as a list; one may be given without a list around it.

    Raises PromptError for none, and for two that are one to the model: finds would be filed twice.
    """
    words = [phrases] if isinstance(phrases, str) else list(phrases)
    if not words:
        raise PromptError("nothing to look for: give at least one phrase")
    seen: dict[str, str] = {}
    for word in filter(lambda word: isinstance(word, str), words):
        if (key := phrase_key(word)) in seen:
            raise PromptError(
                f"phrase {word!r} is the same to the model as phrase {seen[key]!r}: give it once"
            )
        seen[key] = word
    return words


def check_phrase(phrase: str, tokenizer: Tokenizer) -> None:
    """Raise PromptError for a phrase that a model with this vocabulary cannot read whole."""
    if not isinstance(phrase, str):
        raise PromptError(
            f"the phrase is {shown(phrase)}: one phrase at a time, as text; points have a name, points=..."
        )
    if not phrase.strip():
        raise PromptError("the phrase is empty: say what to look for, for example 'red circle'")
    if not tokenizer.fits(phrase):
        raise PromptError(
            f"phrase {phrase!r} is {len(tokenizer.encode(phrase))} tokens long, this "
            f"model reads {tokenizer.length - 2}: use fewer words"
        )


def score(threshold: Any) -> float:
    """A threshold in any form that a number has. Raises PromptError."""
    found = numbers(threshold)
    if found is None or found.ndim or not 0 <= found <= 1:
        raise PromptError(f"threshold {shown(threshold)}: expected a score from 0 to 1")
    return float(found)


def exemplars(
    positive: Sequence[PixelBox], negative: Sequence[PixelBox], width: int, height: int
) -> Prompts:
    """One prompt, its exemplars padded to 0, 4, 8, 16, ...: few shapes to compile for."""
    positive = box_list(positive)
    boxes = [box_in_picture(box, width, height) for box in (*positive, *box_list(negative))]
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
    sides = _four_numbers(box)
    if (sides[2:] <= 0).any():
        raise PromptError(f"box {sides.tolist()} has no area: left,top,width,height in pixels")
    left, right = np.clip([sides[0], sides[0] + sides[2]], 0, width)
    top, bottom = np.clip([sides[1], sides[1] + sides[3]], 0, height)
    if sides.max() <= 1 and (sides % 1).any() and min(width, height) > 2:
        raise PromptError(
            f"box {sides.tolist()} looks like shares of the picture: it is left,top,width,height in pixels"
        )
    if right - left < 1 or bottom - top < 1:
        raise PromptError(
            f"box {sides.tolist()} lies outside the picture, which is {width} x {height} pixels: "
            f"boxes are left,top,width,height in pixels"
        )
    return [
        float((left + right) / 2 / width), float((top + bottom) / 2 / height),
        float((right - left) / width), float((bottom - top) / height),
    ]  # fmt: skip


def box_list(boxes: Any) -> list[Any]:
    """Boxes as a list; one may be given without a list around it, None is none. Raises PromptError."""
    if boxes is None:
        return []
    found = numbers(boxes)
    if found is not None and found.ndim < 2:
        return [found] if found.size else []
    if isinstance(boxes, str) or not isinstance(boxes, Iterable):
        _four_numbers(boxes)
    return list(boxes)


def numbers(values: Any, bools: bool = False) -> np.ndarray | None:
    """Numbers in any form (lists, arrays, tensors) as float64; None where there is something else.

    bools: whether yes and no count, as 1 and 0.
    """
    try:
        # A tensor of torch, wherever it lies.
        found = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (TypeError, ValueError, RuntimeError):
        return None
    if found.size and found.dtype.kind not in ("iufb" if bools else "iuf"):
        return None
    try:
        return found.astype(float)
    except (TypeError, ValueError):
        return None


def shown(value: Any) -> str:
    """What was given, short enough for a sentence."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _four_numbers(box: Any) -> np.ndarray:
    sides = numbers(box)
    if sides is None or sides.shape != (4,) or not np.isfinite(sides).all():
        found = shown(box.tolist() if isinstance(box, np.ndarray) else box)
        raise PromptError(f"box {found}: expected four numbers, left,top,width,height in pixels")
    return sides
