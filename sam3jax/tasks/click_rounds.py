"""Rounds of clicks on the objects of a batch: a first prompt, then corrections of what came out.

Answers to the training of sam2 (`SAM2Train._iter_correct_pt_sampling`) on still pictures. The trunk runs
once per picture; rounds are a scan, each rematerialised, so that memory does not grow with them.
Clicks are drawn from the prediction on the device, and no gradient passes through a click.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sam3jax import clicks
from sam3jax.clicks import ABSENT, BOX_END, BOX_START
from sam3jax.config import ClicksConfig
from sam3jax.losses.interactive import RoundLosses, at_centres, iou_of_masks, round_losses
from sam3jax.losses.masks import resize_bilinear
from sam3jax.model import Interactive
from sam3jax.model.mask_decoder import MASKS, choose
from sam3jax.model.prompt_encoder import PADDING
from sam3jax.types import ClickBatch, ClickFeatures, PromptedMasks
from sam3jax.weights.lora import Tree

CLAMP = 32.0  # of a mask that is shown again, at inference
# From this round on every object has two points: one mask answers, three need not be compared.
SINGLE_FROM = 3
POINT, BOX, MASK, STORED = 0, 1, 2, 3  # kinds of first prompts


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
    """Rows of a batch, targets on a grid of `size` (rows, columns); keys from picture and place."""
    i, k = batch.valid.shape
    edge = batch.images.shape[2]
    bits = batch.masks.reshape(i * k, *batch.masks.shape[2:])
    target = at_centres(jnp.unpackbits(bits, axis=-1, count=edge), size).astype(bool)
    # A row's luck follows its picture and place, not its device or its place in the batch.
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(lambda n: fold(jax.random.fold_in(key, n), jnp.arange(k)))(batch.image_id)
    return Objects(
        picture=jnp.repeat(jnp.arange(i), k),
        target=target,
        valid=(batch.valid & batch.image_valid[:, None]).reshape(i * k),
        keys=keys.reshape(i * k),
    )


def first_prompt(
    objects: Objects, batch: ClickBatch, grid: int, config: ClicksConfig, *, train: bool
) -> Asked:
    """The first prompt of every object, with room for what follows.

    In training a point, a box or a mask by the config's shares; in evaluation the deepest point.
    Points stored with an object take their place in training.
    """
    b, size = len(objects.picture), batch.images.shape[1]
    shape, target = objects.target.shape[1:], objects.target
    room = 3 + corrections(config, train=train)
    stored_labels = batch.labels.reshape(b, -1)
    points = jnp.zeros((b, room, 2))
    labels = jnp.full((b, room), ABSENT)
    mask = jnp.zeros((b, 4 * grid, 4 * grid))
    has_mask = jnp.zeros(b, bool)
    if train:
        keys = jax.vmap(lambda key: jax.random.split(key, 4))(_keys(objects, 0))
        kind = jax.vmap(lambda key: _draw_kind(key, config))(keys[:, 0])
        kind = jnp.where((stored_labels >= 0).any(1), STORED, kind)
        click = clicks.point_on(keys[:, 1], target)
        box = clicks.pixels(clicks.box_of(target), shape, size)
        box = clicks.noisy_box(
            keys[:, 2], box, noise=config.box_noise, most=config.box_noise_pixels, size=size
        )
        corners = jnp.array([BOX_START, BOX_END])
        points = points.at[:, :2].set(box)
        labels = labels.at[:, :2].set(jnp.where(kind[:, None] == BOX, corners, ABSENT))
        has_mask = kind == MASK
        mask = jnp.where(
            has_mask[:, None, None], clicks.damaged_mask(keys[:, 3], target, grid), mask
        )
        stored_labels = jnp.where(kind[:, None] == STORED, stored_labels, ABSENT)
    else:
        kind = jnp.full(b, POINT)
        click = clicks.deepest_click(target, jnp.zeros_like(target))
        stored_labels = jnp.full_like(stored_labels, ABSENT)
    points = points.at[:, 2].set(clicks.pixels(click.place, shape, size))
    labels = labels.at[:, 2].set(jnp.where(kind == POINT, click.label, ABSENT))
    stored = batch.points.reshape(b, -1, 2)
    points = jnp.concatenate([points, stored, jnp.zeros((b, 1, 2))], 1)
    labels = jnp.concatenate([labels, stored_labels, jnp.full((b, 1), PADDING)], 1)
    return Asked(points, labels, mask, has_mask)


def corrections(config: ClicksConfig, *, train: bool) -> int:
    """Rounds behind the first prompt."""
    return config.rounds + config.mask_only_round if train else config.valid_clicks - 1


def ask(
    model: Interactive, variables: Tree, features: ClickFeatures, objects: Objects, asked: Asked,
    rngs: dict[str, jax.Array] | None = None,
) -> PromptedMasks:  # fmt: skip
    """The decoder's answer to a round."""
    return model.apply(
        variables, features, objects.picture, *asked, method="decode", rngs=rngs or {}
    )


def training_rounds(
    model: Interactive,
    variables: Tree,
    batch: ClickBatch,
    key: jax.Array,
    config: ClicksConfig,
    *,
    dropout: jax.Array | None = None,
) -> tuple[RoundLosses, Asked]:
    """The losses of every round, fields [rounds, B], and what was asked in the last.

    Rows that are not valid count for nothing.

    key: of the step, equal on all devices. dropout: a device's own key.
    """
    g = model.config.grid
    edge = model.config.image_size if config.mask_resolution == "target" else 4 * g
    objects = objects_of(batch, key, (edge, edge))
    rngs = lambda r: {} if dropout is None else {"dropout": jax.random.fold_in(dropout, r)}
    features = model.apply(variables, batch.images, method="encode_image", rngs=rngs(0))

    def one_round(asked: Asked, number: jax.Array, many: bool) -> tuple[Asked, RoundLosses]:
        answer = ask(model, variables, features, objects, asked, rngs(number + 1))
        in_play = masks_in_play(asked)
        if not many:
            in_play = None
            answer = answer.replace(masks=answer.masks[:, :1], ious=answer.ious[:, :1])
        losses = round_losses(
            answer.masks, answer.ious, answer.score, objects.target, config, in_play=in_play
        )
        ious = answer.ious if in_play is None else jnp.where(in_play, answer.ious, -1.0)
        best = jnp.argmax(ious, 1)
        shown = jnp.take_along_axis(answer.masks, best[:, None, None, None], 1)[:, 0]
        asked = asked._replace(mask=shown, has_mask=jnp.ones_like(asked.has_mask))
        valid = lambda x: jnp.where(objects.valid, x, jnp.zeros_like(x))
        return asked, jax.tree.map(valid, losses)

    def correction(asked: Asked, number: jax.Array, many: bool) -> tuple[Asked, RoundLosses]:
        return one_round(_corrected(objects, asked, number, batch, config), number, many)

    asked = first_prompt(objects, batch, g, config, train=True)
    asked, first = jax.checkpoint(one_round, static_argnums=2)(asked, jnp.int32(0), True)
    losses = [jax.tree.map(lambda x: x[None], first)]
    last = corrections(config, train=True)
    middle = min(SINGLE_FROM - 1, last)
    for numbers, many in ((range(1, middle + 1), True), (range(middle + 1, last + 1), False)):
        if numbers:
            body = lambda asked, number, many=many: correction(asked, number, many)
            body = jax.checkpoint(body, prevent_cse=False)
            asked, some = jax.lax.scan(body, asked, jnp.array(numbers))
            losses.append(some)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *losses), asked


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
    features = model.apply(variables, batch.images, method="encode_image")
    asked = first_prompt(objects, batch, model.config.grid, config, train=False)

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
        asked, found = one_round(_with_click(asked, number, place, click.label), False)
        return (asked, found[2]), found

    asked, first = one_round(asked, True)
    rounds = jax.tree.map(lambda x: x[None], first)
    if config.valid_clicks > 1:
        numbers = jnp.arange(1, config.valid_clicks)
        (asked, _), rest = jax.lax.scan(correction, (asked, first[2]), numbers)
        rounds = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rounds, rest)
    return Evaluated(*rounds, asked.points, asked.labels)


def chosen(answer: PromptedMasks, multimask: bool) -> Answer:
    """One mask of an answer: of three the one with the best predicted IoU, or the single one."""
    masks, ious = choose(answer, multimask, train=False)
    best = jnp.argmax(ious, 1)
    mask = jnp.take_along_axis(masks, best[:, None, None, None], 1)[:, 0]
    return Answer(mask, jnp.take_along_axis(ious, best[:, None], 1)[:, 0], answer.score)


def masks_in_play(asked: Asked) -> jax.Array:
    """[B, 4]: masks 1 to 3 of a row with at most one point, else mask 0."""
    single = jnp.arange(MASKS) == 0
    return jnp.where((asked.count <= 1)[:, None], ~single, single)


def _corrected(
    objects: Objects, asked: Asked, number: jax.Array, batch: ClickBatch, config: ClicksConfig
) -> Asked:
    """A click more on each object, in training; none in the row's round of the mask alone."""
    shape, size = objects.target.shape[1:], batch.images.shape[1]
    predicted = resize_bilinear(jax.lax.stop_gradient(asked.mask), shape) > 0
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(_keys(objects, number))
    luck = jax.vmap(jax.random.uniform)(keys[:, 0])
    from_truth = luck < config.clicks_from_truth
    click = clicks.uniform_click(keys[:, 1], objects.target, predicted & ~from_truth[:, None, None])
    label = click.label
    if config.mask_only_round:
        last = corrections(config, train=True)
        # Drawn from a number that no round has.
        draw = lambda key: jax.random.randint(key, (), 1, last + 1)
        label = jnp.where(jax.vmap(draw)(_keys(objects, last + 1)) == number, ABSENT, label)
    return _with_click(asked, number, clicks.pixels(click.place, shape, size), label)


def _with_click(asked: Asked, number: jax.Array, point: jax.Array, label: jax.Array) -> Asked:
    return asked._replace(
        points=asked.points.at[:, 2 + number].set(point),
        labels=asked.labels.at[:, 2 + number].set(label),
    )


def _keys(objects: Objects, number: jax.Array | int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(objects.keys, number)


def _draw_kind(key: jax.Array, config: ClicksConfig) -> jax.Array:
    luck = jax.random.uniform(key)
    past_point = luck >= config.first_point
    return past_point.astype(jnp.int32) + (luck >= config.first_point + config.first_box)
