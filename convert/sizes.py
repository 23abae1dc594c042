"""The ModelConfig of a checkpoint, from the shapes of its tensors.

Shapes tell nearly all of it. The head counts of the two towers, the window and the picture size show
in the RoPE tables that the official layout stores, or in the `config.json` of the transformers
layout; where neither is there, a known size (a preset) that fits all shapes decides, then the
published proportions, and every guess is reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from convert.keymap import DECODER, FUSION, GEOMETRY, TEXT, VIT, carried_shapes
from convert.weights import ConversionError
from sam3jax.config import PRESETS, ModelConfig
from sam3jax.tensor_file import Tensor

# What an export to transformers computes differently; its own checkpoints are read with these.
HUGGINGFACE_SWITCHES = dict(vit_norm_eps=1e-6, geometry_without_boxes=False, clamp_presence=True)
HEAD_WIDTH = 64  # of both published towers


def infer_config(
    live: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    *,
    layout: str = "official",
    written: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[ModelConfig, list[str]]:
    """The configuration of a detector and what had to be guessed, in words.

    live and carried: its tensors by official name. written: the `config.json` of a transformers
    folder. overrides: settings that the user gave, which win.
    Raises ConversionError where a tensor that tells a size is absent or the sizes make no detector.
    """
    shapes = {name: tensor.shape for name, tensor in live.items()}
    found = _from_shapes(shapes)
    found |= _from_rope(shapes, carried)
    if layout == "huggingface":
        found |= HUGGINGFACE_SWITCHES
        found |= _from_written(written or {})
    found |= dict(overrides or {})
    notes: list[str] = []
    if unknown := [key for key in _UNTOLD if key not in found]:
        guess = _guess(found)
        for key in unknown:
            found[key] = guess[key]
        if not _is_preset(found):
            told = ", ".join(f"{key}={found[key]}" for key in unknown)
            notes.append(
                f"the shapes do not tell {told}: taken as a guess; set with --set key=value"
            )
    depth = found.pop("depth")
    if depth % found["vit_stage_blocks"]:
        raise ConversionError(
            f"{depth} ViT blocks do not divide into stages of {found['vit_stage_blocks']}: "
            "set the right number with --set vit_stage_blocks=..."
        )
    preset = _is_preset({**found, "depth": depth})
    found["vit_stages"] = depth // found["vit_stage_blocks"]
    if preset:
        found = {"preset": preset, **found}  # for what no tensor tells, such as dropout
    try:
        return ModelConfig(**found), notes
    except ValidationError as error:
        problems = "; ".join(
            ".".join(map(str, e["loc"]))
            + " " * bool(e["loc"])
            + e["msg"].removeprefix("Value error, ")
            for e in error.errors()
        )
        raise ConversionError(f"the shapes make no detector: {problems}") from None


_UNTOLD = ("vit_heads", "text_heads", "window_size", "image_size", "vit_stage_blocks")


def _from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """All that shapes alone tell; `depth` is the number of ViT blocks."""
    missing: list[str] = []

    def size(name: str, axis: int) -> int:
        if name not in shapes or len(shapes[name]) <= axis:
            missing.append(name)
            return 1
        return shapes[name][axis]

    def count(prefix: str) -> int:
        numbers = {
            int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))
        }
        if not numbers:
            missing.append(f"{prefix}.0.*")
        return max(numbers, default=0) + 1

    patch = size(f"{VIT}.patch_embed.proj.weight", 3)
    width = size(f"{VIT}.patch_embed.proj.weight", 0)
    places = size(f"{VIT}.pos_embed", 1) - 1
    hidden = size(f"{VIT}.blocks.0.mlp.fc1.weight", 0)
    found = dict(
        patch_size=patch,
        pretrain_image_size=math.isqrt(max(places, 0)) * patch,
        vit_dim=width,
        vit_mlp_ratio=_ratio(hidden, width),
        depth=count(f"{VIT}.blocks"),
        text_dim=size(f"{TEXT}.encoder.token_embedding.weight", 1),
        vocab_size=size(f"{TEXT}.encoder.token_embedding.weight", 0),
        text_length=size(f"{TEXT}.encoder.positional_embedding", 0),
        text_layers=count(f"{TEXT}.encoder.transformer.resblocks"),
        dim=size(f"{TEXT}.resizer.weight", 0),
        ffn=size(f"{FUSION}.layers.0.linear1.weight", 0),
        heads=size(f"{DECODER}.boxRPB_embed_x.layers.1.weight", 0),
        fusion_layers=count(f"{FUSION}.layers"),
        decoder_layers=count(f"{DECODER}.layers"),
        geometry_layers=count(f"{GEOMETRY}.encode"),
        queries=size(f"{DECODER}.query_embed.weight", 0),
    )
    if missing:
        raise ConversionError(
            f"{len(missing)} tensors that tell the size of the detector are missing: {', '.join(dict.fromkeys(missing))}; "
            "is the checkpoint complete?"
        )
    return found


def _ratio(hidden: int, width: int) -> float:
    """The ratio of which `int(width * ratio)` is hidden."""
    usual = next((r for r in (4.625, 4.0) if int(width * r) == hidden), None)
    ratio = usual or hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _from_rope(
    shapes: Mapping[str, tuple[int, ...]], carried: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Heads, window, picture size and stages from the stored tables [positions, head width / 2]."""
    tables = {
        int(m[1]): tensor.shape
        for name, tensor in carried.items()
        if (m := re.match(rf"{re.escape(VIT)}\.blocks\.(\d+)\.attn\.freqs_cis$", name))
    }
    if not tables or any(len(shape) != 2 for shape in tables.values()):
        return {}
    patches = shapes[f"{VIT}.patch_embed.proj.weight"]
    rows = {shape[0] for shape in tables.values()}
    found = dict(
        vit_heads=patches[0] // (2 * next(iter(tables.values()))[1]),
        window_size=math.isqrt(min(rows)),
        image_size=math.isqrt(max(rows)) * patches[3],
    )
    wide = sorted(block for block, shape in tables.items() if shape[0] == max(rows))
    if len(rows) > 1:
        step = wide[0] + 1
        if wide != list(range(step - 1, len(tables), step)) or len(tables) % step:
            raise ConversionError(
                f"global attention in ViT blocks {wide} of {len(tables)}; only the last block of equal stages can be global"
            )
        found["vit_stage_blocks"] = step
    return found


def _from_written(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a transformers config.json says that shapes do not."""
    config = config.get("detector_config") or config
    vision = config.get("vision_config") or {}
    trunk = vision.get("backbone_config") or {}
    text = config.get("text_config") or {}
    if not trunk and not text:
        return {}
    indexes = trunk.get("global_attn_indexes") or [7, 15, 23, 31]
    size = trunk.get("image_size", 1008)
    return dict(
        vit_heads=trunk.get("num_attention_heads", 16),
        text_heads=text.get("num_attention_heads", 16),
        window_size=trunk.get("window_size", 24),
        image_size=size[0] if isinstance(size, (list, tuple)) else size,
        vit_stage_blocks=indexes[0] + 1,
        vit_norm_eps=trunk.get("layer_norm_eps", 1e-6),
    )


def _is_preset(found: Mapping[str, Any]) -> str | None:
    """The preset with these widths and depths, if any; what it says of pictures and heads is then true."""
    for preset in PRESETS:
        config = ModelConfig(preset=preset)
        known = {**config.model_dump(), "depth": config.vit_stages * config.vit_stage_blocks}
        ignored = {*HUGGINGFACE_SWITCHES, *_UNTOLD, "vit_stages"}
        if all(known[key] == value for key, value in found.items() if key not in ignored):
            return preset
    return None


def _guess(found: Mapping[str, Any]) -> dict[str, Any]:
    """Heads, window, picture size and stages: of the preset that fits, else in published proportions."""
    if preset := _is_preset(found):
        config = ModelConfig(preset=preset)
        return {key: getattr(config, key) for key in _UNTOLD}
    published = ModelConfig()

    def heads(width: int) -> int:
        if width % HEAD_WIDTH == 0 and width > HEAD_WIDTH:
            return width // HEAD_WIDTH
        return next(
            n
            for n in range(found["heads"], 0, -1)
            if n == 1 or (width % (4 * n) == 0 and width >= 8 * n)
        )

    edge = found["pretrain_image_size"] // found["patch_size"]
    window = found.get("window_size", edge)
    blocks = found.get("vit_stage_blocks") or next(
        n
        for n in (published.vit_stage_blocks, *range(2, found["depth"] + 1), 1)
        if found["depth"] % n == 0
    )
    return dict(
        vit_heads=heads(found["vit_dim"]),
        text_heads=heads(found["text_dim"]),
        window_size=window,
        image_size=found.get("image_size", 3 * window * found["patch_size"]),
        vit_stage_blocks=blocks,
    )


def rope_tables(config: ModelConfig) -> dict[str, Tensor]:
    """The RoPE tables that the official layout stores beside the weights, complex64.

    One per block, [positions, head width / 2]; cos + i sin of x first, then of y (sam3.model.vitdet).
    """
    width = config.vit_dim // config.vit_heads
    rates = (
        1.0 / 10000.0 ** (np.arange(0, width, 4, dtype=np.float32)[: width // 4] / width)
    ).astype(np.float32)

    def table(edge: int) -> np.ndarray:
        at = np.arange(edge * edge)
        scale = np.float32(config.window_size / edge)
        angles = [np.outer(t.astype(np.float32) * scale, rates) for t in (at % edge, at // edge)]
        return np.exp(1j * np.concatenate(angles, -1)).astype(np.complex64)

    windowed, whole = Tensor.of(table(config.window_size)), Tensor.of(table(config.grid))
    last = config.vit_stage_blocks - 1
    return {
        f"{VIT}.blocks.{block}.attn.freqs_cis": whole
        if block % config.vit_stage_blocks == last
        else windowed
        for block in range(config.vit_stages * config.vit_stage_blocks)
    }


def missing_dead(config: ModelConfig, carried: Mapping[str, Tensor]) -> list[str]:
    """Dead tensors that a checkpoint does not hold; the official layout gets zeros for them."""
    return [name for name in carried_shapes(config) if name not in carried]
