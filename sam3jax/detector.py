"""The model ready to be asked: compiled once, a picture encoded once for all its phrases.

Validation in training, `evaluate` and `predict` all come through here, so what the log says is what
the saved model does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3jax.config import EvalConfig
from sam3jax.model import Sam3
from sam3jax.postprocess import Candidates, top_candidates
from sam3jax.types import Batch, ImageFeatures, Prompts, TextFeatures

Variables = Any  # {"params": ..., "lora": ...}


class Detector:
    """Jitted parts of a model. `variables` is an argument everywhere: weights may change freely.

    limit: detections kept of each pair, default config.max_detections; data with more instances
    than that in a picture need more.
    """

    def __init__(self, model: Sam3, config: EvalConfig, *, limit: int | None = None) -> None:
        limit = limit or config.max_detections
        self._encode_image = jax.jit(partial(model.apply, method="encode_image"))
        self._encode_text = jax.jit(partial(model.apply, method="encode_text"))

        def candidates(
            variables: Variables, image: ImageFeatures, text: TextFeatures, prompts: Prompts
        ) -> Candidates:
            outputs = model.apply(variables, image, text, prompts, method="detect")
            return top_candidates(
                outputs, limit=limit, nms=config.nms, mask_threshold=config.mask_threshold
            )

        self._candidates = jax.jit(candidates)

    def encode_image(self, variables: Variables, images: np.ndarray) -> ImageFeatures:
        """images [I, Y, X, 3] uint8, squashed to the model's square."""
        return self._encode_image(variables, images)

    def encode_text(self, variables: Variables, tokens: np.ndarray) -> TextFeatures:
        """tokens [V, N]."""
        return self._encode_text(variables, tokens)

    def ask(
        self, variables: Variables, image: ImageFeatures, text: TextFeatures, prompts: Prompts
    ) -> Candidates:
        """The strongest detections of B = I * P pairs."""
        return self._candidates(variables, image, text, prompts)


class BatchDetector:
    """Runs a detector over batches with fixed weights; what was just encoded is not encoded again.

    A data set of many categories asks the same picture in several rows, one after the other.
    """

    def __init__(self, detector: Detector, variables: Variables) -> None:
        self._detector, self._variables = detector, variables
        self._tokens: np.ndarray | None = None
        self._text: TextFeatures | None = None
        self._ids: np.ndarray | None = None
        self._image: ImageFeatures | None = None

    def __call__(self, batch: Batch) -> Candidates:
        tokens, ids = np.asarray(batch.tokens), np.asarray(batch.image_id)
        if self._tokens is None or not np.array_equal(tokens, self._tokens):
            self._text = self._detector.encode_text(self._variables, tokens)
            self._tokens = tokens
        if self._ids is None or not np.isin(ids, self._ids).all():
            self._image = self._detector.encode_image(self._variables, batch.images)
            self._ids = ids
        elif not np.array_equal(ids, self._ids):
            rows = jnp.asarray([int(np.flatnonzero(self._ids == i)[0]) for i in ids])
            self._image = jax.tree.map(lambda level: level[rows], self._image)
            self._ids = ids
        return self._detector.ask(self._variables, self._image, self._text, batch.prompts)
