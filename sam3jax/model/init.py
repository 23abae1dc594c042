"""Random weights for a detector that learns from nothing; and the shapes of its tree.

Values are drawn on the host, leaf by leaf: compiling the model's own `init` takes a minute, and
what it would draw is the same for every leaf of a kind.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3jax.config import ModelConfig
from sam3jax.model.interactive import ROOTS, Interactive
from sam3jax.model.sam3 import Sam3
from sam3jax.types import Prompts

DETECTOR = "detector"


@functools.lru_cache(maxsize=16)
def parameter_shapes(config: ModelConfig, parts: tuple[str, ...] = (DETECTOR,)) -> dict[str, Any]:
    """The parameter tree of these parts as `jax.ShapeDtypeStruct`; nothing is computed."""
    tree: dict[str, Any] = {}
    for part in parts:
        if part == DETECTOR:
            tree |= _detector_shapes(config)
        else:
            shapes = _interactive_shapes(config)
            tree |= {root: shapes[root] for root in ROOTS[part]}
    return tree


@functools.lru_cache(maxsize=4)
def _detector_shapes(config: ModelConfig) -> dict[str, Any]:
    zeros = jnp.zeros
    prompts = Prompts(
        text_id=zeros((1, 1), jnp.int32), valid=zeros((1, 1), bool), boxes=zeros((1, 1, 1, 4)),
        box_labels=zeros((1, 1, 1), jnp.int32), box_valid=zeros((1, 1, 1), bool),
    )  # fmt: skip

    def init(key):
        images = zeros((1, config.image_size, config.image_size, 3))
        tokens = zeros((1, config.text_length), jnp.int32)
        return Sam3(config).init(key, images, tokens, prompts)["params"]

    return jax.eval_shape(init, jax.random.key(0))


@functools.lru_cache(maxsize=4)
def _interactive_shapes(config: ModelConfig) -> dict[str, Any]:
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    picture, points, labels = (jnp.zeros(s, jnp.int32) for s in ((1,), (1, 1, 2), (1, 1)))
    masks = jnp.zeros((1, 4 * config.grid, 4 * config.grid))

    def init(key):
        return Interactive(config).init(key, images, picture, points, labels, masks)["params"]

    return jax.eval_shape(init, jax.random.key(0))


def init_params(
    config: ModelConfig, seed: int, parts: tuple[str, ...] = (DETECTOR,)
) -> dict[str, Any]:
    """Float32 numpy parameters: Xavier for products, ones and zeros for norms, normal embeddings.

    As published, the box head ends in zeros: every query starts at its own reference box. A part's
    values do not depend on which other parts are drawn.
    """
    tree: dict[str, Any] = {}
    for part in parts:
        own = seed if part == DETECTOR else [seed, list(ROOTS).index(part)]
        tree |= _draw(parameter_shapes(config, (part,)), np.random.default_rng(own))
    return tree


def _draw(shapes: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        *owners, name = (key.key for key in path)
        shape = leaf.shape
        if name == "scale":
            return np.ones(shape, np.float32)
        if name == "bias" or owners[-2:] == ["bbox_embed", "layers_2"]:
            return np.zeros(shape, np.float32)
        if name != "kernel":
            wide = name in (
                "query_embed",
                "reference_points",
                "label_embed",
                "cls_embed",
                "presence_token",
                "frequencies",
                "point_embed",
                "not_a_point_embed",
                "no_mask_embed",
                "iou_token",
                "mask_tokens",
                "obj_score_token",
            )
            return rng.normal(0.0, 1.0 if wide else 0.02, shape).astype(np.float32)
        # Stacked kernels have their layers in front; convolutions sum over rows and columns too.
        # An upsampling kernel [D, 2, 2, E] reads D.
        if "dconv" in owners[-1] or owners[-1] in ("output_upscaling_0", "output_upscaling_3"):
            fan_in, fan_out = shape[0], shape[3]
        else:
            taps = (
                np.prod(shape[:2])
                if any(word in owners[-1] for word in ("conv", "seg_head", "pool", "downscaling"))
                else 1
            )
            fan_in, fan_out = shape[-2] * taps, shape[-1] * taps
        bound = np.sqrt(6.0 / (fan_in + fan_out))
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)
