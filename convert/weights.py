"""Arrays of a torch detector <-> the Flax parameter tree, driven by the table in convert.keymap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.keymap import Entry, carried_shapes, entries
from sam3jax.config import ModelConfig
from sam3jax.model import Sam3
from sam3jax.types import Prompts


class ConversionError(ValueError):
    """Tensors do not fit the model; the message lists all of them and says what to do."""


def parameter_shapes(config: ModelConfig) -> dict[str, Any]:
    """The tree of `jax.ShapeDtypeStruct` that `Sam3(config).init` would give; nothing is computed."""
    edge = config.image_size
    zeros = jnp.zeros
    prompts = Prompts(
        text_id=zeros((1, 1), jnp.int32), valid=zeros((1, 1), bool), boxes=zeros((1, 1, 1, 4)),
        box_labels=zeros((1, 1, 1), jnp.int32), box_valid=zeros((1, 1, 1), bool),
    )  # fmt: skip

    def init(key):
        images, tokens = zeros((1, edge, edge, 3)), zeros((1, config.text_length), jnp.int32)
        return Sam3(config).init(key, images, tokens, prompts)["params"]

    return jax.eval_shape(init, jax.random.key(0))


def to_flax(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """The parameter tree from the tensors of a bare detector, by official name; dtype as given.

    Raises ConversionError that names every missing, surplus and misshapen tensor at once. Tensors
    that reach no output (`carried_shapes`) may be there or not; they have no place in the tree.
    """
    shapes = {
        tuple(k.key for k in path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(parameter_shapes(config))
    }
    table = entries(config)
    problems, flat = [], {}
    for entry in table:
        tensor = tensors.get(entry.torch)
        if tensor is None:
            problems.append(f"missing: {entry.torch}")
            continue
        array = entry.read(tensor)
        want = shapes[entry.path][len(entry.slot) :]
        if array.shape != want:
            problems.append(f"misshapen: {entry.torch} gives {array.shape}, expected {want}")
            continue
        if entry.slot:
            if entry.path not in flat:
                flat[entry.path] = np.empty(shapes[entry.path], array.dtype)
            flat[entry.path][entry.slot] = array
        else:
            flat[entry.path] = array
    known = {entry.torch for entry in table} | set(carried_shapes(config))
    problems += [f"surplus: {name}" for name in tensors if name not in known]
    if problems:
        problems = list(dict.fromkeys(problems))
        raise ConversionError(
            f"{len(problems)} tensors do not fit: {'; '.join(problems)}; "
            "is this a SAM 3 detector of this size?"
        )
    return unflatten(flat)


def to_torch(
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    carried: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The tensors of a bare detector, by official name, from the parameter tree.

    `carried` are the tensors that reach no output, as they came; absent ones are written as zeros.
    """
    thirds: dict[str, list[tuple[Entry, np.ndarray]]] = {}
    out: dict[str, np.ndarray] = {}
    for entry in entries(config):
        leaf = params
        for part in entry.path:
            leaf = leaf[part]
        array = entry.write(np.asarray(leaf)[entry.slot])
        if entry.third is None:
            out[entry.torch] = np.ascontiguousarray(array)
        else:
            thirds.setdefault(entry.torch, []).append((entry, array))
            out.setdefault(entry.torch, array)  # keeps the table's order
    for name, parts in thirds.items():
        out[name] = np.concatenate([array for _, array in sorted(parts, key=lambda p: p[0].third)])
    dtype = next(iter(out.values())).dtype
    for name, shape in carried_shapes(config).items():
        out[name] = (carried or {}).get(name, np.zeros(shape, dtype))
    return out


def unflatten(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """{("a", "b"): x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree
