"""LoRA: low-rank adapters on any linear layer, chosen layer by layer (https://arxiv.org/abs/2106.09685).

    params   .../qkv/kernel [4, 7, D, E]                     untouched, byte for byte what came in
    lora     .../qkv/a      [4, 7, D, R]   b [4, 7, R, E]    trained
    lora_scale .../qkv/scale [4, 7]                          alpha / rank where adapted, else 0

Layers of a stack share one array, so an adapter on block 31 alone still has 28 slots; the slots of
the other blocks have scale 0, are never updated, and are not counted.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sam3jax.config import ConfigError, LoraConfig, ModelConfig
from sam3jax.weights.names import DEFAULT_PARTS, Entry, entries
from sam3jax.weights.scope import DETECTION, Scope
from sam3jax.weights.tree import Path, Tree, leaf, put


def linear_layers(config: ModelConfig, parts: Iterable[str] = DEFAULT_PARTS) -> list[Entry]:
    """The kernel of every linear layer of these parts, one entry a layer: what an adapter can sit on."""
    table = entries(config, parts)
    return [e for e in table if e.path[-1] == "kernel" and e.transform == "transpose"]


def select(patterns: Sequence[str], names: Sequence[str], key: str) -> set[str]:
    """Names that match a shell pattern: `...layers.*` also means everything below.

    Raises ConfigError for a pattern that matches nothing; `key` is the setting it came from.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            stem = pattern.split("*")[0].rstrip(".")
            near = [n for n in names if n.startswith(stem)] or list(names)
            raise ConfigError(
                f"{key}: pattern {pattern!r} matches no layer; there are {', '.join(near[:4])}, ... "
                f"({len(names)} in all, listed by `python -m convert inspect --layers`)"
            )
        chosen.update(found)
    return chosen


def adapted_layers(model: ModelConfig, config: LoraConfig, scope: Scope = DETECTION) -> list[Entry]:
    """The kernels that get an adapter. Raises ConfigError for a pattern without a match."""
    layers = [e for e in linear_layers(model, scope.parts) if scope.covers(e)]
    chosen = select(config.targets, [e.layer for e in layers], "lora.targets")
    return [e for e in layers if e.layer in chosen]


def init_lora(
    key: jax.Array,
    params: Tree,
    model: ModelConfig,
    config: LoraConfig,
    scope: Scope = DETECTION,
) -> tuple[Tree, Tree]:
    """(lora, lora_scale): A uniform with variance 1 / (3 D), B zero, so that nothing changes yet.

    params: the tree of arrays or of shapes. Raises ConfigError for a pattern without a match.
    """
    slots: dict[Path, list[tuple[int, ...]]] = {}
    for entry in adapted_layers(model, config, scope):
        slots.setdefault(entry.path[:-1], []).append(entry.slot)
    lora: Tree = {}
    scales: Tree = {}
    for path, where in slots.items():
        *stack, width, features = leaf(params, (*path, "kernel")).shape
        key, own = jax.random.split(key)
        bound = width**-0.5
        a = jax.random.uniform(own, (*stack, width, config.rank), minval=-bound, maxval=bound)
        scale = np.zeros(stack, np.float32)
        for slot in where:
            scale[slot] = config.alpha / config.rank
        put(lora, (*path, "a"), a)
        put(lora, (*path, "b"), jnp.zeros((*stack, config.rank, features)))
        put(scales, (*path, "scale"), jnp.asarray(scale))
        if config.dropout:
            put(scales, (*path, "dropout"), jnp.full(stack, config.dropout))
    return lora, scales


def merge_lora(params: Tree, lora: Tree, lora_scale: Tree) -> Tree:
    """The parameters with the adapters folded in: W + scale * A B."""

    def fold(params: Tree, lora: Tree, scales: Tree) -> Tree:
        if "a" in lora:
            product = jnp.einsum("...dr,...re->...de", lora["a"], lora["b"], precision="highest")
            delta = jnp.asarray(scales["scale"])[..., None, None] * product
            return {**params, "kernel": (params["kernel"] + delta).astype(params["kernel"].dtype)}
        return params | {k: fold(params[k], lora[k], scales[k]) for k in lora}

    return fold(params, lora, lora_scale)
