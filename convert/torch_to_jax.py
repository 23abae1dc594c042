"""Torch checkpoint -> model folder; and what `inspect` says of a checkpoint or model folder."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.adapters import Adapters, count_layers
from convert.hub import find_vocabulary
from convert.layouts import FLOATS
from convert.names import Layout, mixed_dtypes
from convert.reading import Reading, understand
from convert.sizes import missing_dead
from convert.tracker import NECKS, is_multiplex
from convert.values import Watch, looked_at, value_notes
from convert.weights import ConversionError, flax_tensors, misfits, narrowed, report
from sam3jax.config import ModelConfig
from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer, build_clip_tokenizer
from sam3jax.files import FileError
from sam3jax.weights.model_folder import ModelFolder, is_model_folder, save_model_folder
from sam3jax.weights.tensor_file import DTYPES, Tensor, is_float

CLIP_VOCABULARY = 49408
MERGES = "bpe_simple_vocab_16e6.txt.gz"


def torch_to_jax(
    src: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write the model folder of a checkpoint. Returns what a person should know, in sentences.

    src, adapter: see `understand`. dtype: of every float ("float32", "bfloat16", "float16"); None: as
    stored. tokenizer: a `tokenizer.json` or CLIP's merges file; None: the one beside the checkpoint, or one
    that is found. Raises FileError or ConversionError, after which nothing was written.
    """
    return write_folder(understand(src, overrides, adapter), out, dtype=dtype, tokenizer=tokenizer)


def write_folder(
    reading: Reading,
    out: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
) -> list[str]:
    """`torch_to_jax` of a checkpoint that is understood already."""
    found, carried, notes = reading.sorted, reading.sorted.carried, list(reading.notes)
    used, beside = Watch(), Watch()
    leaves = flax_tensors(
        used.over(found.live), reading.config, carried=carried, surplus=found.unknown, stored=found.stored
    )  # fmt: skip
    text, origin = find_tokenizer(reading.config, tokenizer or reading.checkpoint.tokenizer)
    layout = found.layout
    source = {
        "file": reading.checkpoint.path.name,
        "layout": layout.kind,
        "wrapper": layout.wrapper,
        "detector": layout.detector,
        "doubled": layout.doubled,
    }
    if reading.hub:
        source["hub"] = reading.hub
    if dtype is None and (narrow := narrowed(found.live, leaves, reading.config)):
        source["dtypes"] = narrow
    if dtype is None and (mixed := mixed_dtypes(found.stored or {})):
        notes.append(
            f"q, k and v are of different dtypes, an export has them in one that holds all three: {', '.join(mixed)}"
        )
    if tracker := (reading.checkpoint.config or {}).get("tracker_config"):
        source["tracker_config"] = tracker
    save_model_folder(
        out, reading.config, cast(leaves, dtype), text, carried=cast(beside.over(carried), dtype),
        source=source, approve=used.refuse_broken,
    )  # fmt: skip
    return [
        f"{out}: {_count(leaves)} from {len(found.live)} tensors, {_count(carried)} carried, {_dtypes(leaves, dtype)}",
        f"size: {size_line(reading.config)}",
        f"vocabulary: {origin}",
        *notes,
        *value_notes(used, beside),
    ]


def find_tokenizer(config: ModelConfig, source: str | Path | None) -> tuple[str | None, str]:
    """The text of a `tokenizer.json` for a text tower, and where it is from.

    Raises FileError where the given vocabulary does not fit the tower.
    """
    if source is None and config.vocab_size == 1024:
        return build_byte_tokenizer(config.vocab_size), "the built-in one of 1,024 tokens"
    origin = str(source)
    if source is None and config.vocab_size == CLIP_VOCABULARY:
        source = _installed_vocabulary() or find_vocabulary()
        origin = f"CLIP's, found as {source}"
    if source is None:
        return None, (
            "NONE: give --tokenizer FILE (the tokenizer.json beside the checkpoint, or CLIP's "
            f"{MERGES}); the folder cannot read phrases without it"
        )
    path = Path(source)
    if not path.is_file():
        raise FileError(f"there is no tokenizer file {path}")
    try:
        text = path.read_text("utf-8") if path.suffix == ".json" else build_clip_tokenizer(path)
        if path.suffix == ".json" and "model" not in dict(json.loads(text)):
            raise ValueError("it has no `model`")
        size = Tokenizer(text, config.text_length).vocab_size
    except FileError:
        raise
    except (ValueError, TypeError) as error:
        raise FileError(
            f"{path} holds no vocabulary ({error}): give CLIP's tokenizer.json or bpe_simple_vocab_16e6.txt.gz"
        ) from error
    if size > config.vocab_size:
        raise FileError(
            f"{path} has {size:,} tokens, the checkpoint's text tower {config.vocab_size:,}: it is another model's"
        )
    return text, origin


def _installed_vocabulary() -> Path | None:
    """CLIP's merges file of an installed package."""
    for package, inside in (("open_clip", "."), ("sam3", "assets")):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            if (file := Path(folder) / inside / MERGES).is_file():
                return file
    return None


def cast(tensors: Mapping[Any, Tensor], dtype: str | None) -> dict[Any, Tensor]:
    """The floats among the tensors in another dtype; positions (RoPE tables) need all their digits."""
    if dtype is None:
        return dict(tensors)
    if dtype not in FLOATS:
        raise ConversionError(f"dtype {dtype!r}: expected one of {', '.join(FLOATS)}")
    target = DTYPES[FLOATS[dtype]]
    moves = lambda name, t: is_float(t.dtype) and ".freqs_cis" not in str(name)
    return {n: t.astype(target) if moves(n, t) else t for n, t in tensors.items()}


def describe(
    src: str | Path,
    overrides: Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
) -> tuple[ModelConfig, list[str]]:
    """The configuration of a checkpoint, and in lines what it holds: layout, size, tensors, dtypes, numbers."""
    reading = understand(src, overrides, adapter)
    live, carried, unknown = reading.sorted.live, reading.sorted.carried, reading.sorted.unknown
    problems = misfits(
        live, reading.config, carried=carried, surplus=unknown, stored=reading.sorted.stored
    )
    zeros = missing_dead(reading.config, carried)
    return reading.config, [
        f"{reading.checkpoint.path}: {layout_name(reading.sorted.layout, is_multiplex(carried))}, {reading.checkpoint.nbytes:,} bytes",
        f"used: {len(live)} tensors, {_count(live)}",
        f"carried: {len(carried)} tensors, {_count(carried)}{_groups(carried)}",
        f"unknown: {len(unknown)} tensors{_listed(unknown)}",
        f"missing: {len(problems['missing'])} tensors{_listed(problems['missing'])}",
        *([f"absent, without effect: {len(zeros)} tensors{_listed(zeros)}"] if zeros else []),
        f"dtypes: {_dtypes({**live, **carried}, None)}",
        f"size: {size_line(reading.config)}",
        *reading.notes,
        *value_notes(*looked_at(live, carried)),
        *([f"PROBLEM: {report(problems)}"] if any(problems.values()) else []),
    ]


def describe_source(folder: ModelFolder, adapters: Adapters) -> list[str]:
    """What a model folder or a run folder holds, in lines."""
    source, carried = folder.source, folder.carried
    kind = "run folder" if adapters or not is_model_folder(folder.path) else "model folder"
    origin = f", from {source['file']} ({source['layout']} layout)" if source.get("file") else ""
    lines = [
        f"{folder.path}: {kind}{origin}",
        f"used: {len(folder.leaves)} arrays, {_count(folder.leaves)}",
        f"carried: {len(carried)} tensors, {_count(carried)}{_groups(carried)}",
        f"dtypes: {_dtypes({**folder.leaves, **carried}, None)}",
        f"size: {size_line(folder.config)}",
        f"vocabulary: {'yes' if folder.tokenizer else 'NONE, convert again with --tokenizer'}",
        *value_notes(*looked_at({"/".join(p): t for p, t in folder.leaves.items()}, carried)),
    ]
    if adapters:
        size = sum(
            int((a.scale != 0).sum()) * a.rank * (a.a.shape[-2] + a.b.shape[-1])
            for a in adapters.values()
        )
        ranks = sorted({a.rank for a in adapters.values()})
        lines.append(
            f"adapters: {count_layers(adapters)} layers, rank {', '.join(map(str, ranks))}, {size:,} parameters"
        )
    return lines


def layout_name(layout: Layout, multiplex: bool = False) -> str:
    """The layout in words."""
    kind = "published (official)" if layout.kind == "official" else "transformers (huggingface)"
    kind = f"{kind} of SAM 3.1" if multiplex else kind
    prefix = layout.wrapper + layout.detector
    return f"{kind} layout, " + (f"detector behind {prefix!r}" if prefix else "bare detector")


def size_line(c: ModelConfig) -> str:
    """The sizes that matter, in a line."""
    return (
        f"pictures {c.image_size} px, patch {c.patch_size}; ViT {c.vit_stages * c.vit_stage_blocks} x {c.vit_dim} "
        f"({c.vit_heads} heads, window {c.window_size}); text {c.text_layers} x {c.text_dim} ({c.text_heads} heads, "
        f"{c.vocab_size:,} tokens); width {c.dim}, fusion {c.fusion_layers}, decoder {c.decoder_layers}, geometry {c.geometry_layers}, {c.queries} queries"
    )


def _count(tensors: Mapping[Any, Tensor]) -> str:
    return f"{sum(int(np.prod(t.shape)) for t in tensors.values()):,} parameters"


def _dtypes(tensors: Mapping[Any, Tensor], dtype: str | None) -> str:
    names = Counter(
        dtype if dtype and is_float(t.dtype) else str(t.dtype) for t in tensors.values()
    )
    return ", ".join(f"{name} ({n})" if len(names) > 1 else name for name, n in names.most_common())


def _groups(carried: Mapping[str, Tensor]) -> str:
    groups = Counter(
        "tracker" if n.startswith(("tracker", "inst_interactive")) else "further necks" if n.startswith(NECKS)
        else "RoPE tables" if ".freqs_cis" in n else "dead"
        for n in carried
    )  # fmt: skip
    return f" ({', '.join(f'{name} {n}' for name, n in groups.items())})" if groups else ""


def _listed(names: list[str] | tuple[str, ...]) -> str:
    return f": {', '.join(names)}" if names else ""
