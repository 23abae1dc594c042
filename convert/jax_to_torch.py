"""Model folder -> torch checkpoint in either layout, adapters merged, carried tensors included."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)
import numpy as np

from convert import tracker
from convert.adapters import count_layers, merge
from convert.differences import compared
from convert.files import write_checkpoint
from convert.folders import CARRIED
from convert.huggingface_config import huggingface_config, processor_files
from convert.layouts import LAYOUTS
from convert.model_card import CARD, model_card
from convert.names import CLASS_POSITION, DETECTOR, INTERACTIVE, to_huggingface
from convert.rounding import rounding
from convert.sizes import rope_tables
from convert.sources import Source
from convert.torch_to_jax import cast
from convert.weights import torch_tensors
from sam3jax.config import ModelConfig
from sam3jax.files import FileError, refuse_to_replace, whole
from sam3jax.weights.model_folder import ModelFolder, is_model_folder
from sam3jax.weights.names import PROJECTION, TEXT, carried_shapes
from sam3jax.weights.parts import common_dtype, official_name
from sam3jax.weights.tensor_file import Tensor, is_float, stream_tensors
from sam3jax.weights.tracker_names import NECK

_WEIGHTS = "model.safetensors"
_MANY = 40  # names that a person may read in a sentence
PROJECTION_NAME = f"{TEXT}.encoder.text_projection"
# All that a transformers export can be made of.
_NAMES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json", _WEIGHTS,
    _WEIGHTS + CARRIED, CARD,
)  # fmt: skip


def export(
    source: Source,
    out: str | Path,
    *,
    layout: str | None = None,
    dtype: str | None = None,
    prefix: str | None = None,
    detector_only: bool = False,
    base: str | None = None,
    compare: Sequence[Path] | None = (),
    phrases: Sequence[str] = (),
) -> list[str]:
    """Write a torch checkpoint. Returns what a person should know, in sentences.

    layout: "official" or "huggingface"; None: the one that the weights came in. out: a `.pt` or
    `.safetensors` file; a transformers export to any other name is a folder with `config.json` beside.
    dtype: of every float; None: as stored, and float32 where something was trained. prefix: what stands before the detector's names; None: as it was, and as the layout has it.
    base: what the model card of a transformers folder names as the model that was trained.
    compare, phrases: see `compared`: on what the difference to the program of this layout is measured.
    Raises FileError, after which nothing was written.
    """
    folder, adapters = source.folder, source.adapters
    layout = layout or folder.source.get("layout", "official")
    if layout not in LAYOUTS:
        raise FileError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    out = Path(out)
    if is_model_folder(out) or is_model_folder(out.parent):
        raise FileError(
            f"{out} lies in a model folder, which an export would damage: give another --out"
        )
    if adapters:
        folder = dataclasses.replace(folder, leaves=merge(folder.leaves, adapters))
    tensors, rest = assemble(folder, layout, prefix=prefix, detector_only=detector_only)
    tensors = cast(tensors, dtype)
    lines = [
        f"{out}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors.values()):,} bytes, {layout} layout"
    ]
    if adapters:
        lines.append(f"{count_layers(adapters)} adapters merged")
    if dtype and source.training:
        lines += rounding(folder, source.training, dtype)
    lines += compared(source, layout, compare, phrases, dtype)
    if rest:
        lines.append(f"kept beside, for the way back: {', '.join(_kinds(rest))}")
    if layout == "huggingface" and out.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        _write_folder(out, folder, tensors, rest, model_card(source, base))
    else:
        write_checkpoint(out, tensors, rest)
    return lines


def assemble(
    folder: ModelFolder, layout: str, *, prefix: str | None = None, detector_only: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of an export by their final names, and carried ones that the layout has no place for."""
    config, carried = folder.config, folder.carried
    inside = torch_tensors(folder.leaves, config, carried)
    for name, dtype in folder.source.get("dtypes", {}).items():
        inside[name] = inside[name].astype(np.dtype(dtype))
    tuned = {name: inside.pop(name) for name in list(inside) if tracker.is_tracker(name)}
    others = {} if detector_only else _beside(carried, tuned)
    neck = {n: t for n, t in others.items() if n.startswith(tracker.NECKS)}
    outside = {n: t for n, t in others.items() if n not in neck}
    multiplex = tracker.is_multiplex(carried)
    translated, rest = tracker.to_huggingface(neck | outside)
    tracked = bool(outside if layout == "official" else translated)
    before = _prefix(folder, layout, tracked) if prefix is None else prefix
    wrapper = before.removesuffix(DETECTOR[layout])
    used = set(inside) | set(others)
    if layout == "official":
        if multiplex:  # it has no fourth level, and what it leaves out nobody missed
            absent = carried_shapes(config).keys() - carried.keys()
            absent |= {n for n in inside if n.startswith(f"{NECK}.3.")}
            inside = {n: t for n, t in inside.items() if n not in absent}
        inside |= neck | _rope(config, carried)
        used |= set(inside) | {CLASS_POSITION}
        alien = {
            n: t for n, t in outside.items() if n.startswith((tracker.HUGGINGFACE, "tracker_neck."))
        }
        out = {before + name: t for name, t in inside.items()}
        out |= {
            _outside(name, before, wrapper): t for name, t in outside.items() if name not in alien
        }
        rest = alien
    else:
        projection = inside[PROJECTION_NAME]
        if len(projection.shape) != 2 or projection.shape[0] != config.text_dim:
            # SAM 3.1 may have another one, which transformers would refuse to load. Nothing reads it.
            rest[PROJECTION_NAME] = projection
            zeros = np.zeros((config.text_dim, PROJECTION), projection.dtype)
            inside[PROJECTION_NAME] = Tensor.of(zeros)
        inside, dropped = to_huggingface(inside)
        out = {before + name: t for name, t in inside.items()}
        buffers = {n: t for n, t in carried.items() if n.startswith(DETECTOR[layout])}
        out |= {before + n.removeprefix(DETECTOR[layout]): t for n, t in buffers.items()}
        used |= set(buffers)
        again = tracker.HUGGINGFACE if folder.source.get("doubled") else ""
        for name, t in translated.items():
            twice = again if name.startswith(tracker.HUGGINGFACE) else ""
            out[wrapper + twice + name] = t
        # Invented ones (zeros, or the class position of a transformers checkpoint) are not worth keeping.
        known = folder.source.get("layout") == "official" or CLASS_POSITION in carried
        rest |= {
            n: t for n, t in dropped.items() if n in carried or (n == CLASS_POSITION and known)
        }
    rest |= {n: t for n, t in carried.items() if n not in used and not tracker.is_tracker(n)}
    return out, {} if detector_only else rest


def _beside(carried: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Carried tensors of the tracker and its neck, those that are live in their place and dtype."""
    out = {
        name: live.get(official_name(name), tensor)
        for name, tensor in carried.items()
        if tracker.is_tracker(name) or name.startswith(INTERACTIVE)
    }
    placed = {official_name(name) for name in out}
    return out | {name: tensor for name, tensor in live.items() if name not in placed}


def _kinds(names: Iterable[str]) -> list[str]:
    """The names, layer numbers aside, each once; only how they begin where they are many."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    if len(kinds) <= _MANY:
        return kinds
    begin = dict.fromkeys(".".join(kind.split(".")[:3]) for kind in kinds)
    return [name if name in kinds else f"{name}.*" for name in begin]


def _outside(name: str, before: str, wrapper: str) -> str:
    """An interactive predictor is part of the image model; the tracker stands beside the detector."""
    return before + name if name.startswith(INTERACTIVE) else wrapper + name


def _prefix(folder: ModelFolder, layout: str, tracked: bool) -> str:
    source = folder.source
    if source.get("layout") == layout:
        return source.get("wrapper", "") + source.get("detector", "")
    return DETECTOR[layout] if tracked or source.get("detector") else ""


def _rope(config: ModelConfig, carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tables where they are of this picture size, else new ones."""
    tables = rope_tables(config)
    if any(name.endswith("freqs_cis_real") for name in carried):
        whole = {name: table.read() for name, table in tables.items()}
        tables = {
            f"{n}_real": Tensor.of(np.ascontiguousarray(np.real(x))) for n, x in whole.items()
        }
        tables |= {
            f"{n}_imag": Tensor.of(np.ascontiguousarray(np.imag(x))) for n, x in whole.items()
        }
    stored = {name: carried[name] for name in tables if name in carried}
    return {
        name: stored[name] if name in stored and stored[name].shape == t.shape else t
        for name, t in tables.items()
    }


def _is_export(folder: Path) -> bool:
    """Whether a folder says of itself that it holds a transformers SAM 3."""
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return False
    return str(kind).startswith("sam3")


def _write_folder(
    out: Path,
    folder: ModelFolder,
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Tensor],
    card: str,
) -> None:
    refuse_to_replace(out, _NAMES if _is_export(out) else (), "export of python -m convert")
    shapes = {name: t.shape for name, t in tensors.items()}
    config: dict[str, Any] = huggingface_config(
        folder.config, shapes, folder.source.get("tracker_config")
    )
    # What transformers loads all weights in; without it, in the dtype of the first one.
    floats = {t.dtype for t in tensors.values() if is_float(t.dtype)}
    config["dtype"] = str(common_dtype(floats))
    with whole(out, sum(t.nbytes for t in (*tensors.values(), *rest.values()))) as temporary:
        temporary.mkdir()
        stream_tensors(temporary / _WEIGHTS, tensors, {"format": "pt"})
        if rest:
            stream_tensors(temporary / (_WEIGHTS + CARRIED), rest)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (temporary / CARD).write_text(card, "utf-8")
        if folder.tokenizer is not None:
            (temporary / "tokenizer.json").write_text(folder.tokenizer, "utf-8")
            for name, content in processor_files(folder.config, folder.tokenizer).items():
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
