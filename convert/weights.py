"""Arrays of a torch detector <-> the Flax parameter tree, driven by the table in convert.keymap.

`flax_tensors` and `torch_tensors` move tensors that are read when asked for, so that a checkpoint
never lies in memory twice; `to_flax` and `to_torch` are the same on arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from convert import tracker
from convert.layouts import LAYOUTS
from convert.names import (
    CLASS_POSITION,
    from_huggingface,
    huggingface_shapes,
    to_huggingface,
    with_text_model,
)
from sam3jax.config import ModelConfig
from sam3jax.errors import UserError
from sam3jax.weights.names import (
    DEFAULT_PARTS,
    DETECTOR_PART,
    TEXT,
    Entry,
    carried_shapes,
    entries,
    parts_of,
)
from sam3jax.weights.parts import live_parts, stacked_leaves, torch_shape, torch_shapes
from sam3jax.weights.tensor_file import Tensor, is_float
from sam3jax.weights.tree import Path, flatten, unflatten


class ConversionError(UserError):
    """Tensors do not fit the model; the message lists all of them and says what to do."""


def to_flax(
    tensors: Mapping[str, np.ndarray],
    config: ModelConfig,
    *,
    layout: str = "official",
    parts: tuple[str, ...] = DEFAULT_PARTS,
) -> dict[str, Any]:
    """The parameter tree from the tensors of a bare detector, by their names in `layout`; dtype as given.

    parts: what becomes live, see sam3jax.weights.names; the tracker's tensors stand among the others
    as `tracker....` (transformers: `tracker_model....`, `tracker_neck....`).

    Raises ConversionError that names every missing, surplus and misshapen tensor at once. Tensors
    that reach no output (`carried_shapes`) may be there or not; they have no place in the tree.
    """
    lazy = {name: Tensor.of(np.asarray(array)) for name, array in tensors.items()}
    others = tuple(part for part in parts if part != DETECTOR_PART)
    beside = {n: lazy.pop(n) for n in list(lazy) if others and tracker.is_tracker(n)}
    lost: list[str] = []
    stored = None
    if _checked(layout) == "huggingface":
        stored = {with_text_model(name): tensor for name, tensor in lazy.items()}
        lazy, lost = from_huggingface(lazy)
        beside = tracker.to_official(beside)
    known = {entry.torch for entry in entries(config)} | set(carried_shapes(config))
    lost += [name for name in lazy if name not in known and ".attn.freqs_cis" not in name]
    leaves = flax_tensors(lazy, config, carried=lazy, surplus=lost, stored=stored)
    try:
        leaves |= live_parts({}, beside, config, others, "this model")
    except UserError as error:
        raise ConversionError(str(error)) from error
    return unflatten({path: leaf.read() for path, leaf in leaves.items()})


def to_torch(
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    layout: str = "official",
    carried: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The tensors of a bare detector, by their names in `layout`, from the parameter tree.

    Live tensors of the tracker and its neck stand among them as `to_flax` takes them.

    `carried` are the tensors that reach no output, as they came, by official name; absent ones are
    written as zeros. The RoPE tables that torch stores beside the weights (`freqs_cis`) come from
    convert.sizes.rope_tables; the official layout without them loads with `strict=False`.
    """
    leaves = {path: Tensor.of(np.asarray(leaf)) for path, leaf in flatten(params).items()}
    extra = {name: Tensor.of(np.asarray(array)) for name, array in (carried or {}).items()}
    out = torch_tensors(leaves, config, extra)
    if _checked(layout) == "huggingface":
        beside = {n: out.pop(n) for n in list(out) if tracker.is_tracker(n)}
        out = to_huggingface(out)[0] | tracker.to_huggingface(beside)[0]
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
    return stacked_leaves(tensors, config)


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

    for name, want in torch_shapes(config).items():
        if stored is None:
            check(name, tensors.get(name), want, True)
        else:
            for part, shape in huggingface_shapes(name, want).items():
                check(part, stored.get(part), shape, True)
    dead = carried_shapes(config)
    projection = f"{TEXT}.encoder.text_projection"  # of any width: nothing reads it
    if tracker.is_multiplex(carried):  # of any shape
        dead.pop(projection)
    elif projection in carried and len(shape := carried[projection].shape) == 2 and shape[1]:
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
    """The tensors of a model by official name, unread, in checkpoint order: the detector's, bare, then
    its dead ones, then those of the other live parts.

    Dead tensors are taken from `carried`; absent ones are zeros in the dtype of the weights.
    """
    carried = carried or {}
    out = part_tensors(leaves, config, DEFAULT_PARTS)
    positions = next(name for name in out if CLASS_POSITION.startswith(name))
    dtype = out[positions].dtype
    for name, shape in carried_shapes(config).items():
        out[name] = carried.get(name) or Tensor.of(np.zeros(shape, dtype))
    others = [part for part in parts_of(path[0] for path in leaves) if part != DETECTOR_PART]
    return out | part_tensors(leaves, config, others)


def part_tensors(
    leaves: Mapping[Path, Tensor], config: ModelConfig, parts: Iterable[str]
) -> dict[str, Tensor]:
    """The tensors of these parts by official name, unread."""
    owners: dict[str, list[Entry]] = {}
    for entry in entries(config, parts):
        owners.setdefault(entry.torch, []).append(entry)
    return {name: _torch_tensor(found, leaves) for name, found in owners.items()}


def narrowed(
    tensors: Mapping[str, Tensor], leaves: Mapping[Path, Tensor], config: ModelConfig
) -> dict[str, str]:
    """{torch name: dtype} of the tensors whose leaf is wider than they are, to be undone on the way back."""
    found = {entry.torch: leaves[entry.path].dtype for entry in entries(config)}
    return {n: str(tensors[n].dtype) for n, dtype in found.items() if tensors[n].dtype != dtype}


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
