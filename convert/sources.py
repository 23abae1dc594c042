"""What can be exported: a model folder, or a run folder with its base and its adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from convert.adapters import Adapters, adapters_of
from sam3jax.config import ConfigError, load_config
from sam3jax.files import FileError
from sam3jax.weights.base import is_run_folder, open_base
from sam3jax.weights.model_folder import ModelFolder, is_model_folder, open_model_folder
from sam3jax.weights.names import parts_of
from sam3jax.weights.parts import live_parts
from sam3jax.weights.run_folder import CONFIG, Run, read_run
from sam3jax.weights.scope import scope_of
from sam3jax.weights.tensor_file import Tensor, is_float
from sam3jax.weights.tree import flatten


def open_source(path: str | Path) -> tuple[ModelFolder, Adapters]:
    """(weights, adapters) of a model folder or of a run folder's best checkpoint.

    A run's weights without its adapters; what was not trained is left unread in the model folder that
    the run started from, in its own dtype. Trained weights take that dtype too. Carried tensors and the
    vocabulary come from there.
    Raises FileError or ConfigError that says what was found and expected.
    """
    path = Path(path)
    if not is_run_folder(path):
        if path.is_dir() and not is_model_folder(path):
            raise FileError(
                f"{path} is neither a model folder (config.json of python -m convert) nor a run folder (config.yaml)"
            )
        return open_model_folder(path), {}
    run = read_run(path)
    start = load_config(path / CONFIG).init
    root = _root(path)
    tuned, before = flatten(run.variables["params"]), flatten(run.base_variables["params"])
    stored_leaves = _stored_leaves(root, parts_of(path[0] for path in tuned)) if root else {}
    direct = start is not None and is_model_folder(start)
    leaves: dict[tuple[str, ...], Tensor] = {}
    for name, leaf in tuned.items():
        stored = stored_leaves.get(name)
        if stored is not None and direct and leaf is before[name]:
            leaves[name] = stored
        else:
            tensor = Tensor.of(np.asarray(leaf))
            leaves[name] = (
                tensor.astype(stored.dtype) if stored and is_float(stored.dtype) else tensor
            )
    if root is not None:
        leaves |= {name: leaf for name, leaf in _beside(run, root).items() if name not in leaves}
    adapters = adapters_of(run.variables.get("lora", {}), run.variables.get("lora_scale", {}))
    if root is None:
        folder = ModelFolder(path, run.config.model, leaves, {}, run.tokenizer.to_json(), {})
    else:
        folder = dataclasses.replace(root, path=path, config=run.config.model, leaves=leaves)
    return folder, adapters


def _beside(run: Run, root: ModelFolder) -> dict[tuple[str, ...], Tensor]:
    """Leaves of parts that are not the run's: as a run below tuned them, else as the root has them."""
    path, own = run.config.init, set(scope_of(run.config).parts)
    while path is not None and is_run_folder(path):
        below = load_config(Path(path) / CONFIG)
        if not set(scope_of(below).parts) <= own:
            params = open_base(run.config.model_copy(update={"task": below.task})).load().params
            return {name: Tensor.of(np.asarray(leaf)) for name, leaf in flatten(params).items()}
        path = below.init
    return root.leaves


def _stored_leaves(root: ModelFolder, parts: tuple[str, ...]) -> dict[tuple[str, ...], Tensor]:
    """The root's leaves of the run's parts, unread; parts that the run drew at random have none."""
    try:
        return live_parts(root.leaves, root.carried, root.config, parts, str(root.path))
    except FileError:
        return root.leaves


def _root(run: Path) -> ModelFolder | None:
    """The model folder at the beginning of a chain of runs; None where it began with noise."""
    seen: list[Path] = []
    path = run
    while is_run_folder(path):
        if path.resolve() in seen:
            raise ConfigError(f"{run} starts from itself: {' -> '.join(map(str, seen))}")
        seen.append(path.resolve())
        start = load_config(path / CONFIG).init
        if start is None:
            return None
        path = Path(start)
    return open_model_folder(path)
