"""In which order the frames of a video are worked off: aligned chunks of W frames, both ways.

Answers to Sam3ImageOnVideoMultiGPU.forward_video_grounding_multigpu (sam3.model.sam3_image).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Chunk(NamedTuple):
    """Frames first..stop - 1, worked off together; at most W of them."""

    first: int
    stop: int

    def frames(self, reverse: bool = False) -> tuple[int, ...]:
        """The frames in the order in which they are handed out."""
        frames = range(self.first, self.stop)
        return tuple(reversed(frames) if reverse else frames)

    def rows(self, width: int) -> tuple[int, ...]:
        """The frame of each of `width` rows of the batch; the last one is repeated where there are fewer.

        >>> Chunk(8, 10).rows(4)
        (8, 9, 9, 9)
        """
        return tuple(min(self.first + row, self.stop - 1) for row in range(width))


def chunks(num_frames: int, width: int, reverse: bool = False) -> Iterator[Chunk]:
    """Chunks that begin at multiples of `width`; the ragged one is the last of the video.

    Backwards the ragged chunk therefore comes first, and every frame lies in the same chunk both ways.

    >>> [tuple(c) for c in chunks(10, 4)]
    [(0, 4), (4, 8), (8, 10)]
    >>> [tuple(c) for c in chunks(10, 4, reverse=True)]
    [(8, 10), (4, 8), (0, 4)]
    """
    if width < 1:
        raise ValueError(f"a chunk of {width} frames: expected at least 1")
    starts = range(0, num_frames, width)
    for first in reversed(starts) if reverse else starts:
        yield Chunk(first, min(first + width, num_frames))
