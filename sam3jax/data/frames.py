"""The frames of a video: picture files, or a film decoded by PyAV. One at a time, never all of them.

A source has a length and gives frame `k` as [Y, X, 3] uint8. Forward reading decodes each frame of a
film once; any other order seeks. PyAV is an optional extra (`pip install sam3jax[video]`).
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sam3jax.data.folders import PICTURES, entries
from sam3jax.data.pictures import DEFAULT, DataError, Reading, displayed_size, open_rgb
from sam3jax.data.records import ImageRecord

FILMS = frozenset((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"))
_SKIP = 32  # frames decoded and dropped rather than sought
_BACK = (0, 1, 4, 16, None)  # seconds in front of a key frame that are sought; None: the start
_FROM_START = ("mpeg", "mpegvideo")  # their times are guesses behind a place that was sought
_DEFAULT_RATE = 10.0  # frames per second of a folder of pictures


class Frames(Protocol):
    """A video's frames. width, height in pixels; rate in frames per second."""

    width: int
    height: int
    rate: float

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> np.ndarray: ...

    def sources(self, number: int) -> list[Path]:
        """The files that a frame follows from."""
        ...


class FrameFiles(Sequence[np.ndarray]):
    """Pictures of one size in their order; the first one's header says which size.

    reading: how files become pixels.
    """

    def __init__(
        self, files: Sequence[Path], rate: float = _DEFAULT_RATE, reading: Reading = DEFAULT
    ) -> None:
        if not files:
            raise DataError("a video without a frame: give at least one picture")
        self.files, self.rate, self.reading = tuple(files), rate, reading
        self.width, self.height = displayed_size(self.files[0])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> np.ndarray:
        picture = open_rgb(self.files[number], reading=self.reading)
        if picture.size != (self.width, self.height):
            raise DataError(
                f"frame {self.files[number]} is {picture.size[0]} x {picture.size[1]} pixels, the "
                f"first frame {self.width} x {self.height}: all frames of a video must have one "
                f"size; resize them, or split the video"
            )
        return np.asarray(picture)

    def sources(self, number: int) -> list[Path]:
        return [self.files[number]]


class Still(Sequence[np.ndarray]):
    """A picture of a data set as a video of one frame."""

    rate = 1.0

    def __init__(self, record: ImageRecord) -> None:
        self._record, self.width, self.height = record, record.width, record.height

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> np.ndarray:
        if number not in (0, -1):
            raise IndexError(number)
        return np.asarray(self._record.open())

    def sources(self, number: int) -> list[Path]:
        return self._record.sources


class Film(Sequence[np.ndarray]):
    """A film file. Opened where it is first read, and anew in each process."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"no film {self.path}: check the path")
        self._lock = threading.Lock()
        self._decoder: Iterator[Any] | None = None
        self._container: Any = None
        self._next = 0
        av = _pyav(self.path)
        try:
            with av.open(str(self.path)) as container:
                stream = _stream(container, self.path)
                self._sought = container.format.name not in _FROM_START
                self.rate = float(stream.average_rate or _DEFAULT_RATE)
                # Packets are counted, not decoded: what the header says of the number is often wrong.
                # A film that was cut without encoding it again holds some that no player shows.
                found = [
                    (p.pts, p.is_keyframe, p.is_discard)
                    for p in container.demux(stream)
                    if p.pts is not None and p.size
                ]
        except (av.FFmpegError, OSError) as error:
            raise _broken(self.path, error) from error
        self._times = sorted({time for time, _, hidden in found if not hidden})
        self._keys = sorted({time for time, key, _ in found if key})
        if not self._times:
            raise DataError(f"film {self.path} holds no frame: encode it again, for example to mp4")
        first = self[0]
        self.height, self.width = first.shape[:2]

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, number: int) -> np.ndarray:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        with self._lock:
            av = _pyav(self.path)
            try:
                return self._read(number)
            except (av.FFmpegError, OSError, StopIteration) as error:
                self.close()
                raise DataError(
                    f"frame {number} of {len(self)} of film {self.path} cannot be decoded "
                    f"({_reason(error)}): the file is damaged there; encode it again, or cut it before"
                ) from error

    def close(self) -> None:
        """Close the file; the next frame opens it again."""
        if self._container is not None:
            self._container.close()
        self._container = self._decoder = None

    def __getstate__(self) -> dict[str, Any]:
        lost = {"_lock", "_decoder", "_container"}
        return {k: v for k, v in self.__dict__.items() if k not in lost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._decoder, self._container = threading.Lock(), None, None

    def sources(self, number: int) -> list[Path]:
        return [self.path]

    def _read(self, number: int) -> np.ndarray:
        if self._decoder is None or not 0 <= number - self._next <= _SKIP:
            self._seek(number)
        assert self._decoder is not None
        while True:
            frame = next(self._decoder)
            place = bisect_right(self._times, frame.pts) - 1
            self._next = place + 1
            if place >= number:
                return _upright(frame)

    def _seek(self, number: int) -> None:
        """Stand before the frame, at the key frame in front of it or before that one.

        Formats without an index land behind what is sought: then further back, at last from the start.
        """
        time = self._times[number]
        key = self._keys[max(bisect_right(self._keys, time) - 1, 0)] if self._keys else time
        key = max(key, self._times[0])  # what comes before is not shown
        for seconds in _BACK if self._sought else (None,):
            decoder = self._decode_from(None if seconds is None else (key, seconds))
            first = next(decoder, None)
            if first is not None and (first.pts <= key or seconds is None):
                self._decoder = chain([first], decoder)
                return
        raise StopIteration

    def _decode_from(self, place: tuple[int, int] | None) -> Iterator[Any]:
        """Frames from so many seconds before a time on, or none where that cannot be sought; None: all."""
        if place is None:
            self.close()
        av = _pyav(self.path)
        self._container = self._container or av.open(str(self.path))
        stream = _stream(self._container, self.path)
        if place is not None:
            time = place[0] - round(place[1] / (stream.time_base or 1))
            try:
                self._container.seek(time, stream=stream, backward=True)
            except (av.FFmpegError, OSError):
                return iter(())
        return iter(self._container.decode(stream))


def open_frames(path: str | Path, reading: Reading = DEFAULT) -> FrameFiles | Film:
    """A folder of pictures, one picture, or a film. Raises DataError."""
    path = Path(path).expanduser()
    if path.is_dir():
        files = frame_files(path)
        if not files:
            raise DataError(
                f"folder {path} holds no frame ({' '.join(sorted(PICTURES))}): give the folder in "
                f"which the pictures lie, or a film"
            )
        return FrameFiles(files, reading=reading)
    if path.suffix.lower() in PICTURES and path.is_file():
        return FrameFiles([path], reading=reading)
    return Film(path)


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their numbers, without what macOS or an editor left there."""
    files = (f for f in entries(folder) if f.suffix.lower() in PICTURES and f.is_file())
    return sorted(files, key=by_number)


def is_film(path: str | Path) -> bool:
    return Path(path).suffix.lower() in FILMS


def by_number(file: Path) -> tuple:
    """Sorting key: frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", file.name)
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in parts)


def _pyav(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"film {path} needs PyAV: pip install 'sam3jax[video]', or give a folder of pictures"
        ) from error
    return av


def _stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise DataError(f"film {path} has no video stream: it holds sound or data only")
    return container.streams.video[0]


def _upright(frame: Any) -> np.ndarray:
    """Pixels as players show them: telephones store films turned, with a note."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90) % 4)


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(
        f"film {path} cannot be read ({_reason(error)}): it is damaged or no film; encode it again, "
        f"for example to mp4"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
