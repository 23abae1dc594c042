"""What can be exported: a model folder, or a run folder with its base and its adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from convert.adapters import Adapters, adapters_of
from sam3jax.config import ConfigError, load_config
from sam3jax.files import FileError
from sam3jax.weights.base import is_run_folder, open_base
from sam3jax.weights.model_folder import ModelFolder, is_model_folder, open_model_folder
from sam3jax.weights.names import entries, parts_of
from sam3jax.weights.parts import by_official_name, live_parts
from sam3jax.weights.run_folder import CONFIG, Run, read_run
from sam3jax.weights.scope import scope_of
from sam3jax.weights.start import open_start
from sam3jax.weights.tensor_file import Tensor
from sam3jax.weights.trainable import adapted_entries, trained_entries
from sam3jax.weights.tree import flatten


@dataclasses.dataclass(frozen=True)
class Training:
    """What a run tells of its weights.

    base: what the first run started from, as its `init` says; None for random weights. below: the runs that
    it was trained on top of. moved: per-layer names (Entry.name) of all that it or a run below changed.
    before: the leaves of the base; {} for random weights.
    """

    run: Run
    base: str | None
    below: tuple[Path, ...]
    moved: frozenset[str]
    before: dict[tuple[str, ...], Tensor]


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to export: without the adapters, which lie beside. training: None for a model folder."""

    folder: ModelFolder
    adapters: Adapters
    training: Training | None = None


def open_source(path: str | Path) -> Source:
    """A model folder, or a run folder's best checkpoint.

    What was not trained is left unread in the model folder that the run started from, in its own dtype.
    What was trained is float32 (`source["dtypes"]` says so tensor by tensor): in half precision the rounding
    may be larger than what was learned. Carried tensors and the vocabulary come from the model folder.
    Raises FileError or ConfigError that says what was found and expected.
    """
    path = Path(path)
    if not is_run_folder(path):
        if path.is_dir() and not is_model_folder(path):
            raise FileError(
                f"{path} is neither a model folder (config.json of python -m convert) nor a run folder (config.yaml)"
            )
        return Source(open_model_folder(path), {})
    run = read_run(path)
    chain = _chain(path)
    configs = [load_config(file / CONFIG) for file in chain]
    base = configs[-1].init
    root = open_start(base) if base else None
    moved = frozenset(
        entry.name
        for config in configs
        for entry in (*trained_entries(config), *adapted_entries(config))
    )
    adapters = adapters_of(run.variables.get("lora", {}), run.variables.get("lora_scale", {}))
    tuned, start = flatten(run.variables["params"]), flatten(run.base_variables["params"])
    # What the run did not train is read from the folder again: kept here, it would lie in memory twice.
    run = dataclasses.replace(run, variables={}, base_variables={}, trained={})
    if root is None:
        leaves = {name: Tensor.of(np.asarray(leaf)) for name, leaf in tuned.items()}
        folder = ModelFolder(path, run.config.model, leaves, {}, run.tokenizer.to_json(), {})
        return Source(folder, adapters, Training(run, None, chain[1:], moved, {}))
    stored = _stored_leaves(root, parts_of(name[0] for name in tuned))
    leaves = {
        name: stored[name]
        if len(chain) == 1 and name in stored and leaf is start[name]
        else Tensor.of(np.asarray(leaf))
        for name, leaf in tuned.items()
    }
    leaves = _beside(run, root) | leaves
    source = {**root.source, "dtypes": _dtypes(root, leaves, moved)}
    folder = dataclasses.replace(
        root, path=path, config=run.config.model, leaves=leaves, source=source
    )
    return Source(folder, adapters, Training(run, base, chain[1:], moved, stored))


def _dtypes(
    root: ModelFolder, leaves: Iterable[tuple[str, ...]], moved: Collection[str]
) -> dict[str, str]:
    """{torch name: dtype} of every tensor of a run: as stored, and at least float32 where it was trained."""
    table = entries(root.config, parts_of(path[0] for path in leaves))
    trained = {entry.torch for entry in table if entry.name in moved}
    narrowed, carried = root.source.get("dtypes", {}), by_official_name(root.carried)
    found: dict[str, str] = {}
    for entry in table:
        owner = root.leaves.get(entry.path) or carried.get(entry.torch)
        if owner is not None:
            dtype = np.dtype(narrowed.get(entry.torch, owner.dtype))
            wide = entry.torch in trained and dtype.itemsize < 4
            found[entry.torch] = "float32" if wide else str(dtype)
    return found


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


def _chain(run: Path) -> tuple[Path, ...]:
    """A run and the runs that it was trained on top of, the newest first."""
    chain, seen = [run], [run.resolve()]
    while (start := load_config(chain[-1] / CONFIG).init) is not None and is_run_folder(start):
        if Path(start).resolve() in seen:
            raise ConfigError(f"{run} starts from itself: {' -> '.join(map(str, seen))}")
        chain.append(Path(start))
        seen.append(chain[-1].resolve())
    return tuple(chain)
