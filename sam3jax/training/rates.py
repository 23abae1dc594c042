"""Learning rates and weight decay, parameter by parameter."""

from __future__ import annotations

import fnmatch
from typing import Any

import jax
import numpy as np

from sam3jax.config import Config, OptimConfig
from sam3jax.weights.lora import linear_layers
from sam3jax.weights.names import NECK, PARTS, TEXT, VIT, entries
from sam3jax.weights.tracker_names import SECOND_NECK
from sam3jax.weights.tree import Path, Tree, has, leaf, put


def multipliers(trainable: Tree, frozen: Tree, config: Config) -> Tree:
    """Learning rate of every trainable leaf, relative: 0 where a layer of a stack is not trained.

    Arrays with the leaf's stack axes and ones, so that they broadcast. Layer decay as published:
    ViT block k gets decay^(depth - k), patch embedding and first norm decay^(depth + 1), the
    absolute positions 1.
    """
    out: Tree = {}
    for name, path, slot in _slots(trainable, config):
        value = _rate(name, config)
        if path[0] == "lora":
            scale = np.asarray(leaf(frozen["lora_scale"], (*path[1:-1], "scale")))
            value *= float(scale[slot] > 0)
        elif not _is_trained(name, config):
            value = 0.0
        array = leaf(trainable, path)
        try:
            table = leaf(out, path)
        except KeyError:
            table = np.zeros((*array.shape[: len(slot)], *[1] * (array.ndim - len(slot))), "f")
            put(out, path, table)
        table[slot] = value
    return out


def decayed(trainable: Tree) -> Tree:
    """True for the leaves that weight decay acts on: matrices, not biases, norms or positions."""

    def rule(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1].key in ("kernel", "a", "b")

    return jax.tree.map_with_path(rule, trainable)


def count(trainable: Tree, rates: Tree) -> int:
    """Parameters that can move."""
    sizes = jax.tree.map(
        lambda x, rate: int((rate > 0).sum()) * (x.size // rate.size), trainable, rates
    )
    return sum(jax.tree.leaves(sizes))


def _is_trained(name: str, config: Config) -> bool:
    if config.train == "all":
        return True
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in config.trainable)


def _slots(trainable: Tree, config: Config) -> list[tuple[str, Path, tuple[int, ...]]]:
    """(name, path in trainable, slot) of everything that is in `trainable`."""
    out = []
    for entry in entries(config.model, PARTS):
        if has(trainable, ("params", *entry.path)):
            out.append((entry.name, ("params", *entry.path), entry.slot))
    for entry in linear_layers(config.model, PARTS):
        for part in ("a", "b"):
            path = ("lora", *entry.path[:-1], part)
            if has(trainable, path):
                out.append((entry.layer, path, entry.slot))
    return out


def _rate(name: str, config: Config) -> float:
    optim: OptimConfig = config.optim
    if name.startswith(TEXT):
        return optim.text_scale
    if name.startswith((NECK, SECOND_NECK)):
        return optim.vision_scale
    if name.startswith(VIT):
        depth = config.model.vit_stages * config.model.vit_stage_blocks
        if name.endswith("pos_embed"):
            below = 0
        elif ".blocks." in name:
            below = depth - int(name.split(".blocks.")[1].split(".")[0])
        else:
            below = depth + 1
        return optim.vision_scale * optim.layer_decay**below
    return 1.0
