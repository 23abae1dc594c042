"""The ModelConfig of a checkpoint, from the shapes of its tensors.

Shapes tell nearly all of it. The head counts of the two towers, the window and the picture size show
in the RoPE tables that the official layout stores, or in the `config.json` of the transformers
layout; where neither is there, a known size (a preset) that fits all shapes decides, then the
published proportions, and every guess is reported.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from convert.huggingface_config import read_huggingface_config
from convert.interactive_sizes import interactive_sizes
from convert.names import huggingface_shapes
from convert.weights import ConversionError
from sam3jax.config import DESTINATIONS, PRESETS, ModelConfig, explain, parse_config
from sam3jax.weights.names import DECODER, FUSION, GEOMETRY, TEXT, VIT, carried_shapes
from sam3jax.weights.tensor_file import Tensor

# What an export to transformers computes differently; its own checkpoints are read with these.
HUGGINGFACE_SWITCHES = {"vit_norm_eps": 1e-6, **DESTINATIONS["transformers"]}
HEAD_WIDTH = 64  # of both published towers


def infer_config(
    live: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    *,
    layout: str = "official",
    stored: Mapping[str, Tensor] | None = None,
    written: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[ModelConfig, list[str]]:
    """The configuration of a detector and what had to be guessed, in words.

    live and carried: its tensors by official name. stored: as the transformers layout holds them, for
    their names. written: the `config.json` of a transformers folder. overrides: settings that the user
    gave, which win.
    Raises ConversionError where no tensor tells a size, the sizes make no detector, `written` says
    otherwise, or layers of a detector of published widths are missing.
    """
    overrides = dict(overrides or {})
    found = _from_shapes({name: tensor.shape for name, tensor in live.items()}, stored)
    stated = read_huggingface_config(written or {}) if layout == "huggingface" else {}
    _check_stated(found, stated, overrides, layout)
    rope, notes = _from_rope(found, carried)
    found |= rope
    if layout == "huggingface":
        found |= HUGGINGFACE_SWITCHES
        found |= {key: stated[key] for key in (*_UNTOLD, "vit_norm_eps") if key in stated}
    found |= overrides
    _check_numbers(found)
    if unknown := [key for key in _UNTOLD if key not in found]:
        guess = _guess(found)
        for key in unknown:
            found[key] = guess[key]
        if not _is_preset(found):
            told = ", ".join(f"{key}={found[key]}" for key in unknown)
            notes.append(
                f"the shapes do not tell {told}: taken as a guess; set with --set key=value"
            )
    depth, blocks = found["depth"], found["vit_stage_blocks"]
    ends = list(range(blocks - 1, depth, blocks))
    if "vit_stages" not in overrides and depth % blocks:
        raise ConversionError(
            f"{depth} ViT blocks do not divide into stages of {blocks}: is the file complete? "
            "Else set the right number with --set vit_stage_blocks=..."
        )
    indexes = stated.get("global_attn_indexes", ends)
    if not {"vit_stages", "vit_stage_blocks"} & overrides.keys() and list(indexes) != ends:
        raise ConversionError(_unequal_stages(list(indexes), depth))
    preset = _is_preset(found)
    found.setdefault("vit_stages", depth // blocks)
    del found["depth"]
    if preset:
        found = {"preset": preset, **found}  # for what no tensor tells, such as dropout
    found = interactive_sizes(carried, written) | found
    try:
        return ModelConfig.model_validate(found), notes
    except ValidationError as error:
        problems = "; ".join(explain(error, ModelConfig))
        raise ConversionError(f"the shapes make no detector: {problems}") from None


_UNTOLD = ("vit_heads", "text_heads", "window_size", "image_size", "vit_stage_blocks")

# Tensors that tell sizes; what a word stands for is the same everywhere, and most tensors decide.
_TELLING: dict[str, tuple[str | int, ...]] = {
    f"{VIT}.patch_embed.proj.weight": ("vit_dim", 3, "patch_size", "patch_size"),
    f"{VIT}.pos_embed": (1, "positions", "vit_dim"),
    f"{VIT}.ln_pre.weight": ("vit_dim",),
    f"{VIT}.blocks.0.mlp.fc1.weight": ("vit_hidden", "vit_dim"),
    f"{VIT}.blocks.0.mlp.fc1.bias": ("vit_hidden",),
    f"{VIT}.blocks.0.mlp.fc2.weight": ("vit_dim", "vit_hidden"),
    f"{TEXT}.encoder.token_embedding.weight": ("vocab_size", "text_dim"),
    f"{TEXT}.encoder.positional_embedding": ("text_length", "text_dim"),
    f"{TEXT}.resizer.weight": ("dim", "text_dim"),
    f"{FUSION}.layers.0.linear1.weight": ("ffn", "dim"),
    f"{FUSION}.layers.0.linear1.bias": ("ffn",),
    f"{FUSION}.layers.0.linear2.weight": ("dim", "ffn"),
    f"{DECODER}.boxRPB_embed_x.layers.1.weight": ("heads", "dim"),
    f"{DECODER}.boxRPB_embed_x.layers.1.bias": ("heads",),
    f"{DECODER}.boxRPB_embed_y.layers.1.weight": ("heads", "dim"),
    f"{DECODER}.query_embed.weight": ("queries", "dim"),
    f"{DECODER}.reference_points.weight": ("queries", 4),
}
_STACKS: dict[str, str] = {
    "depth": f"{VIT}.blocks",
    "text_layers": f"{TEXT}.encoder.transformer.resblocks",
    "fusion_layers": f"{FUSION}.layers",
    "decoder_layers": f"{DECODER}.layers",
    "geometry_layers": f"{GEOMETRY}.encode",
}


def _from_shapes(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """All that shapes alone tell; `depth` is the number of ViT blocks."""
    votes: dict[str, Counter[int]] = {
        w: Counter() for row in _TELLING.values() for w in _words(row)
    }
    for name, sizes in _TELLING.items():
        if _fits(shapes.get(name, ()), sizes):
            for word, length in zip(sizes, shapes[name], strict=True):
                if isinstance(word, str):
                    votes[word][length] += 1
    counts = {key: _count_layers(shapes, prefix) for key, prefix in _STACKS.items()}
    untold = {word for word, lengths in votes.items() if not lengths}
    problems: dict[str, list[str]] = {"missing": [], "misshapen": []}
    for name, sizes in _TELLING.items():
        if not untold & set(sizes):
            continue
        shown, shape = _as_stored(name, shapes.get(name), stored)
        if shape is None:
            problems["missing"].append(shown)
        elif not _fits(shapes[name], sizes):
            want = ", ".join(map(str, sizes))
            problems["misshapen"].append(f"{shown} is {list(shape)}, expected [{want}]")
    layout = "official" if stored is None else "huggingface"
    problems["missing"] += [f"{_stack(key, layout)}.0.*" for key, n in counts.items() if not n]
    if any(problems.values()):
        number = sum(map(len, problems.values()))
        listed = "; ".join(
            f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names
        )
        raise ConversionError(
            f"{number} tensors that tell the size of the detector are missing or misshapen. {listed}. "
            "Is the checkpoint complete?"
        )
    found = {word: lengths.most_common(1)[0][0] for word, lengths in votes.items()}
    edge = math.isqrt(found.pop("positions") - 1)
    hidden = found.pop("vit_hidden")
    return dict(
        **found,
        **counts,
        pretrain_image_size=edge * found["patch_size"],
        vit_mlp_ratio=_ratio(hidden, found["vit_dim"]),
    )


def _words(sizes: tuple[str | int, ...]) -> list[str]:
    return [word for word in sizes if isinstance(word, str)]


def _fits(shape: tuple[int, ...], sizes: tuple[str | int, ...]) -> bool:
    """Whether a shape can be of these sizes; positions are a square of patches and one more."""
    if len(shape) != len(sizes) or not all(shape):
        return False
    for word, length in zip(sizes, shape, strict=True):
        if isinstance(word, int) and length != word:
            return False
        if word == "positions" and (length < 2 or math.isqrt(length - 1) ** 2 != length - 1):
            return False
    return True


def _as_stored(
    name: str, shape: tuple[int, ...] | None, stored: Mapping[str, Tensor] | None
) -> tuple[str, tuple[int, ...] | None]:
    """The name and shape of a tensor as its layout holds it."""
    if stored is None:
        return name, shape
    shown = next(iter(huggingface_shapes(name, (1,) * len(_TELLING[name]))))
    return shown, stored[shown].shape if shown in stored else None


def _count_layers(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return max((int(m[1]) + 1 for name in shapes if (m := pattern.match(name))), default=0)


def _check_stated(
    found: Mapping[str, Any],
    stated: Mapping[str, Any],
    overrides: Mapping[str, Any],
    layout: str,
) -> None:
    """Raise where the weights hold other layers or sizes than config.json, or the published widths, say.

    Nothing else tells that a file lacks its last layers.
    """
    published = ModelConfig()
    expected = {}
    if all(found[key] == getattr(published, key) for key in ("vit_dim", "dim", "text_dim")):
        depth = published.vit_stages * published.vit_stage_blocks
        counts = {key: getattr(published, key, depth) for key in _STACKS}
        expected = {
            key: (n, "the published SAM 3 of these widths has") for key, n in counts.items()
        }
    expected |= {key: (n, "config.json says") for key, n in stated.items() if key in found}
    problems = []
    for key, (number, source) in expected.items():
        given = "vit_stages" if key == "depth" else key
        if number == found[key] or given in overrides:
            continue
        what = f"{given}: {source} {number}, the weights have {found[key]}"
        if key == "depth":
            what = f"ViT blocks: {source} {number}, the weights have {found[key]}"
        if key in _STACKS and found[key] < number:
            prefix = _stack(key, layout)
            what += f" (missing: {', '.join(f'{prefix}.{i}.*' for i in range(found[key], number))})"
        problems.append(what)
    if problems:
        raise ConversionError(
            f"{'; '.join(problems)}. Is the file complete, and the config.json beside it its own? "
            "If the model is meant to be so, state it with --set key=value (vit_stages for ViT blocks)"
        )


def _stack(key: str, layout: str) -> str:
    """What stands before the number of a layer, in its layout."""
    if layout == "official":
        return _STACKS[key]
    name = f"{_STACKS[key]}.0.{'ln_1' if key == 'text_layers' else 'norm1'}.weight"
    return next(iter(huggingface_shapes(name, (1,)))).partition(".0.")[0]


def _check_numbers(found: Mapping[str, Any]) -> None:
    """Raise where config.json or the user gave a count or width that is none."""
    fields = ModelConfig.model_fields
    wrong = [
        f"{key}={value!r}"
        for key, value in found.items()
        if key in fields
        and fields[key].annotation is int
        and (not isinstance(value, int) or isinstance(value, bool) or value < 1)
    ]
    ratio = found["vit_mlp_ratio"]
    if not isinstance(ratio, (int, float)) or not 0 < ratio < 1000:
        wrong.append(f"vit_mlp_ratio={ratio!r}")
    if wrong:
        raise ConversionError(
            f"{', '.join(wrong)}: expected positive numbers, whole ones for all but vit_mlp_ratio; correct config.json or --set"
        )


def _ratio(hidden: int, width: int) -> float:
    """The ratio of which `int(width * ratio)` is hidden."""
    usual = next((r for r in (4.625, 4.0) if int(width * r) == hidden), None)
    ratio = usual or hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _from_rope(
    found: Mapping[str, Any], carried: Mapping[str, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    """Heads, window, picture size and stages from the stored tables [positions, head width / 2]; remarks.

    The two commonest shapes count. Others, and absent tables, are computed anew in an export.
    """
    depth = found["depth"]
    shapes = {
        int(m[1]): tensor.shape
        for name, tensor in carried.items()
        if (m := re.match(rf"{re.escape(VIT)}\.blocks\.(\d+)\.attn\.freqs_cis(?:_real)?$", name))
    }
    if not shapes:
        return {}, []
    fitting = {
        block: shape
        for block, shape in shapes.items()
        if block < depth
        and len(shape) == 2
        and all(shape)
        and math.isqrt(shape[0]) ** 2 == shape[0]
        and found["vit_dim"] % (2 * shape[1]) == 0
    }
    common = [shape for shape, _ in Counter(fitting.values()).most_common(2)]
    common = [shape for shape in common if shape[1] == common[0][1]]
    tables = {block: shape for block, shape in fitting.items() if shape in common}
    notes = []
    if odd := sorted({*shapes, *range(depth)} - set(tables)):
        notes.append(
            f"RoPE tables (freqs_cis) of ViT blocks {', '.join(map(str, odd))} are absent, misshapen or without a block: "
            "not used, an export computes them anew"
        )
    if not tables:
        return {}, notes
    rows = {shape[0] for shape in common}
    out = dict(
        vit_heads=found["vit_dim"] // (2 * common[0][1]),
        window_size=math.isqrt(min(rows)),
        image_size=math.isqrt(max(rows)) * found["patch_size"],
    )
    if len(rows) > 1:
        steps = [
            step
            for step in range(1, depth + 1)
            if depth % step == 0
            and all((b % step == step - 1) == (s[0] == max(rows)) for b, s in tables.items())
        ]
        if not steps:
            wide = sorted(block for block, shape in tables.items() if shape[0] == max(rows))
            raise ConversionError(_unequal_stages(wide, depth))
        out["vit_stage_blocks"] = steps[0]
    return out, notes


def _unequal_stages(wide: list[Any], depth: int) -> str:
    return (
        f"global attention in ViT blocks {wide} of {depth} (0 to {depth - 1}): only the last block of equal stages "
        "can be global. Are the last blocks missing from the file?"
    )


def _is_preset(found: Mapping[str, Any]) -> str | None:
    """The preset with these widths and depths, if any; what it says of pictures and heads is then true."""
    for preset in PRESETS:
        config = parse_config({"preset": preset}, ModelConfig)
        known = {**config.model_dump(), "depth": config.vit_stages * config.vit_stage_blocks}
        ignored = {*HUGGINGFACE_SWITCHES, *_UNTOLD, "vit_stages"}
        if all(known[key] == value for key, value in found.items() if key not in ignored):
            return preset
    return None


def _guess(found: Mapping[str, Any]) -> dict[str, Any]:
    """Heads, window, picture size and stages: of the preset that fits, else in published proportions."""
    if preset := _is_preset(found):
        config = parse_config({"preset": preset}, ModelConfig)
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
