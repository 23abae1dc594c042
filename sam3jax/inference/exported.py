"""A detector as StableHLO: three programs and a file of weights that need jax alone, not this package.

    image    weights, picture [1, S, S, 3] uint8 -> levels, finest first
    text     weights, tokens [1, N] int32 -> features [1, N, D], valid [1, N]
    detect   weights, levels, features, valid, boxes [1, G, 4], labels [1, G], shown [1, G]
             -> scores [K], boxes [K, 4], masks [K, Y', X'], strongest first

Boxes are (centre x, centre y, width, height) in 0..1; labels 1 "like this", 0 "not like this"; shown False
where there is no box. Masks are logits: inside above 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from safetensors.flax import save_file

from sam3jax.data.tokenizer import Tokenizer
from sam3jax.inference.candidates import top_candidates
from sam3jax.model import Sam3
from sam3jax.types import ImageFeatures, Prompts, TextFeatures

PLATFORMS = ("cpu", "cuda", "tpu")
ABOUT, WEIGHTS = "model.json", "weights.safetensors"
_BOXES = 4

Weights = Mapping[str, jax.Array]


def functions(model: Sam3, limit: int, nms: float | None) -> dict[str, Callable[..., Any]]:
    """The three programs as functions of plain arrays; weights: name with slashes -> array."""

    def variables(weights: Weights) -> Any:
        return unflatten_dict({tuple(name.split("/")): x for name, x in weights.items()})

    def image(weights: Weights, picture: jax.Array) -> Any:
        found: Any = model.apply(variables(weights), picture, method="encode_image")
        return found.levels

    def text(weights: Weights, tokens: jax.Array) -> Any:
        found: Any = model.apply(variables(weights), tokens, method="encode_text")
        return found.features, found.valid

    def detect(
        weights: Weights,
        levels: Any,
        features: jax.Array,
        valid: jax.Array,
        boxes: jax.Array,
        labels: jax.Array,
        shown: jax.Array,
    ) -> Any:
        prompts = Prompts(
            text_id=jnp.zeros((1, 1), jnp.int32),
            valid=jnp.ones((1, 1), bool),
            boxes=boxes[None],
            box_labels=labels[None],
            box_valid=shown[None],
        )
        known = ImageFeatures(tuple(levels)), TextFeatures(features, valid), prompts
        outputs: Any = model.apply(variables(weights), *known, method="detect")
        found = top_candidates(outputs, limit=limit, nms=nms)
        scores = jnp.where(found.keep, found.scores, 0.0)
        return scores[0], found.boxes[0], found.mask_logits[0]

    return {"image": image, "text": text, "detect": detect}


def write_programs(
    folder: Path,
    model: Sam3,
    variables: Any,
    tokenizer: Tokenizer,
    phrases: Sequence[str],
    *,
    limit: int = 100,
    nms: float | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Write image, text, detect (.stablehlo), weights.safetensors and model.json into a folder.

    limit: K; phrases: whose tokens model.json holds, since the programs take tokens.
    """
    weights = {"/".join(path): jnp.asarray(x) for path, x in flatten_dict(variables).items()}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    size, length = model.config.image_size, model.config.text_length
    array = jax.ShapeDtypeStruct
    part = functions(model, limit, nms)
    picture, tokens = array((1, size, size, 3), jnp.uint8), array((1, length), jnp.int32)
    levels = jax.eval_shape(part["image"], shapes, picture)
    features, valid = jax.eval_shape(part["text"], shapes, tokens)
    boxes = array((1, _BOXES, 4), jnp.float32), array((1, _BOXES), jnp.int32), array((1, _BOXES), bool)  # fmt: skip
    inputs = {"image": (picture,), "text": (tokens,), "detect": (levels, features, valid, *boxes)}
    for name, arguments in inputs.items():
        program = export.export(jax.jit(part[name]), platforms=platforms)(shapes, *arguments)
        (folder / f"{name}.stablehlo").write_bytes(program.serialize())
    save_file(weights, folder / WEIGHTS)
    about = {
        "image_size": size, "text_length": length, "boxes": _BOXES, "detections": limit,
        "platforms": list(platforms), "made_by": "sam3jax export",
        "tokens": {p: tokenizer([p])[0].tolist() for p in phrases},
    }  # fmt: skip
    (folder / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
