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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from sam3jax.config import Config, EvalConfig
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.files import write_json
from sam3jax.inference.postprocess import Candidates, top_candidates
from sam3jax.model import Sam3
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
    from sam3jax.weights.checkpoints import load_run

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
    write_json(Path(run) / THRESHOLDS_FILE, dict(thresholds))


class Detector:
    """Jitted parts of a model. `variables` is an argument everywhere: weights may change freely.

    limit: detections kept of each pair, default config.max_detections; data with more instances
    than that in a picture need more.
    """

    def __init__(self, model: Sam3, config: EvalConfig, *, limit: int | None = None) -> None:
        self.model = model
        self._options = _Options(limit or config.max_detections, config.nms, config.mask_threshold)

    def encode_image(self, variables: Variables, images: np.ndarray) -> ImageFeatures:
        """images [I, Y, X, 3] uint8, squashed to the model's square."""
        return _encode_image(self.model, variables, images)

    def encode_text(self, variables: Variables, tokens: np.ndarray) -> TextFeatures:
        """tokens [V, N]."""
        return _encode_text(self.model, variables, tokens)

    def ask(
        self, variables: Variables, image: ImageFeatures, text: TextFeatures, prompts: Prompts
    ) -> Candidates:
        """The strongest detections of B = I * P pairs."""
        return _ask(self.model, self._options, variables, image, text, prompts)


class _Options(NamedTuple):
    limit: int
    nms: float | None
    mask_threshold: float


# The model is a static argument: two detectors of one model share what is compiled.
@partial(jax.jit, static_argnums=0)
def _encode_image(model: Sam3, variables: Variables, images: jax.Array) -> ImageFeatures:
    return model.apply(variables, images, method="encode_image")


@partial(jax.jit, static_argnums=0)
def _encode_text(model: Sam3, variables: Variables, tokens: jax.Array) -> TextFeatures:
    return model.apply(variables, tokens, method="encode_text")


@partial(jax.jit, static_argnums=(0, 1))
def _ask(
    model: Sam3,
    options: _Options,
    variables: Variables,
    image: ImageFeatures,
    text: TextFeatures,
    prompts: Prompts,
) -> Candidates:
    outputs = model.apply(variables, image, text, prompts, method="detect")
    return top_candidates(
        outputs, limit=options.limit, nms=options.nms, mask_threshold=options.mask_threshold
    )


class BatchDetector:
    """Runs a detector over batches with fixed weights; what was just encoded is not encoded again.

    A data set of many categories asks the same picture in several rows, one after the other.
    Weights that lie on several devices of this process: a batch is spread over them where its
    pictures divide among them, else one device does the work.
    """

    def __init__(self, detector: Detector, variables: Variables) -> None:
        self._detector, self._variables = detector, variables
        self._mesh = _mesh_of(variables)
        self._placed: tuple[Variables, Sharding | None] | None = None
        self._tokens: np.ndarray | None = None
        self._text: TextFeatures | None = None
        self._ids: np.ndarray | None = None
        self._image: ImageFeatures | None = None

    def __call__(self, batch: Batch) -> Candidates:
        tokens, ids = np.asarray(batch.tokens), np.asarray(batch.image_id)
        if self._placed is None:  # batches of a loader are of one size
            self._placed = _place(self._variables, self._mesh, len(ids))
        variables, rows = self._placed
        put = lambda tree: tree if rows is None else jax.device_put(tree, rows)
        if self._tokens is None or not np.array_equal(tokens, self._tokens):
            self._text = self._detector.encode_text(variables, tokens)
            self._tokens = tokens
        if self._ids is None or not np.isin(ids, self._ids).all():
            self._image = self._detector.encode_image(variables, put(batch.images))
            self._ids = ids
        elif not np.array_equal(ids, self._ids):
            chosen = jnp.asarray([int(np.flatnonzero(self._ids == i)[0]) for i in ids])
            self._image = put(jax.tree.map(lambda level: level[chosen], self._image))
            self._ids = ids
        return self._detector.ask(variables, self._image, self._text, put(batch.prompts))


def _mesh_of(variables: Variables) -> Mesh | None:
    """The mesh over which weights are replicated, None where they lie on one device."""
    for leaf in jax.tree.leaves(variables):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh if sharding.is_fully_replicated else None
    return None


def _place(
    variables: Variables, mesh: Mesh | None, pictures: int
) -> tuple[Variables, Sharding | None]:
    """Weights as this process uses them, and how the rows of a batch are spread (None: not)."""
    if mesh is None:
        return jax.device_put(variables), None  # once, not with every batch
    if jax.process_count() == 1 and pictures % mesh.size == 0:
        return variables, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    # Each process asks about pictures of its own, so it computes with its own copy.
    own = lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf
    return jax.tree.map(own, variables), None
