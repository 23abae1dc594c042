"""What a run starts from: a model folder, a checkpoint, another run, or random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sam3jax.checksums import of_array, of_bytes
from sam3jax.config import Config, ConfigError, ModelConfig, parse_config
from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer
from sam3jax.model.init import init_params
from sam3jax.weights.lora import merge_lora
from sam3jax.weights.model_folder import (
    is_model_folder,
    load_params,
    load_tokenizer,
)
from sam3jax.weights.names import roots
from sam3jax.weights.scope import scope_of
from sam3jax.weights.start import open_start
from sam3jax.weights.tree import Tree

# What a user sets of a model that is read from a folder; its sizes come with it.
# The two switches are of the program that will run the model: a training can be for transformers.
AT_RUN_TIME = {
    "image_size", "dropout", "drop_path", "compute_dtype", "remat", "fused_attention", "geometry_without_boxes",
    "clamp_presence",
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """params: float32 arrays, adapters folded in. fingerprint: ARRAYS-VOCABULARY, see `same_base`."""

    params: Tree
    fingerprint: str


@dataclass(frozen=True)
class Base:
    """A starting point, its arrays unread. config: the run's, with the sizes that the weights have."""

    config: Config
    tokenizer: Tokenizer
    load: Callable[[], Weights]


def open_base(config: Config) -> Base:
    """Sizes and vocabulary of what `init` names; `load` reads the arrays.

    Raises ConfigError (FileError for a damaged folder) that says what was found and expected.
    """
    if config.init is None:
        return _noise(config)
    path = Path(config.init)
    if is_run_folder(path):
        return _run(config, path)
    folder = open_start(config.init)
    tokenizer = load_tokenizer(folder)

    def load() -> Weights:
        params = load_params(folder, np.float32, scope_of(config).parts)
        refuse_not_finite(params, path)
        text = (folder.tokenizer or "").encode()
        return Weights(params, f"{fingerprint(params)}-{of_bytes(text)}")

    return Base(_with_sizes(config, folder.config, path), tokenizer, load)


def is_run_folder(path: str | Path) -> bool:
    """Whether a folder is one that `python -m sam3jax.train` wrote."""
    return (Path(path) / "config.yaml").is_file() and not is_model_folder(path)


def _noise(config: Config) -> Base:
    if config.model.vocab_size > 4096:
        raise ConfigError(
            "init is not set: SAM 3 starts from its published weights, init=sam3.pt or init=facebook/sam3; to learn "
            "from nothing set model.preset=tiny"
        )
    parts = scope_of(config).parts
    tokenizer = Tokenizer(build_byte_tokenizer(config.model.vocab_size), config.model.text_length)
    return Base(
        config, tokenizer, lambda: Weights(init_params(config.model, config.seed, parts), "noise")
    )


def _run(config: Config, path: Path) -> Base:
    from sam3jax.weights.run_folder import open_run_base, read_run

    below = open_run_base(path)

    def load() -> Weights:
        run = read_run(path)
        params = jax.device_get(run.variables["params"])
        if "lora" in run.variables:
            params = jax.device_get(
                merge_lora(params, run.variables["lora"], run.variables["lora_scale"])
            )
        wanted = {root for part in scope_of(config).parts for root in roots(part)}
        if not wanted <= params.keys():
            # A run of another task below: what it did not hold comes from where it began.
            beside = open_base(below.config.model_copy(update={"task": config.task})).load().params
            params = {**beside, **params}
        params = {root: params[root] for root in params if root in wanted}
        refuse_not_finite(params, path)
        # Not of the merged weights: their last bits depend on the machine that merges.
        arrays, dash, words = run.base_fingerprint.partition("-")
        own = fingerprint(jax.device_get(run.trained), arrays)
        return Weights(params, f"{own}{dash}{words}")

    return Base(_with_sizes(config, below.config.model, path), below.tokenizer, load)


def fingerprint(tree: Tree, behind: str = "") -> str:
    """Hexadecimal digits that are equal where all arrays of a tree are, on every machine.

    behind: what else they stand for, such as the fingerprint of the weights below adapters.
    """
    digest = hashlib.sha256(behind.encode())
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)  # a sha256 of the values takes twice as long
        text = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} {of_array(array)}"
        digest.update(text.encode())
    return digest.hexdigest()[:32]


def same_base(began: str, found: str) -> bool:
    """Whether two fingerprints are of the same arrays and the same vocabulary.

    The first one may be of a version that noted the arrays alone.
    """
    return began in (found, found.partition("-")[0])


def refuse_not_finite(params: Tree, path: str | Path) -> None:
    """Raises ConfigError naming the first array with a NaN or an infinity: no step could learn from it."""
    for where, leaf in jax.tree.leaves_with_path(params):
        wrong = np.size(leaf) - np.count_nonzero(np.isfinite(leaf))
        if wrong:
            name = ".".join(str(key.key) for key in where)
            raise ConfigError(
                f"the weights in {path} are not finite: {name} holds NaN or infinity in {wrong:,} of "
                f"{np.size(leaf):,} values; convert or download them again"
            )


def _with_sizes(config: Config, found: ModelConfig, path: Path) -> Config:
    """The run's config with the model's own sizes; contradictions are errors."""
    asked: dict[str, Any] = {k: getattr(config.model, k) for k in config.model.model_fields_set}
    wrong = [
        f"{k} {getattr(found, k)} (the config says {v})"
        for k, v in asked.items()
        if k not in AT_RUN_TIME | {"preset"} and getattr(found, k) != v
    ]
    if wrong:
        raise ConfigError(
            f"{path} is a model of another size: it has {', '.join(wrong)}; leave the sizes out of the "
            "config, they come with the weights"
        )
    chosen = {k: v for k, v in asked.items() if k in AT_RUN_TIME}
    model = parse_config({**found.model_dump(), **chosen}, ModelConfig)
    return config.model_copy(update={"model": model})
