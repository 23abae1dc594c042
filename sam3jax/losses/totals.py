"""What the losses are divided by: counted before the model runs, over the whole batch.

Totals are plain sums, so those of micro-batches and of devices may be added. Every share of a loss is
divided by the totals of the whole batch, and the shares add up to the batch's loss, however it is split.

A stage is a time step of video clips (sam3.train.loss.sam3_loss.Sam3LossWrapper): each stage has its
own totals. Pictures are one stage.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sam3jax.config import LossConfig
from sam3jax.losses.semantic import has_union
from sam3jax.losses.truth import at_least_one_mask, gather_truth
from sam3jax.types import Targets


class Totals(NamedTuple):
    """Sums over a batch, or a part of it, by stage.

    targets [S], of `normalization: local` [W, S] with a row for each of W devices; prompts [S]; unions
    [S], prompts whose semantic truth is not empty.
    """

    targets: jax.Array
    prompts: jax.Array
    unions: jax.Array


class Stages(NamedTuple):
    """Which stage each of B image-prompt pairs belongs to: of_pair [B] int32 < number, or None for one."""

    number: int
    of_pair: jax.Array | None

    def sums(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [S], summed over everything else."""
        if self.of_pair is None:
            return x.sum()[None]
        x = x.reshape(len(x), -1).sum(1)
        return jax.ops.segment_sum(x, self.of_pair, self.number)

    def layer_sums(self, x: jax.Array) -> jax.Array:
        """[L, B, ...] -> [L, S]."""
        if self.of_pair is None:
            return x.sum(tuple(range(1, x.ndim)))[:, None]
        return jax.vmap(self.sums)(x)

    def spread(self, x: jax.Array) -> jax.Array:
        """[..., S] -> [..., B], each pair's own."""
        return x if self.of_pair is None else x[..., self.of_pair]


def stages_of(stage: jax.Array | None, number: int, prompts: int) -> Stages:
    """stage [I]: the stage of each picture; None where all belong to one."""
    return Stages(1, None) if stage is None or number == 1 else Stages(number, jnp.repeat(stage, prompts))  # fmt: skip


def count_totals(
    targets: Targets,
    prompt_valid: jax.Array,
    config: LossConfig,
    *,
    prediction_size: tuple[int, ...] | None = None,
    stage: jax.Array | None = None,
    stages: int = 1,
    axis_names: tuple[str, ...] | None = None,
) -> Totals:
    """The totals of one micro-batch of one device. Add those of all before dividing by them.

    prompt_valid [I, P]. prediction_size: rows and columns of the semantic head's maps, needed where
    config.semantic is on. axis_names: only read for `normalization: local`, to find the device's row.
    """
    targets = at_least_one_mask(targets)
    truth = gather_truth(targets, prompt_valid)
    by = stages_of(stage, stages, prompt_valid.shape[1])
    real = truth.real
    if config.normalize_by_valid_object_num:
        real = real & (truth.boxes[..., 2:] > 0).all(-1)
    number = by.sums(real).astype(jnp.float32)
    if config.normalization == "local" and axis_names:
        own = jnp.arange(jax.lax.axis_size(axis_names)) == jax.lax.axis_index(axis_names)
        number = jnp.where(own[:, None], number, 0.0)
    unions = jnp.zeros_like(number, shape=(by.number,))
    if config.semantic:
        assert prediction_size is not None, "the semantic head's totals need its size"
        unions = by.sums(truth.valid & has_union(targets, truth, config, prediction_size))
    prompts = by.sums(truth.valid).astype(jnp.float32)
    return Totals(number, prompts, unions.astype(jnp.float32))


class Divisors(NamedTuple):
    """[S] each, at least 1 where a sum may be empty: targets, prompts, unions."""

    targets: jax.Array
    prompts: jax.Array
    unions: jax.Array


def divisors(totals: Totals, config: LossConfig, axis_names: tuple[str, ...] | None) -> Divisors:
    """What sums over targets, over prompts and over semantic unions are divided by."""
    targets = totals.targets
    if config.normalization == "none":
        targets = jnp.ones_like(targets)
    elif config.normalization == "local" and axis_names:
        # The mean over devices of losses normalised on each, as torch's data parallelism makes it.
        devices = jax.lax.axis_size(axis_names)
        targets = jnp.maximum(targets[jax.lax.axis_index(axis_names)], 1) * devices
    else:
        targets = jnp.maximum(targets, 1)
    return Divisors(targets, jnp.maximum(totals.prompts, 1), totals.unions)
