"""Videos for people to look at: an MP4 where PyAV is installed, else an animated GIF; and strips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sam3jax.data.pictures import DataError
from sam3jax.viewing import draw

_GIF_FRAMES = 120  # an animated GIF of more is too large to look at
_LARGEST = 1280  # pixels of a film's longer edge


def write_film(path: Path, pictures: Iterable[Image.Image], rate: float) -> Path:
    """Write pictures of one size, one at a time, as `path`.mp4; without PyAV as `path`.gif.

    Returns the file. A GIF holds the first frames only.
    """
    try:
        import av
    except ImportError:
        return _write_gif(path.with_suffix(".gif"), pictures, rate)
    file = path.with_suffix(".mp4")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=max(round(rate), 1))
        stream.pix_fmt = "yuv420p"
        for number, picture in enumerate(pictures):
            picture = _even(picture)
            if number == 0:
                stream.width, stream.height = picture.size
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def overlays(
    frames: Sequence[np.ndarray], instances: Callable[[int], Sequence[draw.Instance]]
) -> Iterable[Image.Image]:
    """Each frame with what `instances(number)` says drawn over it."""
    for number in range(len(frames)):
        yield draw.overlay(frames[number], instances(number), largest=_LARGEST)


def strip(
    frames: Sequence[np.ndarray],
    numbers: Sequence[int],
    rows: Sequence[tuple[str, Callable[[int], Sequence[draw.Instance]]]],
    *,
    height: int = 180,
) -> Image.Image:
    """Chosen frames side by side, one row of them for each of `rows`: truth above, prediction below."""
    sheets = []
    for title, instances in rows:
        parts = []
        for number in numbers:
            picture = frames[number]
            longer = round(height * max(1.0, picture.shape[1] / picture.shape[0]))
            shown = draw.overlay(picture, instances(number), smallest=longer, largest=longer)
            parts.append((f"frame {number}", shown))
        sheets.append(draw.row(parts, title=title, height=height))
    return draw.column(sheets)


def evenly(length: int, count: int) -> list[int]:
    """At most `count` frame numbers of 0..length - 1, evenly, the first and the last among them.

    >>> evenly(10, 4)
    [0, 3, 6, 9]
    """
    if length <= count:
        return list(range(length))
    return [round(k * (length - 1) / max(count - 1, 1)) for k in range(count)]


def _write_gif(file: Path, pictures: Iterable[Image.Image], rate: float) -> Path:
    kept = [
        p.convert("P", palette=Image.Palette.ADAPTIVE) for _, p in zip(range(_GIF_FRAMES), pictures)
    ]
    if not kept:
        raise DataError(f"nothing to show in {file}: the video has no frame")
    kept[0].save(file, save_all=True, append_images=kept[1:], duration=round(1000 / rate), loop=0)
    return file


def _even(picture: Image.Image) -> Image.Image:
    """Most players want even edges: the last row or column goes."""
    width, height = picture.width // 2 * 2, picture.height // 2 * 2
    return picture if picture.size == (width, height) else picture.crop((0, 0, width, height))
