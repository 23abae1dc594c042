"""The model ready to be asked: compiled once, a picture encoded once for all its phrases.

Validation in training, `evaluate` and `predict` all come through here, so what the log says is what
the saved model does. Pictures are split over the devices of a mesh.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sam3jax.config import EvalConfig
from sam3jax.inference.candidates import Candidates, top_candidates
from sam3jax.model import Sam3
from sam3jax.types import AXIS, Batch, ImageFeatures, Prompts, TextFeatures

Variables = Any  # {"params": ..., "lora": ...}


class Detector:
    """Jitted parts of a model. `variables` is an argument everywhere: weights may change freely.

    mesh: devices of this process; None: its first one. limit: detections kept of each pair, default
    config.max_detections; data with more instances than that in a picture need more.
    """

    def __init__(
        self, model: Sam3, config: EvalConfig, mesh: Mesh | None = None, *, limit: int | None = None
    ) -> None:
        self.mesh = mesh or Mesh(np.array(jax.local_devices()[:1]), (AXIS,))
        self.model = model
        self._options = _Options(limit or config.max_detections, config.nms, config.mask_threshold)

    def place(self, variables: Any) -> Any:
        """Weights on every device of the mesh; what lies there already is not copied."""
        sharding = NamedSharding(self.mesh, P())
        devices = list(self.mesh.devices.flat)

        def put(x: Any) -> jax.Array:
            if isinstance(x, jax.Array) and x.sharding.is_fully_replicated:
                shards = {s.device: s.data for s in x.addressable_shards}
                if shards.keys() >= set(devices):
                    own = [shards[d] for d in devices]
                    return jax.make_array_from_single_device_arrays(x.shape, sharding, own)
            return jax.device_put(x, sharding)

        return jax.tree.map(put, variables)

    def encode_image(self, variables: Variables, images: np.ndarray) -> ImageFeatures:
        """images [I, Y, X, 3] uint8, squashed to the model's square; I a multiple of the mesh's size."""
        return _encode_image(self.model, self.mesh, "encode_image", variables, images)

    def encode_trunk(self, variables: Variables, images: np.ndarray) -> jax.Array:
        """images as for `encode_image` -> the trunk's features [I, y, x, D], which clicks read too."""
        return _encode_image(self.model, self.mesh, "encode_trunk", variables, images)

    def from_trunk(self, variables: Variables, features: jax.Array) -> ImageFeatures:
        """Features of `encode_trunk` -> what `encode_image` gives."""
        return _encode_image(self.model, self.mesh, "from_trunk", variables, features)

    def encode_text(self, variables: Variables, tokens: np.ndarray) -> TextFeatures:
        """tokens [V, N]."""
        return encode_text(self.model, variables, tokens)

    def ask(
        self, variables: Variables, image: ImageFeatures, text: TextFeatures, prompts: Prompts
    ) -> Candidates:
        """The strongest detections of B = I * P pairs."""
        return _ask(self.model, self.mesh, self._options, variables, image, text, prompts)

    def rows(self, tree: Any) -> Any:
        """Arrays [I, ...] split over the mesh."""
        return jax.device_put(tree, NamedSharding(self.mesh, P(AXIS)))


class _Options(NamedTuple):
    limit: int
    nms: float | None
    mask_threshold: float


# The model is a static argument: two detectors of one model share what is compiled.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _encode_image(
    model: Sam3, mesh: Mesh, method: str, variables: Variables, images: jax.Array
) -> Any:
    def encode(variables: Variables, images: jax.Array) -> Any:
        return model.apply(variables, images, method=method)

    split = jax.shard_map(encode, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
    return split(variables, images)


@partial(jax.jit, static_argnums=0)
def encode_text(model: Sam3, variables: Variables, tokens: jax.Array) -> TextFeatures:
    """Phrases [V, N] -> TextFeatures, where the weights lie."""
    found: Any = model.apply(variables, tokens, method="encode_text")
    return found


@partial(jax.jit, static_argnums=(0, 1, 2))
def _ask(
    model: Sam3,
    mesh: Mesh,
    options: _Options,
    variables: Variables,
    image: ImageFeatures,
    text: TextFeatures,
    prompts: Prompts,
) -> Candidates:
    def ask(variables, image, text, prompts) -> Candidates:
        outputs: Any = model.apply(variables, image, text, prompts, method="detect")
        return top_candidates(
            outputs, limit=options.limit, nms=options.nms, mask_threshold=options.mask_threshold
        )

    specs = (P(), P(AXIS), P(), P(AXIS))
    split = jax.shard_map(ask, mesh=mesh, in_specs=specs, out_specs=P(AXIS))
    return split(variables, image, text, prompts)


class BatchDetector:
    """Runs a detector over batches with fixed weights; what was just encoded is not encoded again.

    A data set of many categories asks the same picture in several rows, one after the other.
    text: the encoded phrases of all batches, where they are known already.
    """

    def __init__(
        self, detector: Detector, variables: Variables, text: TextFeatures | None = None
    ) -> None:
        self._detector, self._variables = detector, detector.place(variables)
        self._text: Any = None if text is None else detector.place(text)
        self._fixed_text = text is not None
        self._tokens: np.ndarray | None = None
        self._ids: np.ndarray | None = None
        self._image: Any = None  # ImageFeatures of the batch before

    def __call__(self, batch: Batch) -> Candidates:
        """batch: its number of pictures is a multiple of the mesh's size."""
        ask = self._detector
        tokens, ids = np.asarray(batch.tokens), np.asarray(batch.image_id)
        if not self._fixed_text and (
            self._tokens is None or not np.array_equal(tokens, self._tokens)
        ):
            self._text = ask.encode_text(self._variables, tokens)
            self._tokens = tokens
        if self._ids is None or not np.isin(ids, self._ids).all():
            self._image = ask.encode_image(self._variables, ask.rows(batch.images))
            self._ids = ids
        elif not np.array_equal(ids, self._ids):
            chosen = np.array([int(np.flatnonzero(self._ids == i)[0]) for i in ids])
            self._image = ask.rows(jax.tree.map(lambda level: level[chosen], self._image))
            self._ids = ids
        return ask.ask(self._variables, self._image, self._text, ask.rows(batch.prompts))
