"""What is trained: split off once at the start, merged in the step; rates and masks per layer.

    trainable {"lora": adapters, "params": parameters trained themselves}   differentiated, updated
    frozen    {"params": the rest, "lora_scale": ...}                       an argument, never touched

Patterns and learning rates speak of per-layer torch names. A stacked leaf moves to `trainable` as a
whole where any of its layers is trained; its multiplier is 0 at the slots of the others.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from sam3jax.config import Config, ModelConfig, OptimConfig
from sam3jax.weights.lora import Path, Tree, leaf, linear_layers, put, select
from sam3jax.weights.names import DEFAULT_PARTS, PARTS, TEXT, VIT, entries
from sam3jax.weights.tracker_names import NECK, SECOND_NECK

# Layers that compute in float32 whatever the rest does.
_IN_FLOAT32 = {
    "scoring", "bbox_embed", "presence_token_head",
    "output_hypernetworks_mlps", "iou_prediction_head", "pred_obj_score_head",
}  # fmt: skip


def split(
    params: Tree,
    lora: Tree,
    lora_scale: Tree,
    config: Config,
    parts: Iterable[str] = DEFAULT_PARTS,
) -> tuple[Tree, Tree]:
    """(trainable, frozen) of a run on these parts. Raises ConfigError for a pattern without a match.

    Buffers, such as the prompt encoder's random frequencies, are frozen whatever is trained.
    """
    table = entries(config.model, parts)
    can_move = [e for e in table if not e.is_buffer]
    if config.train == "all":
        paths = {e.path for e in can_move}
    else:
        chosen = select(config.trainable, [e.name for e in can_move], "trainable")
        paths = {e.path for e in can_move if e.name in chosen}
    trained: Tree = {}
    rest: Tree = {}
    for path in dict.fromkeys(e.path for e in table):
        put(trained if path in paths else rest, path, leaf(params, path))
    trainable = {"lora": lora} if lora else {}
    if trained:
        trainable["params"] = trained
    return trainable, {"params": rest, "lora_scale": lora_scale}


def merge(trainable: Tree, frozen: Tree) -> Tree:
    """The variables of the model: {"params", "lora", "lora_scale"}."""

    def both(a: Any, b: Any) -> Any:
        if not isinstance(a, dict):
            return a
        return {**b, **{k: both(v, b[k]) if k in b else v for k, v in a.items()}}

    variables = {**frozen, "params": both(trainable.get("params", {}), frozen["params"])}
    if "lora" in trainable:
        variables["lora"] = trainable["lora"]
    return variables


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


def compact(frozen: Tree, config: ModelConfig) -> Tree:
    """Frozen kernels in the compute dtype: the values each layer would cast them to, half the bytes.

    Not on a CPU: XLA widens a whole stack of bfloat16 again before it takes a layer of it, and keeps
    both (measured at full size: 6.0 GB of arguments and temporaries, 5.2 GB as they are).
    """
    if jax.default_backend() == "cpu":
        return frozen
    dtype = config.compute_dtype

    def cast(path: tuple[Any, ...], x: Any) -> Any:
        exact = _IN_FLOAT32 & {k.key for k in path}
        as_is = exact or path[-1].key != "kernel" or x.dtype == dtype
        return x if as_is else x.astype(dtype)

    return jax.tree.map_with_path(cast, frozen)


def without_text_tower(frozen: Tree) -> Tree:
    """What a step needs that is given its phrases encoded: 1.4 GB less at full size."""
    params = {name: part for name, part in frozen["params"].items() if name != "text_encoder"}
    return {**frozen, "params": params}


def count(trainable: Tree, rates: Tree) -> int:
    """Parameters that can move."""
    sizes = jax.tree.map(
        lambda x, rate: int((rate > 0).sum()) * (x.size // rate.size), trainable, rates
    )
    return sum(jax.tree.leaves(sizes))


def touches(trainable: Tree, part: str) -> bool:
    """Whether anything trainable lies in a part of the model, such as `text_encoder`."""
    return any(part in trainable.get(kind, {}) for kind in ("lora", "params"))


def _is_trained(name: str, config: Config) -> bool:
    if config.train == "all":
        return True
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in config.trainable)


def _slots(trainable: Tree, config: Config) -> list[tuple[str, Path, tuple[int, ...]]]:
    """(name, path in trainable, slot) of everything that is in `trainable`."""
    out = []
    for entry in entries(config.model, PARTS):
        if _has(trainable, ("params", *entry.path)):
            out.append((entry.name, ("params", *entry.path), entry.slot))
    for entry in linear_layers(config.model, PARTS):
        for part in ("a", "b"):
            path = ("lora", *entry.path[:-1], part)
            if _has(trainable, path):
                out.append((entry.layer, path, entry.slot))
    return out


def _has(tree: Tree, path: Path) -> bool:
    try:
        leaf(tree, path)
    except KeyError:
        return False
    return True


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
