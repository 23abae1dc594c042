"""Pictures from files: upright, RGB, eight bits, or one clear error that names the file."""

from __future__ import annotations

import functools
import io
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sam3jax.data import volumes
from sam3jax.data.depth import Window, to_bytes
from sam3jax.data.ledger import DataError

__all__ = ["DataError", "Header", "Reading", "open_rgb", "read_header", "read_picture"]

# Pillow's own guard. It stays on for the whole process; who asks for more megapixels passes by it.
MOST_MEGAPIXELS = 178
_GUARD = threading.Lock()
BROKEN = (OSError, SyntaxError, ValueError, struct.error, EOFError, zlib.error, IndexError,
           KeyError, TypeError, OverflowError, MemoryError, Image.DecompressionBombError)  # fmt: skip
_ORIENTATION = 0x0112  # EXIF
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # to the upright picture
_TAIL = 65536  # bytes behind a PNG's pixels in which EXIF is looked for
_SPREAD = {"L;2": 85, "L;4": 17}  # raw mode -> what Pillow multiplies its values by
_HEIC = (".heic", ".heif", ".hif")
_CHUNK = 64  # pictures a thread checks at a time
_SLOW = 1e-3  # seconds a picture from which threads check the rest
_BLACK = 16  # largest value of a picture that is all but black


@dataclass(frozen=True, slots=True)
class Reading:
    """How files become pixels: `window` of pictures of more than eight bits (None: each one's own),
    the most megapixels that are decoded, and `slices`, 3 for neighbours of a stack as channels."""

    window: Window | None = None
    megapixels: float = 150
    slices: int = 1


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of a file tell: stored (width, height), EXIF orientation 1 to 8, frames,
    and whether it has more than eight bits, in grey ("grey") or colour ("colour")."""

    size: tuple[int, int]
    orientation: int = 1
    frames: int = 1
    deep: str = ""

    @property
    def displayed(self) -> tuple[int, int]:
        width, height = self.size
        return (height, width) if self.orientation in _TURNED else (width, height)


DEFAULT = Reading()


def open_rgb(
    file: str | Path,
    size: tuple[int, int] | None = None,
    *,
    frame: int = 0,
    reading: Reading = DEFAULT,
) -> Image.Image:
    """The picture as labelling tools and browsers display it, mode RGB.

    size: width and height that the annotations speak of. EXIF orientation is applied, also those
    orientations that keep the size; only where `size` says that the annotations were made on the
    stored, unturned pixels is it left alone. Transparency is laid over white, more than eight bits
    are scaled to eight. frame: of a file with several pages. Raises DataError for a file that cannot
    be decoded, is too large, or has another size.
    """
    file = Path(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF blocks are no news here
            if volumes.is_volume(file):
                if frame >= (frames := read_header(file, reading.megapixels).frames):
                    raise no_frame(file, frames, frame)
                rgb = _channels([volumes.read_slice(file, f) for f in _near(file, frame, reading)], reading)  # fmt: skip
            elif reading.slices > 1:
                rgb = _stack(file, frame, reading, size)
            else:
                with _open(file, reading.megapixels) as image:
                    _seek(image, file, frame)
                    deep = _deep(image)  # first: looking for EXIF may decode the picture
                    turn = _turn(image, size)
                    image.load()
                    rgb = _rgb(image, file, deep, reading.window)
                    rgb = rgb if turn is None else rgb.transpose(turn)
    except FileNotFoundError as error:
        raise DataError(f"picture {file} does not exist") from error
    except DataError:
        raise
    except BROKEN as error:
        raise _unreadable(file, error) from error
    if size is not None and rgb.size != tuple(size):
        raise other_size(file, rgb.size, size)
    return rgb


def read_picture(
    file: str | Path, width: int, height: int, *, frame: int = 0, reading: Reading = DEFAULT
) -> np.ndarray:
    """The picture that annotations of that size refer to, [Y, X, 3] uint8; errors as `open_rgb`."""
    return np.asarray(open_rgb(file, (width, height), frame=frame, reading=reading))


def displayed_size(file: Path) -> tuple[int, int]:
    """Width and height as displayed, from the file's header."""
    return read_header(file).displayed


def size_of_bytes(content: bytes, name: str) -> tuple[int, int]:
    """`displayed_size` of a file in memory, which messages call `name`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return Header(image.size, _orientation(image)).displayed
    except BROKEN as error:
        raise _unreadable(Path(name), error) from error


def read_header(file: Path, megapixels: float = MOST_MEGAPIXELS) -> Header:
    """What the file's first bytes say; errors as `open_rgb`."""
    try:
        if volumes.is_volume(file):
            size, frames = volumes.shape(file)
            return Header(size, frames=frames, deep="grey")
        with _open(file, megapixels) as image:
            # An MPO is a photograph with a small copy or a second eye behind it.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            deep = _deep(image)
            return Header(image.size, _header_orientation(image, file), frames, deep)
    except FileNotFoundError as error:
        raise DataError(f"picture {file} does not exist") from error
    except DataError:
        raise
    except BROKEN as error:
        raise _unreadable(file, error) from error


def stored_values(image: Image.Image) -> np.ndarray:
    """The values of a mask as its file has them, [Y, X] or [Y, X, C].

    Pillow spreads grey of two and four bits over 0 to 255, so that value 1 would become 85 or 17.
    """
    raw = str(getattr(image, "tile", ())) if image.mode == "L" else ""  # gone once it is loaded
    step = next((step for mode, step in _SPREAD.items() if mode in raw), 1)
    values = np.asarray(image)
    return values // step if step > 1 else values


def is_black(image: Image.Image) -> bool:
    """Whether a picture, mode RGB, is all but black."""
    return bool(np.max(image.getextrema()) < _BLACK)


def check_pictures(
    pictures: Iterable[tuple[Path, int, int, int]], reading: Reading = DEFAULT
) -> list[Header]:
    """Headers of (file, width, height, frame). Raises DataError for the first pictures that cannot be
    read or have another size than stated.

    A file is decoded only where its last bytes do not look like the end of a picture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        listed = list(pictures)
        check = lambda part: [_check(picture, reading) for picture in part]
        parts = [listed[start : start + _CHUNK] for start in range(_CHUNK, len(listed), _CHUNK)]
        began = time.perf_counter()
        found = check(listed[:_CHUNK])
        # Threads help while they wait for a disk or a decoder; headers that are at hand they slow down threefold.
        slow = time.perf_counter() - began > _SLOW * len(found)
        with ThreadPoolExecutor(8 if slow else 1) as pool:
            found += [result for part in pool.map(check, parts) for result in part]
    errors = [e for e in found if isinstance(e, DataError)]
    if errors:
        more = f" (and {len(errors) - 1} more pictures with such problems)" if errors[1:] else ""
        raise DataError(f"{errors[0]}{more}")
    return [h for h in found if isinstance(h, Header)]


def read_as_stored(header: Header, width: int, height: int) -> bool:
    """Whether a turned picture is read unturned, because its annotations state the stored size."""
    return _annotated_as_stored(header.size, header.orientation, (width, height))


def _check(picture: tuple[Path, int, int, int], reading: Reading) -> Header | DataError:
    file, width, height, frame = picture
    try:
        header = read_header(file, reading.megapixels)
        if (width, height) not in (header.size, header.displayed):
            return other_size(file, header.displayed, (width, height))
        if frame >= header.frames > 1:
            return no_frame(file, header.frames, frame)
        if header.deep == "colour" or not _looks_complete(file):
            open_rgb(file, frame=frame, reading=reading)
    except DataError as error:
        return error
    return header


def _looks_complete(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            head = stream.read(12)
            size = stream.seek(0, 2)
            stream.seek(max(0, size - 16))
            tail = stream.read()
    except OSError as error:
        raise _unreadable(file, error) from error
    if head[:4] == b"RIFF":  # WebP states its length
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return tail.endswith(b"\xff\xd9") or tail.endswith(b"IEND\xaeB`\x82")


def _open(file: Path, megapixels: float) -> Image.Image:
    if file.suffix.lower() in _HEIC:
        _read_heic()
    image = Image.open(file) if megapixels <= MOST_MEGAPIXELS else _past_guard(file)
    width, height = image.size
    if width * height > megapixels * 1e6:
        image.close()
        raise DataError(
            f"picture {file} has {width * height / 1e6:.0f} megapixels, at most {megapixels:g} are read: "
            f"make it smaller, or raise data.max_megapixels (up to {MOST_MEGAPIXELS}), --max-megapixels of predict"
        )
    return image


def _past_guard(file: Path) -> Image.Image:
    """Pillow compares the size while it reads the header, and `_open` does behind it."""
    with _GUARD:
        most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = most


@functools.cache
def _read_heic() -> bool:
    """Let Pillow read the pictures of iPhones, where pillow-heif is installed."""
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _seek(image: Image.Image, file: Path, frame: int) -> None:
    if not frame:
        return
    frames = getattr(image, "n_frames", 1)
    if frame >= frames:
        raise no_frame(file, frames, frame)
    image.seek(frame)


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(_ORIENTATION, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _turn(image: Image.Image, size: tuple[int, int] | None) -> Image.Transpose | None:
    """What makes it upright; None where it is, or where its annotations are of `size`, unturned."""
    orientation = _orientation(image)
    as_stored = _annotated_as_stored(image.size, orientation, size)
    return None if as_stored else _TRANSPOSE.get(orientation)


def _header_orientation(image: Image.Image, file: Path) -> int:
    """`_orientation` from the first bytes; Pillow decodes a whole PNG to look for EXIF behind it."""
    if image.format == "PNG" and "exif" not in image.info:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - _TAIL))
            if b"eXIf" not in stream.read():
                return 1
    return _orientation(image)


def _annotated_as_stored(
    stored: tuple[int, int], orientation: int, size: tuple[int, int] | None
) -> bool:
    """Whether `size` is the stored size and cannot be the displayed one."""
    if size is None or orientation not in _TURNED:
        return False
    return tuple(size) == stored and tuple(size) != stored[::-1]


def _deep(image: Image.Image) -> str:
    if image.mode.startswith(("I", "F")):
        return "grey"
    # Pillow keeps the upper byte of sixteen-bit colours.
    return "colour" if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) else ""


def _rgb(image: Image.Image, file: Path, deep: str, window: Window | None) -> Image.Image:
    if deep == "grey":
        return Image.fromarray(to_bytes(np.asarray(image), window)).convert("RGB")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, (255, 255, 255))
        rgb.paste(clear, mask=clear.getchannel("A"))
    else:
        rgb = image.convert("RGB")
    if deep and is_black(rgb) and rgb.getbbox() is not None:
        raise DataError(
            f"picture {file} has colours of sixteen bits of which only the lower ones are used, so that "
            f"it is all but black when read: save it with eight bits"
        )
    return rgb


def _near(file: Path, frame: int, reading: Reading) -> list[int]:
    """Frames that become channels: the one asked for, or it and its neighbours."""
    if reading.slices == 1:
        return [frame]
    last = read_header(file).frames - 1
    return [min(max(frame + step, 0), last) for step in (-1, 0, 1)]


def _stack(file: Path, frame: int, reading: Reading, size: tuple[int, int] | None) -> Image.Image:
    """A page and its neighbours, or a file and its neighbours in the folder, as three channels."""
    if read_header(file, reading.megapixels).frames > 1:
        pages = [(file, f) for f in _near(file, frame, reading)]
    else:
        pages = [(f, 0) for f in volumes.neighbours(file)]
    planes = []
    for name, page in pages:
        with _open(name, reading.megapixels) as image:
            _seek(image, name, page)
            deep = _deep(image) == "grey"
            turn = _turn(image, size)
            plane = image if deep else image.convert("L")
            planes.append(np.asarray(plane if turn is None else plane.transpose(turn)))
    return _channels(planes, reading)


def _channels(planes: Sequence[np.ndarray], reading: Reading) -> Image.Image:
    """One or three planes of one size, scaled together -> RGB."""
    if len({plane.shape for plane in planes}) > 1:
        raise ValueError("neighbouring slices have other sizes")
    values = to_bytes(np.stack(planes, -1), reading.window)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3))))


def _unreadable(file: Path, error: Exception) -> DataError:
    if isinstance(error, Image.DecompressionBombError):
        return DataError(
            f"picture {file} has more than {MOST_MEGAPIXELS} megapixels, which Pillow refuses to decode: "
            f"make it smaller, or cut it into tiles"
        )
    if file.suffix.lower() in _HEIC and not _read_heic():
        return DataError(
            f"picture {file} is HEIC, which needs a reader: pip install pillow-heif, or save it as JPEG"
        )
    unknown = isinstance(error, UnidentifiedImageError)
    text = "no known format of pictures" if unknown else " ".join(str(error).split())
    reason = _foreign(file) or text or type(error).__name__
    return DataError(
        f"picture {file} cannot be read ({reason}): replace the file, or take it out of the JSON"
    )


def _foreign(file: Path) -> str:
    """What a file is, by its first bytes, that is no picture at all."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64).lstrip().lower()
    except OSError:
        return ""
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run `git lfs pull`"
    return "it is a web page" if head.startswith((b"<!doctype html", b"<html")) else ""


def other_size(file: Path, found: tuple[int, int], stated: tuple[int, int]) -> DataError:
    """The sentence for a picture of another size than its annotations state."""
    turned = ", width and height exchanged" if tuple(found) == tuple(stated)[::-1] else ""
    return DataError(
        f"picture {file} is {found[0]} x {found[1]} pixels, its annotations are for "
        f"{stated[0]} x {stated[1]}{turned}: export pictures and annotations together"
    )


def no_frame(file: Path, frames: int, frame: int) -> DataError:
    """The sentence for a frame that a file does not have."""
    return DataError(
        f"picture {file} has {frames} frames, counted from 0; frame {frame} is asked for: correct "
        f"`frame` in the JSON, or --frame"
    )
