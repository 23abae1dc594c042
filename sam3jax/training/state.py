"""The state of a training, and how it starts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sam3jax.config import ConfigError
from sam3jax.weights.checkpoints import Checkpoints
from sam3jax.weights.tree import Tree


class TrainState(struct.PyTreeNode):
    """Everything that changes from step to step.

    step: updates tried. skipped: those whose loss or gradient was not finite; they change nothing.
    ema: averaged `trainable`, or None.
    """

    step: jax.Array
    trainable: Tree
    opt_state: Any
    ema: Tree | None
    skipped: jax.Array


def init_state(trainable: Tree, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    """The state before the first step."""
    # Copies: the state is donated, what it was made from is not.
    copy = lambda: jax.tree.map(jnp.array, trainable)
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(zero(), copy(), optimizer.init(trainable), copy() if ema else None, zero())


def moving_average(state: TrainState, trainable: Tree, decay: float) -> Tree:
    """The averaged weights after one more update, without the start's bias towards the first weights.

    As Adam corrects its moments (https://arxiv.org/abs/1412.6980, section 3): after n updates the
    average is the sum of decay^(n - k) theta_k over k = 1..n, divided by the sum of its weights.
    """
    updates = (state.step - state.skipped + 1).astype(jnp.float32)
    weight = (1 - decay) / (1 - decay**updates)
    return jax.tree.map(lambda e, t: e + weight * (t - e), state.ema, trainable)


def save(checkpoints: Checkpoints, state: TrainState, about: dict[str, Any]) -> None:
    """Save a state in the background: the weights that the run stands for, and the rest apart."""
    rest = {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped}
    weights = state.trainable
    if state.ema is not None:
        weights, rest["unaveraged"] = state.ema, state.trainable
    checkpoints.save(int(state.step), weights, rest, about)


def restore(checkpoints: Checkpoints, step: int, like: TrainState) -> TrainState:
    """The state of a step, in the shapes and on the devices of `like`."""
    rest = {"step": like.step, "opt_state": like.opt_state, "skipped": like.skipped}
    if like.ema is not None:
        rest["unaveraged"] = like.trainable
    weights, rest = checkpoints.restore(step, like.trainable, rest)
    if int(rest["step"]) != step:
        raise ConfigError(
            f"the checkpoint of step {step} holds the state of step {int(rest['step'])}: put its own files back"
        )
    trainable = rest.pop("unaveraged", weights)
    return TrainState(trainable=trainable, ema=None if like.ema is None else weights, **rest)
