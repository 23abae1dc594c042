"""Training rounds of clicks: a first prompt, then corrections of what came out.

Answers to the training of sam2 (`SAM2Train._iter_correct_pt_sampling`) on still pictures. The trunk runs
once per picture; rounds are a scan, each rematerialised but for what it chose, so that memory does not grow with them.
Clicks are drawn from the prediction on the device, and no gradient passes through a click.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sam3jax import clicks
from sam3jax.clicks import ABSENT, BOX_END, BOX_START
from sam3jax.config import ClicksConfig
from sam3jax.inference.click_rounds import Asked, Objects, ask, no_prompt, objects_of, with_click
from sam3jax.losses.interactive import CHOSEN, RoundLosses, round_losses
from sam3jax.losses.resample import resize_bilinear
from sam3jax.model import Interactive
from sam3jax.model.mask_decoder import MASKS
from sam3jax.model.sam3 import reader_of
from sam3jax.types import ClickBatch
from sam3jax.weights.tree import Tree

# From this round on every object has two points: one mask answers, three need not be compared.
SINGLE_FROM = 3
POINT, BOX, MASK, STORED = 0, 1, 2, 3  # kinds of first prompts


def first_prompt(objects: Objects, batch: ClickBatch, grid: int, config: ClicksConfig) -> Asked:
    """The first prompt of every object, with room for what follows.

    A point, a box or a mask by the config's shares; points stored with an object take their place.
    """
    size, shape = batch.edge, objects.target.shape[1:]
    target, stored = objects.target, batch.labels.shape[2]
    asked = no_prompt(objects, batch, grid, corrections=corrections(config))
    stored_labels = batch.labels.reshape(len(target), stored)
    keys = jax.vmap(lambda key: jax.random.split(key, 4))(_keys(objects, 0))
    kind = jax.vmap(lambda key: _draw_kind(key, config))(keys[:, 0])
    kind = jnp.where((stored_labels >= 0).any(1), STORED, kind)

    click = clicks.point_on(keys[:, 1], target)
    point = clicks.pixels(click.place, shape, size)
    asked = with_click(asked, 0, point, jnp.where(kind == POINT, click.label, ABSENT))

    box = clicks.pixels(clicks.box_of(target), shape, size)
    box = clicks.noisy_box(
        keys[:, 2], box, noise=config.box_noise, most=config.box_noise_pixels, size=size
    )
    corners = jnp.where((kind == BOX)[:, None], jnp.array([BOX_START, BOX_END]), ABSENT)
    stored_labels = jnp.where((kind == STORED)[:, None], stored_labels, ABSENT)
    at = slice(-1 - stored, -1)
    points = (
        asked.points.at[:, :2].set(box).at[:, at].set(batch.points.reshape(len(target), stored, 2))
    )
    labels = asked.labels.at[:, :2].set(corners).at[:, at].set(stored_labels)

    has_mask = kind == MASK
    rough = clicks.damaged_mask(keys[:, 3], target, grid)
    return Asked(points, labels, jnp.where(has_mask[:, None, None], rough, asked.mask), has_mask)


def corrections(config: ClicksConfig) -> int:
    """Rounds behind the first prompt."""
    return config.rounds + config.mask_only_round


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

    key: of the run, equal on all devices; `batch.luck` is folded in. dropout: a device's own key.
    """
    g = model.config.grid
    edge = model.config.image_size if config.mask_resolution == "target" else 4 * g
    objects = objects_of(batch, key, (edge, edge))
    rngs = lambda r: {} if dropout is None else {"dropout": jax.random.fold_in(dropout, r)}
    method = reader_of(batch.images)
    features: Any = model.apply(variables, batch.images, method=method, rngs=rngs(0))

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

    asked = first_prompt(objects, batch, g, config)
    again = partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(CHOSEN))
    asked, first = again(one_round, static_argnums=2)(asked, jnp.int32(0), True)
    losses = [jax.tree.map(lambda x: x[None], first)]
    last = corrections(config)
    middle = min(SINGLE_FROM - 1, last)
    for numbers, many in ((range(1, middle + 1), True), (range(middle + 1, last + 1), False)):
        if numbers:
            body = lambda asked, number, many=many: correction(asked, number, many)
            body = again(body, prevent_cse=False)
            asked, some = jax.lax.scan(body, asked, jnp.array(numbers))
            losses.append(some)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *losses), asked


def masks_in_play(asked: Asked) -> jax.Array:
    """[B, 4]: masks 1 to 3 of a row with at most one point, else mask 0."""
    single = jnp.arange(MASKS) == 0
    return jnp.where((asked.count <= 1)[:, None], ~single, single)


def _corrected(
    objects: Objects, asked: Asked, number: jax.Array, batch: ClickBatch, config: ClicksConfig
) -> Asked:
    """A click more on each object, in training; none in the row's round of the mask alone."""
    shape, size = objects.target.shape[1:], batch.edge
    predicted = resize_bilinear(jax.lax.stop_gradient(asked.mask), shape) > 0
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(_keys(objects, number))
    luck = jax.vmap(jax.random.uniform)(keys[:, 0])
    from_truth = luck < config.clicks_from_truth
    click = clicks.uniform_click(keys[:, 1], objects.target, predicted & ~from_truth[:, None, None])
    label = click.label
    if config.mask_only_round:
        last = corrections(config)
        # Drawn from a number that no round has.
        draw = lambda key: jax.random.randint(key, (), 1, last + 1)
        label = jnp.where(jax.vmap(draw)(_keys(objects, last + 1)) == number, ABSENT, label)
    point, label = checkpoint_name((clicks.pixels(click.place, shape, size), label), CHOSEN)
    return with_click(asked, number, point, label)


def _keys(objects: Objects, number: jax.Array | int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(objects.keys, number)


def _draw_kind(key: jax.Array, config: ClicksConfig) -> jax.Array:
    luck = jax.random.uniform(key)
    past_point = luck >= config.first_point
    return past_point.astype(jnp.int32) + (luck >= config.first_point + config.first_box)
