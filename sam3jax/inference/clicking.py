"""The interactive heads ready to be asked: compiled once, a picture encoded once for all its prompts."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam3jax.inference.click_rounds import CLAMP
from sam3jax.losses.resample import resize_bilinear
from sam3jax.model import Interactive
from sam3jax.model.mask_decoder import choose, stability
from sam3jax.types import ClickFeatures

Variables = Any  # {"params": ..., "lora": ...}


class Answers(NamedTuple):
    """Of B prompts, M masks each: masks [B, M, Y, X] bool at the picture's size; ious [B, M] as
    predicted; logits [B, M, 4g, 4g], to be shown again; stability [B, M]; score [B], logit of the
    object being there."""

    masks: np.ndarray
    ious: np.ndarray
    logits: np.ndarray
    stability: np.ndarray
    score: np.ndarray


class Prompted(NamedTuple):
    """Prompts of one picture as the model reads them, padded: points [B, A, 2] in its pixels,
    labels [B, A], mask [B, 4g, 4g], has_mask [B]."""

    points: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    has_mask: np.ndarray


# The model is a static argument: two predictors of one model share what is compiled.
@partial(jax.jit, static_argnums=0)
def encode_picture(model: Interactive, variables: Variables, image: jax.Array) -> ClickFeatures:
    """image [1, Y, X, 3] uint8, squashed to the model's square."""
    features: Any = model.apply(variables, image, method="encode_image")
    return features


@partial(jax.jit, static_argnums=0)
def from_trunk(model: Interactive, variables: Variables, trunk: jax.Array) -> ClickFeatures:
    """trunk [1, y, x, D]: what `Detector.encode_trunk` made of the picture."""
    features: Any = model.apply(variables, trunk, method="from_trunk")
    return features


def decode(
    model: Interactive,
    variables: Variables,
    features: ClickFeatures,
    prompts: Prompted,
    size: tuple[int, int],
    *,
    multimask: bool,
    offset: float,
) -> Answers:
    """Answers at `size` (rows, columns) of the picture; offset: of `stability`, in logits."""
    rows = len(prompts.labels)
    room = 1 << (rows - 1).bit_length()  # few shapes to compile for
    padded = Prompted(*(np.concatenate([x, *[x[-1:]] * (room - rows)]) for x in prompts))
    found = _decode(model, multimask, offset, variables, features, padded)
    masks, ious, stable, score = jax.tree.map(lambda x: np.asarray(x)[:rows], found)
    return Answers(enlarged(masks, size), ious, masks, stable, score)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(model, multimask, offset, variables, features, prompts: Prompted):
    picture = jnp.zeros(len(prompts.labels), jnp.int32)
    shown = jnp.clip(prompts.mask, -CLAMP, CLAMP)
    answer = model.apply(
        variables, features, picture, prompts.points, prompts.labels, shown, prompts.has_mask,
        method="decode",
    )  # fmt: skip
    masks, ious = choose(answer, multimask, train=False)
    return masks, ious, stability(masks, offset), answer.score


def enlarged(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where logits [B, M, y, x] are positive at another size; a few at a time, they are large."""
    return np.stack([np.asarray(_positive(row, size)) for row in logits])


@partial(jax.jit, static_argnums=1)
def _positive(logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    return resize_bilinear(logits, size) > 0
