"""The model ready to be asked: compiled once, a picture encoded once for all its phrases.

Validation in training, `evaluate` and `predict` all come through here, so what the log says is what
the saved model does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3jax.config import Config, EvalConfig
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.model import Sam3
from sam3jax.postprocess import Candidates, top_candidates
from sam3jax.types import Batch, ImageFeatures, Prompts, TextFeatures

Variables = Any  # {"params": ..., "lora": ...}
THRESHOLDS_FILE = "thresholds.json"


@dataclass(frozen=True)
class LoadedRun:
    """A run folder in memory. variables: tuned, best checkpoint; base_variables: where it began."""

    path: Path
    config: Config
    model: Sam3
    variables: Variables
    base_variables: Variables
    tokenizer: Tokenizer
    step: int
    thresholds: dict[str, float] = field(default_factory=dict)


def open_run(path: str | Path) -> LoadedRun:
    """Load a run folder with the thresholds chosen for it."""
    from sam3jax.checkpoint import load_run

    run = load_run(path)
    return LoadedRun(
        path=Path(path),
        config=run.config,
        model=run.model,
        variables=run.variables,
        base_variables=run.base_variables,
        tokenizer=run.tokenizer,
        step=run.step,
        thresholds=read_thresholds(path),
    )


def read_thresholds(run: str | Path) -> dict[str, float]:
    """Category name -> score threshold chosen on validation; empty where none was chosen yet."""
    file = Path(run) / THRESHOLDS_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def write_thresholds(run: str | Path, thresholds: Mapping[str, float]) -> None:
    (Path(run) / THRESHOLDS_FILE).write_text(json.dumps(dict(thresholds), indent=1))


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
