"""LoRA adapters in peft's names: alone, beside a base, or inside a checkpoint that nobody merged.

The scale of an adapter stands in `adapter_config.json` alone, so that no tensors can be merged without it.
Sums are float32, whatever the base is stored in.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import read_json
from convert.folders import ADAPTER_CONFIG
from convert.names import CLASS_POSITION, from_huggingface, to_huggingface, with_text_model
from sam3jax.files import FileError
from sam3jax.weights.tensor_file import Tensor

_BEFORE = re.compile(r"^(?:module\.)?base_model\.model\.")
_PAIR = re.compile(r"^(.*)\.lora_([AB])\.(?:(\w+)\.)?weight$")
_SAVED = re.compile(r"^(.*)\.modules_to_save\.(\w+)\.(.*)$")
_ORIGINAL = re.compile(r"\.original_module\.")
_BASE = re.compile(r"\.base_layer\.(?=\w+$)")
_PREFIXES = ("detector_model.", "detector.", "model.detector.")
# Values with which A and B stand for W + scale * B A, W being the base as it was published. The ways to begin
# that are not listed (pissa, olora, corda, loftq, lora_ga) change W itself, which is in no file of peft.
_USUAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,), "fan_in_fan_out": (False,), "bias": ("none",), "megatron_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "use_qalora": (False,), "use_bdlora": (None, False), "alora_invocation_tokens": (None,),
    "arrow_config": (None,), "kasa_config": (None,), "monteclora_config": (None,), "layer_replication": (None,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Peft:
    """pairs: {layer: (A [R, D], B [E, R])}, unread. saved: tensors of modules that were trained whole.
    base: the tensors of the model itself, where they stand in the same file.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    saved: dict[str, Tensor]
    base: dict[str, Tensor]


def has_adapters(names: Mapping[str, Any]) -> bool:
    """Whether these are tensors of a peft model or of its adapters."""
    return any(".lora_" in name for name in names)


def take_apart(tensors: Mapping[str, Tensor], where: Path) -> Peft:
    """Adapters, modules trained whole, and the base of a peft checkpoint, by the model's own names.

    Raises FileError for kinds of adapters that are no pair of matrices, and for several adapters at once.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    titles: set[str] = set()
    alone = not any(_BASE.search(name) for name in tensors)
    strange = []
    for whole, tensor in tensors.items():
        name = _BEFORE.sub("", whole)
        if pair := _PAIR.match(name):
            halves.setdefault(pair[1], {})[pair[2]] = tensor
            titles |= {pair[3]} if pair[3] else set()
            strange += [whole] if len(tensor.shape) != 2 else []
        elif ".lora_" in name:
            strange.append(whole)
        elif module := _SAVED.match(name):
            saved[f"{module[1]}.{module[3]}"] = tensor
            titles.add(module[2])
        elif alone:
            saved[name] = tensor
        else:
            base[_BASE.sub(".", _ORIGINAL.sub(".", name))] = tensor
    strange += [f"{layer}.lora_A or lora_B" for layer, pair in halves.items() if len(pair) < 2]
    if strange:
        raise FileError(
            f"{where} holds LoRA adapters that are no pairs of matrices ({', '.join(strange[:5])}): merge them with "
            "peft's merge_and_unload(), save that model and convert it"
        )
    if len(titles) > 1:
        raise FileError(
            f"{where} holds several adapters ({', '.join(sorted(titles))}): save one of them alone"
        )
    return Peft({layer: (pair["A"], pair["B"]) for layer, pair in halves.items()}, saved, base)


def peft_config(*folders: Path) -> dict[str, Any]:
    """The adapter_config.json of the first of these folders that has one.

    Raises FileError where none has, or where it asks for another sum than W + scale * B A.
    """
    file = next((f for folder in folders if (f := folder / ADAPTER_CONFIG).is_file()), None)
    if file is None:
        raise FileError(
            f"LoRA adapters cannot be merged without their {ADAPTER_CONFIG}, which states their scale: expected it "
            f"in {folders[0]}, or give its folder with --adapter; or merge with peft's merge_and_unload()"
        )
    config = read_json(file)
    wrong = [f"{k} {config[k]!r:.80}" for k, usual in _USUAL.items() if config.get(k, usual[0]) not in usual]  # fmt: skip
    if config.get("peft_type", "LORA") != "LORA":
        wrong.append(f"peft_type {config['peft_type']!r}")
    alphas = [config.get("lora_alpha"), *_pattern(config, "alpha_pattern").values()]
    if not all(isinstance(a, (int, float)) and math.isfinite(a) for a in alphas):
        wrong.append(f"lora_alpha {alphas!r:.80}")
    if wrong:
        raise FileError(
            f"{file} asks for what is not merged here ({', '.join(wrong)}): merge with peft's merge_and_unload(), "
            "save that model and convert it"
        )
    return config


def merged(
    live: Mapping[str, Tensor], dead: Mapping[str, Tensor], peft: Peft, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Tensors of a detector by official name, with the adapters in them.

    The adapters may have the names of either layout. dead: tensors that reach no output, by official name;
    what stands for them is left out. Raises FileError that names adapters without a place.
    """
    prefix = next((p for p in _PREFIXES if all(n.startswith(p) for n in (*peft.pairs, *peft.saved))), "")  # fmt: skip
    bare = lambda names: {name.removeprefix(prefix): value for name, value in names.items()}
    pairs = {with_text_model(name): pair for name, pair in bare(peft.pairs).items()}
    saved = {with_text_model(name): tensor for name, tensor in bare(peft.saved).items()}
    unread = dead.keys() | to_huggingface(dead)[0].keys()
    saved = {name: tensor for name, tensor in saved.items() if name not in unread}
    if any(f"{layer}.weight" in live for layer in pairs):
        return _apply(live, pairs, saved, config)
    translated, rest = to_huggingface(live)
    tuned = _apply(translated, pairs, saved, config)
    return from_huggingface(tuned, rest.get(CLASS_POSITION))[0]


def _apply(
    tensors: Mapping[str, Tensor],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    saved: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> dict[str, Tensor]:
    out, wrong = dict(tensors), []
    for name, tensor in saved.items():
        if name not in out or out[name].shape != tensor.shape:
            wrong.append(f"{name} {list(tensor.shape)}")
        out[name] = tensor
    for layer, (a, b) in pairs.items():
        base = out.get(f"{layer}.weight")
        if base is None or base.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            wrong.append(f"{layer} {list(b.shape)} x {list(a.shape)}")
            continue
        out[f"{layer}.weight"] = _sum(base, a, b, _scale(layer, a.shape[0], config))
    if wrong:
        raise FileError(
            f"{len(wrong)} adapters have no place in the base: {', '.join(wrong)}; is it the model that they were "
            "trained on?"
        )
    return out


def _sum(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    wide = lambda tensor: tensor.read().astype(np.float32)
    get = lambda slot: (wide(base) + np.float32(scale) * (wide(b) @ wide(a)))[slot]
    return Tensor(base.shape, np.dtype(np.float32), get)


def _scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / rank; alphas of single layers are patterns of how their names end, as in peft."""
    alphas = _pattern(config, "alpha_pattern")
    try:
        ends = [p for p in alphas if re.match(rf"(.*\.)?({p})$", layer)]
    except re.error as error:
        raise FileError(f"{ADAPTER_CONFIG}: alpha_pattern holds no patterns: {error}") from error
    alpha = alphas[ends[0]] if ends else config["lora_alpha"]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise FileError(f"{ADAPTER_CONFIG}: {key} is {found!r:.80}, expected an object")
    return found
