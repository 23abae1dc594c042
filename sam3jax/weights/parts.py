"""Torch tensors as leaves of the parameter tree, part by part (see sam3jax.weights.names).

A part is live where its tensors are leaves, as a task that uses it needs them; else its tensors are
carried under their torch names, byte for byte. One function turns the second into the first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from sam3jax.config import ModelConfig
from sam3jax.files import FileError
from sam3jax.model.init import parameter_shapes
from sam3jax.weights.names import DEFAULT_PARTS, DETECTOR_PART, Entry, entries, parts_of
from sam3jax.weights.tensor_file import Tensor, is_float
from sam3jax.weights.tracker_names import MULTIPLEX_NAMES

Path = tuple[str, ...]
# Where the tracker's tensors stand when a picture model with clicks was saved.
INSIDE_PICTURE_MODEL = "inst_interactive_predictor.model."


@functools.cache
def leaf_shapes(
    config: ModelConfig, parts: tuple[str, ...] = DEFAULT_PARTS
) -> dict[Path, tuple[int, ...]]:
    """Shape of every leaf of these parts of the parameter tree, by path."""
    leaves = jax.tree.leaves_with_path(parameter_shapes(config, parts))
    return {tuple(k.key for k in path): leaf.shape for path, leaf in leaves}


def torch_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the whole torch tensor of which `shape` is this entry's array in Flax."""
    # A broadcast scalar has the shape and takes no memory.
    back = entry.write(np.broadcast_to(np.int8(0), shape)).shape
    return back if entry.third is None else (3 * back[0], *back[1:])


def torch_shapes(
    config: ModelConfig, parts: tuple[str, ...] = DEFAULT_PARTS
) -> dict[str, tuple[int, ...]]:
    """{official name: shape} of every live torch tensor of these parts."""
    shapes = leaf_shapes(config, parts)
    return {e.torch: torch_shape(e, shapes[e.path][len(e.slot) :]) for e in entries(config, parts)}


def stacked_leaves(
    tensors: Mapping[str, Tensor], config: ModelConfig, parts: tuple[str, ...] = DEFAULT_PARTS
) -> dict[Path, Tensor]:
    """The leaves of these parts, unread, from torch tensors by official name, all there and in shape."""
    found: dict[Path, dict[tuple[int, ...], tuple[Entry, Tensor]]] = {}
    for entry in entries(config, parts):
        found.setdefault(entry.path, {})[entry.slot] = (entry, tensors[entry.torch])
    shapes = leaf_shapes(config, parts)
    return {path: _leaf(shapes[path], layers) for path, layers in found.items()}


def live_parts(
    leaves: Mapping[Path, Tensor],
    carried: Mapping[str, Tensor],
    config: ModelConfig,
    parts: Iterable[str],
    where: str,
) -> dict[Path, Tensor]:
    """The leaves of these parts: those that are live as they are, others made of carried tensors.

    Leaves of further parts are left out. Raises FileError, for people, where a part is neither live
    nor complete among the carried tensors; `where` is the file or folder that the message names.
    """
    live = set(parts_of(path[0] for path in leaves))
    out: dict[Path, Tensor] = {}
    for part in parts:
        if part in live or part == DETECTOR_PART:
            roots = {path[0] for path in leaf_shapes(config, (part,))}
            out |= {path: leaf for path, leaf in leaves.items() if path[0] in roots}
        else:
            tensors = by_official_name(carried)
            _check(tensors, config, part, where)
            out |= stacked_leaves(tensors, config, (part,))
    return out


def by_official_name(carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Carried tensors with the tracker's names as they stand in sam3.pt, behind `tracker.`."""
    return {official_name(name): tensor for name, tensor in carried.items()}


def official_name(name: str) -> str:
    """A carried tensor's name in sam3.pt; what SAM 3.1 alone has keeps its own."""
    for there, here in MULTIPLEX_NAMES:
        if name.startswith(there):
            return here + name.removeprefix(there)
    if name.startswith(INSIDE_PICTURE_MODEL):
        return "tracker." + name.removeprefix(INSIDE_PICTURE_MODEL)
    return name


def common_dtype(dtypes: set[np.dtype]) -> np.dtype:
    """The dtype of one array for tensors stored in several: one that holds them all."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def _check(tensors: Mapping[str, Tensor], config: ModelConfig, part: str, where: str) -> None:
    wanted = torch_shapes(config, (part,))
    missing = [name for name in wanted if name not in tensors]
    wrong = [
        f"{name} is {list(tensors[name].shape)} {tensors[name].dtype}, expected {list(shape)} floats"
        for name, shape in wanted.items()
        if name in tensors and (tensors[name].shape != shape or not is_float(tensors[name].dtype))
    ]
    if len(missing) == len(wanted):
        raise FileError(
            f"{where} has no {TITLES[part]} ({len(wanted)} tensors such as {missing[0]}): many tuned "
            "checkpoints leave them out. Convert the whole sam3.pt or model.safetensors of facebook/sam3"
        )
    if missing or wrong:
        raise FileError(
            f"{where}: {len(missing) + len(wrong)} tensors of the {TITLES[part]} do not fit the model. "
            + "; ".join([*(f"{name} is missing" for name in missing), *wrong])
        )


TITLES = {
    "second_neck": "second neck, which clicks and tracks read",
    "interactive": "interactive heads (prompt encoder and mask decoder)",
}


def _leaf(shape: tuple[int, ...], parts: Mapping[tuple[int, ...], tuple[Entry, Tensor]]) -> Tensor:
    """One leaf of the tree; its layers are read, turned and stacked when asked for."""
    dtype = common_dtype({tensor.dtype for _, tensor in parts.values()})
    depth = len(next(iter(parts)))

    def get(slot: tuple[int, ...]) -> np.ndarray:
        if len(slot) >= depth:
            entry, tensor = parts[slot[:depth]]
            return entry.read(tensor.read())[slot[depth:]]
        out = np.empty(shape[len(slot) :], dtype)
        for place, (entry, tensor) in parts.items():
            if place[: len(slot)] == slot:
                out[place[len(slot) :]] = entry.read(tensor.read())
        return out

    return Tensor(shape, dtype, get)
