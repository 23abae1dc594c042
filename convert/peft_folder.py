"""What a run trained, for `peft` under transformers' names: adapters, and modules that it trained whole.

peft wraps torch's linear layers one by one: a stacked adapter becomes one pair per layer, and the one
on the ViT's fused qkv three pairs that share A. Other parameters travel as `modules_to_save`: peft
replaces whole modules, so that every tensor of such a module is written, its adapter merged.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.adapters import Adapters, merge
from convert.differences import compared
from convert.jax_to_torch import assemble
from convert.model_card import CARD, base_name, model_card
from convert.sources import Source
from sam3jax.config import ModelConfig
from sam3jax.files import FileError, refuse_to_replace, whole
from sam3jax.weights.lora import linear_layers
from sam3jax.weights.names import DETECTOR_PART, entries, parts_of
from sam3jax.weights.tensor_file import Tensor, is_float, stream_tensors
from sam3jax.weights.trainable import trained_entries

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_BEFORE = "base_model.model."


def export_adapter(
    source: Source,
    out: str | Path,
    base: str | None = None,
    *,
    compare: Sequence[Path] | None = (),
    phrases: Sequence[str] = (),
) -> list[str]:
    """Write a run's adapters and what else it trained. Returns what a person should know, in sentences.

    compare, phrases: see `compared`: on what the difference to transformers is measured.
    Raises FileError where peft cannot hold all of it.
    """
    training, config = source.training, source.folder.config
    if training is None:
        raise FileError(
            f"{source.folder.path} is no run: it has no adapters, export it without --adapter"
        )
    if training.below:
        raise FileError(
            f"{training.run.path} was trained on top of {training.below[0]}, and what that one learned is in no "
            "adapter of this run: export the merged weights, without --adapter"
        )
    trained = trained_entries(training.run.config)
    inside = {entry.name for entry in entries(config)}
    if beside := [entry.name for entry in trained if entry.name not in inside]:
        raise FileError(
            f"{', '.join(beside)} are trained, and have no place in transformers' Sam3Model: export the merged "
            "weights, without --adapter"
        )
    saved = saved_modules(source, [name for entry in trained for name in entry.huggingface])
    name = base_name(source, base)
    card = model_card(source, base, adapter=True)
    lines = write_adapter(out, source.adapters, config, name, saved, card)
    lines += compared(source, "huggingface", compare, phrases)
    if not base:
        lines.append(f"base: {name}; --base names it as others find it, for example facebook/sam3")
    return lines


def saved_modules(source: Source, trained: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """{module: its tensors by their whole names} of the modules that peft must replace, adapters merged.

    trained: transformers names of the tensors that were trained. Of two modules one in the other, the
    outer one. peft takes every module whose name ends like one that is asked for: those too.
    """
    owners = {name.rpartition(".")[0] for name in trained}
    owners = {m for m in owners if not any(m.startswith(f"{other}.") for other in owners)}
    if not owners:
        return {}
    folder = dataclasses.replace(source.folder, leaves=merge(source.folder.leaves, source.adapters))
    tensors = assemble(folder, "huggingface", prefix="", detector_only=True)[0]
    modules = {".".join(n.split(".")[:i]) for n in tensors for i in range(1, n.count(".") + 1)}
    taken = {m for m in modules if any(m.endswith(owner) for owner in owners)}
    wide = lambda t: t.astype(np.dtype(np.float32)) if is_float(t.dtype) else t
    return {
        module: {n: wide(t) for n, t in tensors.items() if n.startswith(f"{module}.")}
        for module in sorted(taken)
    }


def peft_adapter(
    adapters: Adapters,
    config: ModelConfig,
    base: str | None = None,
    saved: Iterable[str] = (),
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, adapter_config) as peft's `PeftModel.from_pretrained` reads them onto Sam3Model.

    base: what `base_model_name_or_path` shall say. saved: modules that peft replaces as a whole; their layers
    need no adapter. Raises FileError where no layer is adapted.
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
            if any(f"{name}.".startswith(f"{module}.") for module in saved):
                continue
            tensors[f"{_BEFORE}{name}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"{_BEFORE}{name}.lora_B.weight"] = np.ascontiguousarray(rows)
            alphas[name] = float(adapter.scale[entry.slot]) * adapter.rank
            ranks[name] = adapter.rank
    if not tensors:
        raise FileError(
            "no layer is adapted here that is not trained whole: export the merged weights, without --adapter"
        )
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
        "modules_to_save": sorted(saved) or None,
    }
    return tensors, content


def write_adapter(
    out: str | Path,
    adapters: Adapters,
    config: ModelConfig,
    base: str | None = None,
    saved: Mapping[str, Mapping[str, Tensor]] | None = None,
    card: str = "",
) -> list[str]:
    """Write the adapters as a peft folder; returns what a person should know, in sentences.

    saved: see `saved_modules`. card: the text of the model card.
    """
    saved = saved or {}
    adapted, content = peft_adapter(adapters, config, base, saved)
    out = Path(out)
    refuse_to_replace(out, (WEIGHTS, CONFIG, CARD), "adapter folder")
    lazy = {name: Tensor.of(array) for name, array in adapted.items()}
    lazy |= {_BEFORE + name: t for tensors in saved.values() for name, t in tensors.items()}
    with whole(out, sum(t.nbytes for t in lazy.values())) as temporary:
        temporary.mkdir()
        (temporary / CARD).write_text(card, "utf-8")
        stream_tensors(temporary / WEIGHTS, lazy, {"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    layers = len(content["target_modules"])
    return [
        f"{out}: {layers} layers, rank {content['r']}, alpha {content['lora_alpha']}, for PeftModel.from_pretrained(Sam3Model, ...)",
        *([f"trained whole, as modules_to_save: {', '.join(saved)}"] if saved else []),
    ]


def _number(x: float) -> float | int:
    """Without float32's last digit: alpha / rank * rank."""
    x = float(f"{x:.6g}")
    return int(x) if x.is_integer() else x
