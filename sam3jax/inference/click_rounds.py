"""Rounds of clicks on the objects of a batch as published evaluations make them, on the device.

The records are those of training too (sam3jax.tasks.click_training).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sam3jax import clicks
from sam3jax.clicks import ABSENT
from sam3jax.config import ClicksConfig
from sam3jax.losses.interactive import at_centres, iou_of_masks
from sam3jax.losses.resample import resize_bilinear
from sam3jax.model import Interactive
from sam3jax.model.mask_decoder import choose
from sam3jax.model.prompt_encoder import PADDING
from sam3jax.types import ClickBatch, ClickFeatures, PromptedMasks
from sam3jax.weights.tree import Tree

CLAMP = 32.0  # of a mask that is shown again, at inference


class Objects(NamedTuple):
    """The B objects of a batch as rows: picture [B]; target [B, Y, X] bool; valid [B]; keys [B]."""

    picture: jax.Array
    target: jax.Array
    valid: jax.Array
    keys: jax.Array


class Asked(NamedTuple):
    """What the decoder was shown: points [B, A, 2], labels [B, A], mask [B, 4g, 4g], has_mask [B].

    Places of a row: two corners of a box, the first click, one correction a round, stored points, and
    the published padding token.
    """

    points: jax.Array
    labels: jax.Array
    mask: jax.Array
    has_mask: jax.Array

    @property
    def count(self) -> jax.Array:
        """Points of each row; a box is two."""
        return (self.labels >= 0).sum(1)


class Answer(NamedTuple):
    """A round's result: mask [B, 4g, 4g] the chosen logits; iou [B] as predicted; score [B]."""

    mask: jax.Array
    iou: jax.Array
    score: jax.Array


def objects_of(batch: ClickBatch, key: jax.Array, size: tuple[int, int]) -> Objects:
    """Rows of a batch, targets on a grid of `size` (rows, columns); keys from `luck` and place."""
    i, k = batch.valid.shape
    edge = batch.edge
    bits = jnp.asarray(batch.masks).reshape(i * k, *batch.masks.shape[2:])
    target = at_centres(jnp.unpackbits(bits, axis=-1, count=edge), size).astype(bool)
    # A row's luck follows its picture and place, not its device, micro-batch or place in the batch.
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(lambda n: fold(jax.random.fold_in(key, n), jnp.arange(k)))(batch.luck)
    return Objects(
        picture=jnp.repeat(jnp.arange(i), k),
        target=target,
        valid=jnp.asarray(batch.valid & batch.image_valid[:, None]).reshape(i * k),
        keys=keys.reshape(i * k),
    )


def no_prompt(objects: Objects, batch: ClickBatch, grid: int, *, corrections: int) -> Asked:
    """Nothing asked yet but the published padding token, with room for everything."""
    b = len(objects.picture)
    room = 3 + corrections + batch.labels.shape[2]
    labels = jnp.full((b, room + 1), ABSENT).at[:, -1].set(PADDING)
    points, mask = jnp.zeros((b, room + 1, 2)), jnp.zeros((b, 4 * grid, 4 * grid))
    return Asked(points, labels, mask, jnp.zeros(b, bool))


def with_click(asked: Asked, number: jax.Array | int, point: jax.Array, label: jax.Array) -> Asked:
    """One click more on each object: that of round `number`, a correction."""
    return asked._replace(
        points=asked.points.at[:, 2 + number].set(point),
        labels=asked.labels.at[:, 2 + number].set(label),
    )


def ask(
    model: Interactive, variables: Tree, features: ClickFeatures, objects: Objects, asked: Asked,
    rngs: dict[str, jax.Array] | None = None,
) -> PromptedMasks:  # fmt: skip
    """The decoder's answer to a round."""
    answer: Any = model.apply(
        variables, features, objects.picture, *asked, method="decode", rngs=rngs or {}
    )
    return answer


class Evaluated(NamedTuple):
    """Rounds of evaluation, R = valid_clicks: iou [R, B] true; predicted [R, B]; masks [R, B, Y, X] bool;
    points [B, A, 2], labels [B, A] all clicks, in the order of Asked."""

    iou: jax.Array
    predicted: jax.Array
    masks: jax.Array
    points: jax.Array
    labels: jax.Array


def evaluation_rounds(
    model: Interactive, variables: Tree, batch: ClickBatch, config: ClicksConfig
) -> Evaluated:
    """Clicks as published evaluations make them: each at the deepest point of the larger error.

    The first answer is the one of three with the best predicted IoU; later ones single, with the
    fallback of an unstable mask, and the last mask's logits are shown again, clamped.
    """
    size = model.config.image_size
    objects = objects_of(batch, jax.random.key(0), (size, size))
    features: Any = model.apply(variables, batch.images, method="encode_image")
    asked = _deepest_point(objects, batch, model.config.grid, config.valid_clicks)

    def one_round(asked: Asked, multimask: bool) -> tuple[Asked, tuple[jax.Array, ...]]:
        answer = chosen(ask(model, variables, features, objects, asked), multimask)
        masks = resize_bilinear(answer.mask, objects.target.shape[1:]) > 0
        asked = asked._replace(
            mask=jnp.clip(answer.mask, -CLAMP, CLAMP), has_mask=jnp.ones_like(asked.has_mask)
        )
        return asked, (iou_of_masks(masks, objects.target), answer.iou, masks)

    def correction(carry, number: jax.Array):
        asked, masks = carry
        click = clicks.deepest_click(objects.target, masks)
        place = clicks.pixels(click.place, masks.shape[1:], size)
        asked, found = one_round(with_click(asked, number, place, click.label), False)
        return (asked, found[2]), found

    asked, first = one_round(asked, True)
    rounds = jax.tree.map(lambda x: x[None], first)
    if config.valid_clicks > 1:
        numbers = jnp.arange(1, config.valid_clicks)
        (asked, _), rest = jax.lax.scan(correction, (asked, first[2]), numbers)
        rounds = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rounds, rest)
    iou, predicted, masks = rounds
    return Evaluated(iou, predicted, masks, asked.points, asked.labels)


def chosen(answer: PromptedMasks, multimask: bool) -> Answer:
    """One mask of an answer: of three the one with the best predicted IoU, or the single one."""
    masks, ious = choose(answer, multimask, train=False)
    best = jnp.argmax(ious, 1)
    mask = jnp.take_along_axis(masks, best[:, None, None, None], 1)[:, 0]
    return Answer(mask, jnp.take_along_axis(ious, best[:, None], 1)[:, 0], answer.score)


def _deepest_point(objects: Objects, batch: ClickBatch, grid: int, budget: int) -> Asked:
    """The first click of every object, with room for `budget` clicks in all."""
    asked = no_prompt(objects, batch, grid, corrections=budget - 1)
    click = clicks.deepest_click(objects.target, jnp.zeros_like(objects.target))
    place = clicks.pixels(click.place, objects.target.shape[1:], batch.edge)
    return with_click(asked, 0, place, click.label)
