"""A model that is asked about whole videos: phrases in, objects frame by frame out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sam3jax.config import EvalConfig
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.inference.detector import Detector
from sam3jax.model import Sam3
from sam3jax.types import AXIS, Prompts, TextFeatures
from sam3jax.video.association import RELEASED, Rules
from sam3jax.video.chunks import (
    NMS_IOU,
    ChunkOptions,
    FrameDetections,
    Levels,
    Thresholds,
    VideoDetector,
)
from sam3jax.video.objects import VideoFrame, full_size_frames
from sam3jax.video.tracks import follow

_SPARE = 1.5  # times the phrases asked, up to which a program compiled for more is taken


class VideoPredictor:
    """Finds phrases in videos, the frames spread over the devices of a mesh (default: all devices).

    thresholds: phrase -> score from which a detection counts; others use config.threshold. nms: overlap
    of masks from which the weaker of two finds of a phrase is left out. options: by default
    config.max_detections of each phrase. levels: a tracker's input, from `detections` alone.
    """

    def __init__(
        self,
        model: Sam3,
        variables: Any,
        tokenizer: Tokenizer,
        config: EvalConfig | None = None,
        thresholds: Mapping[str, float] | None = None,
        *,
        mesh: Mesh | None = None,
        nms: float = NMS_IOU,
        options: ChunkOptions | None = None,
        levels: Levels | None = None,
        rules: Rules = RELEASED,
    ) -> None:
        self.config = config or EvalConfig()
        self.options = options or ChunkOptions(keep=self.config.max_detections)
        self.thresholds, self.nms, self.rules = dict(thresholds or {}), nms, rules
        self._mesh = mesh or Mesh(np.array(jax.local_devices()), (AXIS,))
        self._detector = Detector(model, self.config, self._mesh)
        self._variables, self._tokenizer = self._detector.place(variables), tokenizer
        self._levels = levels
        self._texts: dict[str, TextFeatures] = {}
        self._sizes: set[int] = set()  # numbers of phrases that programs are there for

    def detections(
        self, frames: Sequence[np.ndarray], phrases: Sequence[str], reverse: bool = False
    ) -> Iterator[tuple[int, FrameDetections]]:
        """(number, detections of each phrase) of each frame, at the model's size, no identities."""
        rows = self._rows(len(phrases))
        asked = [*phrases, *[phrases[-1]] * (rows - len(phrases))]
        detector = VideoDetector(
            self._detector.model,
            self._variables,
            jax.tree.map(lambda *x: np.concatenate(x), *map(self._encode, asked)),
            prompts_of(len(phrases), rows),
            self._mesh,
            self.options,
            Thresholds(np.array([self._threshold(p) for p in asked]), self.nms),
            self._levels,
        )
        for number, found in detector.detections(frames, reverse):
            yield number, found.of_phrases(len(phrases))

    def objects(
        self, frames: Sequence[np.ndarray], phrases: Sequence[str], reverse: bool = False
    ) -> Iterator[VideoFrame]:
        """The objects of each frame with their identities: plain tracking by detection.

        frames: [Y, X, 3] uint8 by number, with a length (`data.frames.open_frames`, a list, an array).
        Comes as many frames late as rules.hot_start says; with `reverse` from the last frame.
        """
        if not len(frames):
            return
        height, width = frames[0].shape[:2]
        found = self.detections(frames, phrases, reverse)
        scores = [self._threshold(p) for p in phrases]
        tracks = follow(found, threshold=scores, rules=self.rules, reverse=reverse)
        yield from full_size_frames(tracks, phrases, width, height, self.config.mask_threshold)

    def _threshold(self, phrase: str) -> float:
        return self.thresholds.get(phrase, self.config.threshold)

    def _encode(self, phrase: str) -> TextFeatures:
        """On the host, [1, N, D]; each phrase once."""
        if phrase not in self._texts:
            found = self._detector.encode_text(self._variables, self._tokenizer([phrase]))
            self._texts[phrase] = jax.device_get(found)
        return self._texts[phrase]

    def _rows(self, phrases: int) -> int:
        """How many phrases are asked with these: a program for a few more need not be compiled."""
        fitting = [n for n in self._sizes if phrases <= n <= _SPARE * phrases]
        rows = min(fitting, default=phrases)
        self._sizes.add(rows)
        return rows


def prompts_of(phrases: int, rows: int) -> Prompts:
    """One picture's prompts: each of the phrases once, no exemplars; rows behind them are not asked."""
    return Prompts(
        text_id=np.arange(rows, dtype=np.int32)[None],
        valid=np.arange(rows)[None] < phrases,
        boxes=np.zeros((1, rows, 0, 4), np.float32),
        box_labels=np.zeros((1, rows, 0), np.int32),
        box_valid=np.zeros((1, rows, 0), bool),
    )
