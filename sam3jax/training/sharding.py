"""Weights split over devices (`shard: true`): what lies where, and what follows for sums over devices.

One rule, from a leaf's name and shape, holds for weights, averages, moments and checkpoints alike. What is
split is whole only inside the layer that reads it (`model.stored`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sam3jax.model.stored import Split
from sam3jax.training.mesh import put
from sam3jax.types import AXIS
from sam3jax.weights.tree import Tree

# Matrices and tables; their last two axes are never those of a stack. Vectors are not worth a message.
_SPLIT = {"kernel", "a", "b", "token_embedding", "positional_embedding", "pos_embed"}
SMALLEST = 4096  # values of a leaf that is split


def parts_of(mesh: Mesh, shard: bool) -> int:
    """Into how many parts weights are split; 1: every device holds them whole."""
    return mesh.size if shard else 1


def specs(tree: Any, parts: int) -> Any:
    """The PartitionSpec of every leaf: the longer of the last two axes that `parts` divides, or none."""

    def rule(path: Any, x: Any) -> P:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if parts == 1 or not names or names[-1] not in _SPLIT or x.size < SMALLEST:
            return P()
        fits = [axis for axis in range(x.ndim)[-2:] if x.shape[axis] % parts == 0]
        if not fits:
            return P()
        return P(*[None] * max(fits, key=lambda axis: x.shape[axis]), AXIS)

    return jax.tree.map_with_path(rule, tree)


def placed(tree: Any, mesh: Mesh, parts: int = 1) -> Any:
    """Every leaf where the rule has it, on all hosts; what lies there already stays."""
    return put(tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs(tree, parts)))


def whole(tree: Any) -> Any:
    """Split leaves gathered onto each of their devices, for what runs outside the step."""

    def one(x: Any) -> Any:
        there = x.sharding if isinstance(x, jax.Array) else None
        if not isinstance(there, NamedSharding) or there.is_fully_replicated:
            return x
        return put(x, NamedSharding(there.mesh, P()))

    return jax.tree.map(one, tree)


def stored(tree: Any, specs: Any) -> Any:
    """Inside the step: a device's leaves as the model reads them."""
    return jax.tree.map(lambda x, s: Split(x, len(s) - 1 - x.ndim) if s else x, tree, specs)


def as_varying(tree: Tree, specs: Any) -> Tree:
    """Inside the step: what is on every device as an argument of each; parts are so already."""
    return jax.tree.map(lambda x, s: x if s else jax.lax.pcast(x, AXIS, to="varying"), tree, specs)


def summed(grads: Tree, specs: Any) -> Tree:
    """Gradients added over devices. Those of parts were, where the layer gathered them."""
    leaves, places = jax.tree.leaves(grads), _like(grads, specs)
    sums = iter(jax.lax.psum([x for x, s in zip(leaves, places, strict=True) if not s], AXIS))
    added = [x if s else next(sums) for x, s in zip(leaves, places, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(grads), added)


def norm(tree: Tree, specs: Any) -> jax.Array:
    """The global L2 norm, equal on all devices."""
    squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)]
    places = _like(tree, specs)
    total = sum((x for x, s in zip(squares, places, strict=True) if not s), jnp.float32(0))
    if own := [x for x, s in zip(squares, places, strict=True) if s]:
        total = total + jax.lax.psum(sum(own), AXIS)
    return jnp.sqrt(total)


def _like(tree: Tree, specs: Any) -> list[P]:
    return jax.tree.structure(tree).flatten_up_to(specs)
