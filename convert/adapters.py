"""LoRA adapters: folded into the weights, or written for `peft` under transformers' names.

peft wraps torch's linear layers one by one: a stacked adapter becomes one pair per layer, and the one
on the ViT's fused qkv three pairs that share A.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam3jax.config import ModelConfig
from sam3jax.files import FileError, refuse_to_replace, whole
from sam3jax.weights.lora import linear_layers
from sam3jax.weights.names import DETECTOR_PART, parts_of
from sam3jax.weights.tensor_file import Tensor, stream_tensors, to_dtype
from sam3jax.weights.tree import flatten

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
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
    """The leaves with each adapter added to the kernel of its layer, when read; dtype kept.

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


def peft_adapter(
    adapters: Adapters, config: ModelConfig, base: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, adapter_config) as peft's `PeftModel.from_pretrained` reads them onto Sam3Model.

    base: what `base_model_name_or_path` shall say. Raises FileError where no layer is adapted.
    """
    tensors: dict[str, np.ndarray] = {}
    alphas: dict[str, float] = {}
    ranks: dict[str, int] = {}
    adapted = {path[0] for path, adapter in adapters.items() if adapter.scale.any()}
    if beside := [part for part in parts_of(adapted) if part != DETECTOR_PART]:
        raise FileError(
            f"adapters of {', '.join(beside)} have no place in transformers' Sam3Model: export the merged "
            "weights, without --adapter"
        )
    for entry in linear_layers(config):
        adapter = adapters.get(entry.path[:-1])
        if adapter is None or not adapter.scale[entry.slot]:
            continue
        names = [name.removesuffix(".weight") for name in entry.huggingface]
        a, b = adapter.a[entry.slot].T, adapter.b[entry.slot].T  # [R, D], [E, R]
        for name, rows in zip(names, np.split(b, len(names)), strict=True):
            tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(rows)
            alphas[name] = float(adapter.scale[entry.slot]) * adapter.rank
            ranks[name] = adapter.rank
    if not tensors:
        raise FileError("no layer is adapted here: export the merged weights, without --adapter")
    alpha, rank = next(iter(alphas.values())), next(iter(ranks.values()))
    content = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {
            name: _number(x) for name, x in alphas.items() if _number(x) != _number(alpha)
        },
        "lora_dropout": max(adapter.dropout for adapter in adapters.values()),
        "target_modules": sorted(alphas),
        # peft also takes a name that only ends like a target; this one is not ours.
        "exclude_modules": ["text_encoder.text_projection"],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    return tensors, content


def write_adapter(
    out: str | Path, adapters: Adapters, config: ModelConfig, base: str | None = None
) -> list[str]:
    """Write the adapters as a peft folder; returns what a person should know, in sentences."""
    tensors, content = peft_adapter(adapters, config, base)
    out = Path(out)
    refuse_to_replace(out, (WEIGHTS, CONFIG), "adapter folder")
    with whole(out, sum(t.nbytes for t in tensors.values())) as temporary:
        temporary.mkdir()
        lazy = {name: Tensor.of(array) for name, array in tensors.items()}
        stream_tensors(temporary / WEIGHTS, lazy, {"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    layers = len(content["target_modules"])
    return [
        f"{out}: {layers} layers, rank {content['r']}, alpha {content['lora_alpha']}, for PeftModel.from_pretrained(Sam3Model, ...)"
    ]


def _merged(kernel: Tensor, adapter: Adapter) -> Tensor:
    depth = adapter.scale.ndim

    def get(slot: tuple[int, ...]) -> np.ndarray:
        base = kernel.read(slot[:depth])
        array = to_dtype(np.asarray(base, np.float32) + adapter.delta(slot[:depth]), base.dtype)
        return array[slot[depth:]]

    return Tensor(kernel.shape, kernel.dtype, get)


def _number(x: float) -> float | int:
    """Without float32's last digit: alpha / rank * rank."""
    x = float(f"{x:.6g}")
    return int(x) if x.is_integer() else x
