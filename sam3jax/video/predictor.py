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
from sam3jax.types import AXIS, Prompts
from sam3jax.video.association import RELEASED, Rules
from sam3jax.video.chunks import ChunkOptions, FrameDetections, VideoDetector
from sam3jax.video.objects import VideoFrame, full_size_frames
from sam3jax.video.tracks import follow


class VideoPredictor:
    """Finds phrases in videos, the frames spread over the devices of a mesh (default: all devices).

    thresholds: phrase -> score from which a detection counts; others use config.threshold.
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
        options: ChunkOptions = ChunkOptions(),  # noqa: B008 - a constant
        rules: Rules = RELEASED,
    ) -> None:
        self.config = config or EvalConfig()
        self.thresholds, self.rules, self.options = dict(thresholds or {}), rules, options
        self._model, self._variables, self._tokenizer = model, variables, tokenizer
        self._mesh = mesh or Mesh(np.array(jax.local_devices()), (AXIS,))
        self._detectors: dict[tuple, VideoDetector] = {}

    def detections(
        self, frames: Sequence[np.ndarray], phrases: Sequence[str], reverse: bool = False
    ) -> Iterator[tuple[int, FrameDetections]]:
        """(number, detections of each phrase) of each frame, at the model's size, no identities."""
        return self._detector(tuple(phrases)).detections(frames, reverse)

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

    def _detector(self, phrases: tuple[str, ...]) -> VideoDetector:
        least = min(map(self._threshold, phrases))
        key = (phrases, least)
        if key not in self._detectors:
            tokens = self._tokenizer(list(phrases))
            text = Detector(self._model, self.config).encode_text(self._variables, tokens)
            options = self.options._replace(prob_threshold=least)
            self._detectors = {  # of the last phrases only
                key: VideoDetector(
                    self._model,
                    self._variables,
                    text,
                    prompts_of(len(phrases)),
                    self._mesh,
                    options,
                )
            }
        return self._detectors[key]


def prompts_of(phrases: int) -> Prompts:
    """One picture's prompts: each of the phrases once, no exemplars."""
    return Prompts(
        text_id=np.arange(phrases, dtype=np.int32)[None],
        valid=np.ones((1, phrases), bool),
        boxes=np.zeros((1, phrases, 0, 4), np.float32),
        box_labels=np.zeros((1, phrases, 0), np.int32),
        box_valid=np.zeros((1, phrases, 0), bool),
    )
