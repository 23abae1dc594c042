"""LoRA adapters as an export needs them: by the path of their layer, folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sam3jax.files import FileError
from sam3jax.weights.tensor_file import Tensor
from sam3jax.weights.tree import flatten

Adapters = dict[tuple[str, ...], "Adapter"]


class Adapter:
    """A low-rank addition to a kernel: a [*stack, D, R], b [*stack, R, E], scale [*stack].

    A scale of 0 says that the layer in that slot is not adapted.
    """

    def __init__(self, a: Any, b: Any, scale: Any, dropout: float = 0.0):
        self.a, self.b, self.scale = (np.asarray(x, np.float32) for x in (a, b, scale))
        self.dropout = dropout

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that it adds to."""
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def delta(self, slot: tuple[int, ...] = ()) -> np.ndarray:
        """scale * A B, of all layers or of the one in `slot`."""
        return self.scale[slot][..., None, None] * (self.a[slot] @ self.b[slot])


def adapters_of(lora: Mapping[str, Any], lora_scale: Mapping[str, Any]) -> Adapters:
    """The adapters of the two collections, by the path of their layer."""
    scales = flatten(lora_scale)
    flat = flatten(lora)
    found: Adapters = {}
    for path, a in flat.items():
        if path[-1] == "a":
            layer = path[:-1]
            dropout = scales.get((*layer, "dropout"))
            rate = float(np.max(dropout)) if dropout is not None else 0.0
            found[layer] = Adapter(a, flat[(*layer, "b")], scales[(*layer, "scale")], rate)
    return found


def count_layers(adapters: Adapters) -> int:
    """How many layers are adapted, each layer of a stack for itself."""
    return sum(int((adapter.scale != 0).sum()) for adapter in adapters.values())


def merge(
    leaves: Mapping[tuple[str, ...], Tensor], adapters: Adapters
) -> dict[tuple[str, ...], Tensor]:
    """The leaves with each adapter added to the kernel of its layer, when read, in float32.

    Not in the kernel's own dtype: what bfloat16 rounds away of the sum may be most of what was learned.
    Raises FileError where one fits no kernel.
    """
    merged = dict(leaves)
    for path, adapter in adapters.items():
        kernel = leaves.get((*path, "kernel"))
        if kernel is None or kernel.shape != adapter.shape:
            found = "there is none" if kernel is None else f"it is {list(kernel.shape)}"
            raise FileError(
                f"the adapter of {'/'.join(path)} needs a kernel of {list(adapter.shape)}, {found}: "
                "is this its base model?"
            )
        merged[(*path, "kernel")] = _merged(kernel, adapter)
    return merged


def _merged(kernel: Tensor, adapter: Adapter) -> Tensor:
    depth = adapter.scale.ndim

    def get(slot: tuple[int, ...]) -> np.ndarray:
        base = np.asarray(kernel.read(slot[:depth]), np.float32)
        return (base + adapter.delta(slot[:depth]))[slot[depth:]]

    return Tensor(kernel.shape, np.dtype(np.float32), get)
