"""A checkpoint understood: where it lies, what layout and size it has, which adapters belong into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.files import Checkpoint, read_checkpoint
from convert.folders import ADAPTER_CONFIG
from convert.hub import fetch
from convert.names import Sorted, sort_tensors, unwrapped
from convert.sizes import infer_config
from convert.unmerged import Peft, has_adapters, merged, peft_config, take_apart
from sam3jax.config import ModelConfig
from sam3jax.files import FileError
from sam3jax.weights.model_folder import is_model_folder
from sam3jax.weights.start import is_hub_id


@dataclasses.dataclass(frozen=True)
class Reading:
    """A checkpoint's tensors by use, the configuration, and remarks in words.

    files: all that a conversion reads. hub: the repository that the weights are of, None for a file.
    """

    checkpoint: Checkpoint
    sorted: Sorted
    config: ModelConfig
    notes: tuple[str, ...]
    files: tuple[Path, ...]
    hub: str | None = None


def understand(
    src: str | Path,
    overrides: Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
) -> Reading:
    """Open a checkpoint, tell its layout and its size. Reads no weights.

    src: a file, a folder or a hub id; of LoRA adapters alone the base is the one that they name. adapter: a
    peft folder that is merged into it. Raises FileError or ConversionError in words.
    """
    checkpoint, peft, files = _open(src, adapter)
    tensors = peft.base if peft and peft.base else unwrapped(checkpoint.tensors)
    found = sort_tensors(tensors, checkpoint.carried)
    notes = []
    if peft:
        settings = peft_config(*dict.fromkeys(file.parent for file in reversed(files)))
        dead = {n: t for n, t in found.carried.items() if n not in checkpoint.carried}
        live = merged(found.live, dead, peft, settings)
        found = dataclasses.replace(found, live=live)
        notes = [
            f"{len(peft.pairs)} LoRA adapters of {adapter or src} merged into {checkpoint.path}"
        ]
    config, remarks = infer_config(
        found.live,
        found.carried,
        layout=found.layout.kind,
        stored=found.stored,
        written=checkpoint.config,
        overrides=overrides,
    )
    notes += remarks
    if checkpoint.ignored:
        notes.append(
            f"beside the weights the file holds, left out: {', '.join(checkpoint.ignored)}"
        )
    if checkpoint.others:
        notes.append(
            f"the folder also holds {', '.join(checkpoint.others)}; give the file's path to take that instead"
        )
    hub = str(src) if is_hub_id(src) and not peft else None
    return Reading(checkpoint, found, config, tuple(notes), files, hub)


def located(src: str | Path) -> Path:
    """The file or folder that `src` names; a hub id is downloaded, if need be, into the hub's cache."""
    return fetch(str(src)) if is_hub_id(src) else Path(src)


def _open(
    src: str | Path, adapter: str | Path | None
) -> tuple[Checkpoint, Peft | None, tuple[Path, ...]]:
    """(the model's checkpoint, the adapters that belong into it, all files); the adapters' files last."""
    checkpoint = read_checkpoint(located(src))
    tensors = unwrapped(checkpoint.tensors)
    if not has_adapters(tensors):
        if adapter is None:
            return checkpoint, None, checkpoint.files
        beside = read_checkpoint(located(adapter))
        peft = _apart(beside, adapter)
        if peft.base:
            raise FileError(f"--adapter {adapter} holds a whole model: give it as --src, alone")
        return checkpoint, peft, (*checkpoint.files, *beside.files, *_config(beside))
    peft = _apart(checkpoint, src)
    if peft.base:
        settings = _config(checkpoint)
        if adapter is not None:
            settings = (Path(adapter) / ADAPTER_CONFIG,)
        return checkpoint, peft, (*checkpoint.files, *settings)
    if adapter is not None:
        raise FileError(f"{src} holds LoRA adapters, and so does --adapter: give the base as --src")
    base = _base_of(checkpoint, src, len(peft.pairs))
    files = (*base.files, *checkpoint.files, *_config(checkpoint))
    return base, peft, files


def _apart(checkpoint: Checkpoint, src: str | Path) -> Peft:
    peft = take_apart(unwrapped(checkpoint.tensors), checkpoint.path)
    if not peft.pairs:
        raise FileError(f"{src} holds no LoRA adapters: expected a folder written by peft")
    return peft


def _config(checkpoint: Checkpoint) -> tuple[Path, ...]:
    file = checkpoint.path.parent / ADAPTER_CONFIG
    return (file,) if file.is_file() else ()


def _base_of(adapters: Checkpoint, src: str | Path, layers: int) -> Checkpoint:
    """The checkpoint of the model that adapters name. Raises FileError, with the remedy, where it is not there."""
    name = peft_config(adapters.path.parent).get("base_model_name_or_path")
    what = f"{src} holds LoRA adapters ({layers} layers) without their base model"
    remedy = f"give it: --src BASE --adapter {src}, or merge with peft's merge_and_unload() and convert that"
    if not name:
        raise FileError(f"{what}, and {ADAPTER_CONFIG} names none: {remedy}")
    if is_model_folder(name):
        raise FileError(
            f"{what}; they name {name}, a model folder of ours. Give the checkpoint that it was made of: --src "
            f"BASE --adapter {src}"
        )
    try:
        base = read_checkpoint(located(name))
    except FileError as error:
        raise FileError(f"{what} ({error}): {remedy}") from error
    if has_adapters(base.tensors):
        raise FileError(f"{what}; they name {name}, which holds adapters too: {remedy}")
    return base
