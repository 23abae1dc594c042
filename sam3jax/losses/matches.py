"""Which queries answer for which targets in a step, and the pairs whose masks are compared."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from sam3jax.config import LossConfig
from sam3jax.losses.masks import MaskPairs
from sam3jax.losses.truth import Truth
from sam3jax.matching import hungarian, match_cost, match_one_to_many
from sam3jax.types import Outputs


class Matches(NamedTuple):
    """The queries of each target, Q where there is none: o2o [L, B, T, 1], o2m [L, B, T, k] or None."""

    o2o: jax.Array
    o2m: jax.Array | None


def match(outputs: Outputs, truth: Truth, config: LossConfig) -> Matches:
    """All assignments of a step; the one-to-one problems of all layers are solved in one call."""
    layers, _, q = outputs.o2o.logits.shape
    stack = [outputs.o2o]
    if outputs.o2m is not None and not config.use_o2m_matcher_on_o2m_aux:
        chex.assert_equal_shape([outputs.o2o.logits, outputs.o2m.logits])
        stack.append(jax.tree.map(lambda x: x[:-1], outputs.o2m.replace(mask_embed=None)))
    logits = jnp.concatenate([d.logits for d in stack])
    boxes = jnp.concatenate([d.boxes for d in stack])
    cost = match_cost(logits, boxes, truth.boxes, config=config)  # [11, B, Q, T]
    count = jnp.broadcast_to(truth.count, cost.shape[:2])
    queries = hungarian(cost.reshape(-1, *cost.shape[2:]), count.reshape(-1))
    queries = queries.reshape(*cost.shape[:2], -1, 1)
    o2o, o2m = queries[:layers], None
    if outputs.o2m is not None:
        greedy = slice(None) if config.use_o2m_matcher_on_o2m_aux else slice(-1, None)
        o2m = match_one_to_many(
            outputs.o2m.logits[greedy],
            outputs.o2m.boxes[greedy],
            truth.boxes,
            truth.count,
            config=config,
        )
        if not config.use_o2m_matcher_on_o2m_aux:
            width = ((0, 0), (0, 0), (0, 0), (0, o2m.shape[-1] - 1))
            o2m = jnp.concatenate([jnp.pad(queries[layers:], width, constant_values=q), o2m])
    return Matches(o2o, o2m)


def mask_pairs(
    outputs: Outputs,
    matches: Matches,
    truth: Truth,
    config: LossConfig,
    point_rng: jax.Array | None,
) -> tuple[MaskPairs, jax.Array]:
    """The last layer's pairs whose target has a mask, and how many `config.mask_pairs` left out.

    One-to-one pairs come first: where the budget is too small, it is one-to-many pairs of the last
    prompts that go.
    """
    q = outputs.o2o.logits.shape[-1]
    found = [matches.o2o[-1]] if matches.o2m is None else [matches.o2o[-1], matches.o2m[-1]]
    queries = jnp.concatenate(found, axis=-1)  # [B, T, 1 + k]
    pairs, t, k = queries.shape
    group = jnp.broadcast_to((jnp.arange(k) > 0).astype(jnp.int32), queries.shape)
    keep = (queries < q) & truth.has_mask[..., None]
    dropped = jnp.zeros_like(keep.sum())
    if config.mask_pairs is not None:
        first = keep[..., :1].reshape(-1).cumsum().reshape(pairs, t, 1)
        then = keep[..., 1:].reshape(-1).cumsum().reshape(pairs, t, k - 1) + keep[..., :1].sum()
        kept = keep & (jnp.concatenate([first, then], -1) <= config.mask_pairs)
        dropped, keep = keep.sum() - kept.sum(), kept
    key = None
    if config.num_sample_points is not None:
        if point_rng is None:
            raise ValueError(
                "num_sample_points draws random points: give compute_losses a point_rng"
            )
        key = _pair_keys(point_rng, queries.shape).reshape(pairs, -1)
    flat = lambda x: x.reshape(pairs, -1)
    return MaskPairs(
        query=flat(jnp.minimum(queries, q - 1) + group * q),
        instance=flat(jnp.broadcast_to(truth.instance[..., None], queries.shape)),
        group=flat(group),
        keep=flat(keep),
        key=key,
    ), dropped


def _pair_keys(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A key for each (prompt, target, rank), the same however far the axes are padded."""
    fold = jax.random.fold_in
    one = lambda b, t, k: fold(fold(fold(rng, b), t), k)
    grid = jnp.meshgrid(*(jnp.arange(n) for n in shape), indexing="ij")
    return jax.vmap(jax.vmap(jax.vmap(one)))(*grid)
