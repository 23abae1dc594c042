"""Pictures from files: upright, RGB, eight bits, or one clear error that names the file."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sam3jax.errors import UserError

# The limit guards servers against strangers' files; a 100-megapixel photograph is a fair picture.
Image.MAX_IMAGE_PIXELS = None

_BROKEN = (OSError, SyntaxError, ValueError, struct.error, EOFError, zlib.error, IndexError)
_ORIENTATION = 0x0112  # EXIF
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height


class DataError(UserError):
    """The data cannot be used; the message names the thing and the remedy."""


def open_rgb(file: str | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """The picture as labelling tools and browsers display it, mode RGB.

    size: width and height that the annotations speak of. EXIF orientation is applied, also those
    orientations that keep the size; only where `size` says that the annotations were made on the
    stored, unturned pixels is it left alone. Transparency is dropped, 16-bit grey scaled to 8.
    Raises DataError for a file that cannot be decoded and for one of another size.
    """
    file = Path(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF blocks are no news here
            with Image.open(file) as image:
                orientation = image.getexif().get(_ORIENTATION, 1)
                image.load()
                upright = image
                if not _annotated_as_stored(image.size, orientation, size):
                    upright = ImageOps.exif_transpose(image)
                rgb = _rgb(upright)
    except FileNotFoundError as error:
        raise DataError(f"picture {file} does not exist") from error
    except _BROKEN as error:
        raise _unreadable(file, error) from error
    if size is not None and rgb.size != tuple(size):
        raise _other_size(file, rgb.size, size)
    return rgb


def read_picture(file: str | Path, width: int, height: int) -> np.ndarray:
    """The picture that annotations of that size refer to, [Y, X, 3] uint8; errors as `open_rgb`."""
    return np.asarray(open_rgb(file, (width, height)))


def displayed_size(file: Path) -> tuple[int, int]:
    """Width and height as displayed, from the file's header."""
    stored, orientation = read_header(file)
    return stored[::-1] if orientation in _TURNED else stored


def check_pictures(pictures: Iterable[tuple[Path, int, int]]) -> None:
    """Raise DataError for the first pictures that cannot be read or have another size than stated.

    Reads headers; a file is decoded only where its last bytes do not look like the end of a picture.
    """
    with ThreadPoolExecutor(8) as pool:
        errors = [e for e in pool.map(_check, pictures) if e is not None]
    if errors:
        more = f" (and {len(errors) - 1} more pictures with such problems)" if errors[1:] else ""
        raise DataError(f"{errors[0]}{more}")


def _check(picture: tuple[Path, int, int]) -> DataError | None:
    file, width, height = picture
    try:
        stored, orientation = read_header(file)
        displayed = stored[::-1] if orientation in _TURNED else stored
        if (width, height) not in (stored, displayed):
            return _other_size(file, displayed, (width, height))
        if not _looks_complete(file):
            open_rgb(file)
    except DataError as error:
        return error
    return None


def read_header(file: Path) -> tuple[tuple[int, int], int]:
    """Stored (width, height) and EXIF orientation, 1 to 8; errors as `open_rgb`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                return image.size, image.getexif().get(_ORIENTATION, 1)
    except FileNotFoundError as error:
        raise DataError(f"picture {file} does not exist") from error
    except _BROKEN as error:
        raise _unreadable(file, error) from error


def _looks_complete(file: Path) -> bool:
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(12)
        stream.seek(max(0, size - 16))
        tail = stream.read()
    if head[:4] == b"RIFF":  # WebP states its length
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return tail.endswith(b"\xff\xd9") or tail.endswith(b"IEND\xaeB`\x82")


def _annotated_as_stored(
    stored: tuple[int, int], orientation: int, size: tuple[int, int] | None
) -> bool:
    """Whether `size` is the stored size and cannot be the displayed one."""
    if size is None or orientation not in _TURNED:
        return False
    return tuple(size) == stored and tuple(size) != stored[::-1]


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion clips at 255
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _unreadable(file: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"picture {file} cannot be read ({reason}): replace the file, or take it out of the JSON"
    )


def _other_size(file: Path, found: tuple[int, int], stated: tuple[int, int]) -> DataError:
    return DataError(
        f"picture {file} is {found[0]} x {found[1]} pixels, its annotations are for "
        f"{stated[0]} x {stated[1]}: export pictures and annotations together"
    )
