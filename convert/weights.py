"""Arrays of a torch detector <-> the Flax parameter tree, driven by the table in convert.keymap.

`flax_tensors` and `torch_tensors` move tensors that are read when asked for, so that a checkpoint
never lies in memory twice; `to_flax` and `to_torch` are the same on arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from convert.layouts import LAYOUTS
from convert.names import (
    CLASS_POSITION,
    common_dtype,
    from_huggingface,
    huggingface_shapes,
    to_huggingface,
    with_text_model,
)
from sam3jax.config import ModelConfig
from sam3jax.errors import UserError
from sam3jax.model.init import parameter_shapes
from sam3jax.weights.names import TEXT, Entry, carried_shapes, entries
from sam3jax.weights.tensor_file import Tensor, is_float
from sam3jax.weights.tree import Path, flatten, unflatten


class ConversionError(UserError):
    """Tensors do not fit the model; the message lists all of them and says what to do."""


@functools.cache
def leaf_shapes(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """Shape of every leaf of the parameter tree, by path."""
    leaves = jax.tree.leaves_with_path(parameter_shapes(config))
    return {tuple(k.key for k in path): leaf.shape for path, leaf in leaves}


def to_flax(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, *, layout: str = "official"
) -> dict[str, Any]:
    """The parameter tree from the tensors of a bare detector, by their names in `layout`; dtype as given.

    Raises ConversionError that names every missing, surplus and misshapen tensor at once. Tensors
    that reach no output (`carried_shapes`) may be there or not; they have no place in the tree.
    """
    lazy = {name: Tensor.of(np.asarray(array)) for name, array in tensors.items()}
    lost: list[str] = []
    stored = None
    if _checked(layout) == "huggingface":
        stored = {with_text_model(name): tensor for name, tensor in lazy.items()}
        lazy, lost = from_huggingface(lazy)
    known = {entry.torch for entry in entries(config)} | set(carried_shapes(config))
    lost += [name for name in lazy if name not in known and not name.endswith("freqs_cis")]
    leaves = flax_tensors(lazy, config, carried=lazy, surplus=lost, stored=stored)
    return unflatten({path: leaf.read() for path, leaf in leaves.items()})


def to_torch(
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    layout: str = "official",
    carried: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The tensors of a bare detector, by their names in `layout`, from the parameter tree.

    `carried` are the tensors that reach no output, as they came, by official name; absent ones are
    written as zeros. The RoPE tables that torch stores beside the weights (`freqs_cis`) come from
    convert.sizes.rope_tables; the official layout without them loads with `strict=False`.
    """
    leaves = {path: Tensor.of(np.asarray(leaf)) for path, leaf in flatten(params).items()}
    extra = {name: Tensor.of(np.asarray(array)) for name, array in (carried or {}).items()}
    out = torch_tensors(leaves, config, extra)
    if _checked(layout) == "huggingface":
        out = to_huggingface(out)[0]
    return {name: np.ascontiguousarray(tensor.read()) for name, tensor in out.items()}


def flax_tensors(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    carried: Mapping[str, Tensor] | None = None,
    surplus: Sequence[str] = (),
    stored: Mapping[str, Tensor] | None = None,
) -> dict[Path, Tensor]:
    """The leaves of the parameter tree, unread, from the tensors of a bare detector by official name.

    carried, surplus, stored: see `misfits`.
    Raises ConversionError that names every missing, surplus and misshapen tensor at once.
    """
    problems = misfits(tensors, config, carried=carried, surplus=surplus, stored=stored)
    if any(problems.values()):
        raise ConversionError(report(problems))
    parts: dict[Path, dict[tuple[int, ...], tuple[Entry, Tensor]]] = {}
    for entry in entries(config):
        parts.setdefault(entry.path, {})[entry.slot] = (entry, tensors[entry.torch])
    shapes = leaf_shapes(config)
    return {path: _leaf(shapes[path], found) for path, found in parts.items()}


def misfits(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    carried: Mapping[str, Tensor] | None = None,
    surplus: Sequence[str] = (),
    stored: Mapping[str, Tensor] | None = None,
) -> dict[str, list[str]]:
    """{"missing", "misshapen", "surplus": what a detector of this size cannot use, by name}.

    carried: dead tensors; they may be absent. surplus: names that have no place anywhere. stored: the
    tensors as the transformers layout holds them, by the names of which they are reported; None: official.
    """
    carried = carried or {}
    problems: dict[str, list[str]] = {"missing": [], "misshapen": [], "surplus": list(surplus)}

    def check(name: str, tensor: Tensor | None, want: tuple[int, ...], live: bool) -> None:
        if tensor is None:
            if live:
                problems["missing"].append(name)
        elif tensor.shape != want:
            problems["misshapen"].append(f"{name} is {list(tensor.shape)}, expected {list(want)}")
        elif live and not is_float(tensor.dtype):
            problems["misshapen"].append(f"{name} is {tensor.dtype}, expected a floating dtype")

    shapes = leaf_shapes(config)
    wanted = {e.torch: torch_shape(e, shapes[e.path][len(e.slot) :]) for e in entries(config)}
    for name, want in wanted.items():
        if stored is None:
            check(name, tensors.get(name), want, True)
        else:
            for part, shape in huggingface_shapes(name, want).items():
                check(part, stored.get(part), shape, True)
    dead = carried_shapes(config)
    projection = f"{TEXT}.encoder.text_projection"  # of any width: nothing reads it
    if projection in carried and len(shape := carried[projection].shape) == 2 and shape[1]:
        dead[projection] = (config.text_dim, shape[1])
    for name, want in dead.items():
        parts = huggingface_shapes(name, want) if stored is not None else {}
        for part, shape in parts.items():
            check(part, (stored or {}).get(part), shape, False)
        if not parts:
            check(name, carried.get(name), want, False)
    check(CLASS_POSITION, carried.get(CLASS_POSITION), (1, 1, config.vit_dim), False)
    return problems


def torch_tensors(
    leaves: Mapping[Path, Tensor],
    config: ModelConfig,
    carried: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a bare detector by official name, unread, in checkpoint order, dead ones last.

    Dead tensors are taken from `carried`; absent ones are zeros in the dtype of the weights.
    """
    carried = carried or {}
    owners: dict[str, list[Entry]] = {}
    for entry in entries(config):
        owners.setdefault(entry.torch, []).append(entry)
    out = {name: _torch_tensor(found, leaves) for name, found in owners.items()}
    positions = next(name for name in out if CLASS_POSITION.startswith(name))
    dtype = out[positions].dtype
    for name, shape in carried_shapes(config).items():
        out[name] = carried.get(name) or Tensor.of(np.zeros(shape, dtype))
    return out


def torch_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the whole torch tensor of which `shape` is this entry's array in Flax."""
    # A broadcast scalar has the shape and takes no memory.
    back = entry.write(np.broadcast_to(np.int8(0), shape)).shape
    return back if entry.third is None else (3 * back[0], *back[1:])


def narrowed(
    tensors: Mapping[str, Tensor], leaves: Mapping[Path, Tensor], config: ModelConfig
) -> dict[str, str]:
    """{torch name: dtype} of the tensors whose leaf is wider than they are, to be undone on the way back."""
    found = {entry.torch: leaves[entry.path].dtype for entry in entries(config)}
    return {n: str(tensors[n].dtype) for n, dtype in found.items() if tensors[n].dtype != dtype}


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


def _torch_tensor(found: list[Entry], leaves: Mapping[Path, Tensor]) -> Tensor:
    """One torch tensor from its entry, or from its three."""
    found = sorted(found, key=lambda entry: entry.third or 0)
    leaf = leaves[found[0].path]
    shape = torch_shape(found[0], leaf.shape[len(found[0].slot) :])

    def get(slot: tuple[int, ...]) -> np.ndarray:
        arrays = [entry.write(leaves[entry.path].read(entry.slot)) for entry in found]
        return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays))[slot]

    return Tensor(shape, leaf.dtype, get)


def _checked(layout: str) -> str:
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    return layout


def report(problems: Mapping[str, list[str]]) -> str:
    """All problems in one message; long lists in full, since a cut list hides the one that matters."""
    found = {kind: list(dict.fromkeys(names)) for kind, names in problems.items() if names}
    count = sum(len(names) for names in found.values())
    lines = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in found.items()]
    hint = "is the checkpoint complete, and a SAM 3 detector of this size?"
    if "surplus" in found and len(found) == 1:
        hint = "is this another model, or a trainer's own addition? Remove them from the file to convert the rest"
    return (
        f"{count} tensor{'s' * (count > 1)} do not fit the model. " + "; ".join(lines) + f". {hint}"
    )
