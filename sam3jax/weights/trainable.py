"""What is trained: split off once at the start, merged with the rest in the step.

    trainable {"lora": adapters, "params": parameters trained themselves}   differentiated, updated
    frozen    {"params": the rest, "lora_scale": ...}                       an argument, never touched

Patterns are matched against per-layer torch names. A stacked leaf moves to `trainable` as a whole where
any of its layers is trained; `training.rates` keeps the others where they are.
"""

from __future__ import annotations

import jax

from sam3jax.config import Config, ConfigError
from sam3jax.weights.lora import adapted_layers, init_lora, select
from sam3jax.weights.names import Entry
from sam3jax.weights.scope import live_entries, scope_of
from sam3jax.weights.tree import Tree, leaf, overlay, put


def start(params: Tree, config: Config) -> tuple[Tree, Tree]:
    """(trainable, frozen) of a run before its first step, from the weights that it starts from.

    Raises ConfigError where nothing is trained, or a pattern matches nothing.
    """
    lora, scale = {}, {}
    if config.train == "lora" and config.lora.enabled:
        key = jax.random.fold_in(jax.random.key(config.seed), 2)
        lora, scale = init_lora(key, params, config.model, config.lora, scope_of(config))
    trainable, frozen = split(params, lora, scale, config)
    if not jax.tree.leaves(trainable):
        raise ConfigError("nothing is trained: lora.enabled is false and `trainable` is empty")
    return trainable, frozen


def split(params: Tree, lora: Tree, lora_scale: Tree, config: Config) -> tuple[Tree, Tree]:
    """(trainable, frozen) of a run. Raises ConfigError for a pattern without a match.

    Buffers, such as the prompt encoder's random frequencies, and what the task does not read are frozen
    whatever is trained.
    """
    paths = {e.path for e in trained_entries(config)}
    trained: Tree = {}
    rest: Tree = {}
    for path in dict.fromkeys(e.path for e in live_entries(config)):
        put(trained if path in paths else rest, path, leaf(params, path))
    trainable = {"lora": lora} if lora else {}
    if trained:
        trainable["params"] = trained
    return trainable, {"params": rest, "lora_scale": lora_scale}


def trained_entries(config: Config) -> list[Entry]:
    """The tensors that a run trains themselves, layer by layer. Raises ConfigError for a pattern without a match."""
    can_move = [e for e in live_entries(config) if scope_of(config).covers(e)]
    if config.train == "all":
        return can_move
    chosen = select(config.trainable, [e.name for e in can_move], "trainable")
    return [e for e in can_move if e.name in chosen]


def adapted_entries(config: Config) -> list[Entry]:
    """The kernels that a run gives an adapter, layer by layer."""
    if config.train != "lora" or not config.lora.enabled:
        return []
    return adapted_layers(config.model, config.lora, scope_of(config))


def merge(trainable: Tree, frozen: Tree) -> Tree:
    """The variables of the model: {"params", "lora", "lora_scale"}."""
    params = overlay(trainable.get("params", {}), frozen["params"])
    adapters = {"lora": trainable["lora"]} if "lora" in trainable else {}
    return {**frozen, "params": params, **adapters}


def without_text_tower(frozen: Tree) -> Tree:
    """What a step needs that is given its phrases encoded: 1.4 GB less at full size."""
    params = {name: part for name, part in frozen["params"].items() if name != "text_encoder"}
    return {**frozen, "params": params}


def touches(trainable: Tree, part: str) -> bool:
    """Whether anything trainable lies in a part of the model, such as `text_encoder`."""
    return any(part in trainable.get(kind, {}) for kind in ("lora", "params"))
