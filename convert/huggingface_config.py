"""The JSON files that transformers keeps beside a checkpoint in its layout: read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sam3jax.config import ModelConfig
from sam3jax.data.tokenizer import ENDS, STARTS
from sam3jax.files import FileError
from sam3jax.weights.names import PROJECTION

PROCESSOR_LENGTH = 32  # tokens that Sam3Processor pads phrases to, whatever the tokenizer says

# (section, field, setting); `depth` is the number of ViT blocks.
_STATED = (
    ("vision_config.backbone_config", "num_hidden_layers", "depth"),
    ("vision_config.backbone_config", "hidden_size", "vit_dim"),
    ("vision_config.backbone_config", "patch_size", "patch_size"),
    ("vision_config.backbone_config", "num_attention_heads", "vit_heads"),
    ("vision_config.backbone_config", "window_size", "window_size"),
    ("vision_config.backbone_config", "image_size", "image_size"),
    ("vision_config.backbone_config", "layer_norm_eps", "vit_norm_eps"),
    ("vision_config.backbone_config", "global_attn_indexes", "global_attn_indexes"),
    ("text_config", "num_hidden_layers", "text_layers"),
    ("text_config", "num_attention_heads", "text_heads"),
    ("text_config", "hidden_size", "text_dim"),
    ("text_config", "vocab_size", "vocab_size"),
    ("text_config", "max_position_embeddings", "text_length"),
    ("geometry_encoder_config", "num_layers", "geometry_layers"),
    ("detr_encoder_config", "num_layers", "fusion_layers"),
    ("detr_decoder_config", "num_layers", "decoder_layers"),
    ("detr_decoder_config", "num_queries", "queries"),
)
# What transformers leaves out of a file is its default, which no shape tells.
_DEFAULTS = dict(vit_heads=16, text_heads=16, window_size=24, image_size=1008, vit_norm_eps=1e-6)


def read_huggingface_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a transformers config.json states, and `depth` and `global_attn_indexes`.

    {} where it is of another kind. Raises FileError that lists what is not of the kind expected.
    """
    config = config.get("detector_config") or config
    problems: list[str] = []
    found: dict[str, Any] = {}
    for place, field, key in _STATED:
        section: Any = config
        for i, part in enumerate(parts := place.split(".")):
            section = (section.get(part) or {}) if isinstance(section, Mapping) else section
            if not isinstance(section, Mapping):
                problems.append(f"{'.'.join(parts[: i + 1])} is {section!r}, expected an object")
                break
        else:
            value = section.get(field)
            if key == "image_size" and isinstance(value, list) and value:
                value = value[0]
            if value is None:
                continue
            whole = lambda n: isinstance(n, int) and not isinstance(n, bool)
            if key == "global_attn_indexes":
                good, kind = isinstance(value, list) and all(map(whole, value)), "a list of numbers"
                good = good and len(value) > 0
            elif key == "vit_norm_eps":
                good, kind = isinstance(value, float) and value > 0, "a small number"
            else:
                good, kind = (
                    isinstance(value, int) and whole(value) and value > 0,
                    "a positive whole number",
                )
            if good:
                found[key] = value
            else:
                problems.append(f"{place}.{field} is {value!r}, expected {kind}")
    if problems:
        listed = "; ".join(dict.fromkeys(problems))
        raise FileError(f"config.json beside the weights is no Sam3 configuration: {listed}")
    if not found:
        return {}
    indexes = found.setdefault("global_attn_indexes", [7, 15, 23, 31])
    return _DEFAULTS | {"vit_stage_blocks": indexes[0] + 1} | found


def huggingface_config(
    c: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    tracker: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Sam3Config of a detector; Sam3VideoConfig where `shapes`, by exported name, hold a tracker.

    tracker: the `tracker_config` that the checkpoint came with; None: the published tracker.
    The ViT's norm epsilon is the model's own. What transformers cannot be told: it runs no geometry
    encoder without boxes and clamps presence logits.
    """
    shapes = shapes or {}
    tracked = any(name.startswith("tracker_model.") for name in shapes)
    projection = next(
        (s[0] for n, s in shapes.items() if n.endswith("text_encoder.text_projection.weight")),
        PROJECTION,
    )
    detector = _detector(c, projection)
    if not tracked:
        return {"architectures": ["Sam3Model"], **detector}
    return {
        "architectures": ["Sam3VideoModel"],
        "model_type": "sam3_video",
        "detector_config": detector,
        "tracker_config": dict(tracker or {"model_type": "sam3_tracker_video"}),
    }


def _detector(c: ModelConfig, projection: int) -> dict[str, Any]:
    layer = {"hidden_size": c.dim, "num_attention_heads": c.heads, "dropout": c.dropout}
    stack = {**layer, "intermediate_size": c.ffn}
    blocks = c.vit_stage_blocks
    return {
        "model_type": "sam3",
        "vision_config": {
            "model_type": "sam3_vision_model",
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": c.vit_dim,
                "intermediate_size": int(c.vit_dim * c.vit_mlp_ratio),
                "num_hidden_layers": c.vit_stages * blocks,
                "num_attention_heads": c.vit_heads,
                "image_size": c.image_size,
                "patch_size": c.patch_size,
                "layer_norm_eps": c.vit_norm_eps,
                "window_size": c.window_size,
                "global_attn_indexes": list(range(blocks - 1, c.vit_stages * blocks, blocks)),
                "pretrain_image_size": c.pretrain_image_size,
            },
            "fpn_hidden_size": c.dim,
            "backbone_feature_sizes": [[c.grid * n, c.grid * n] for n in (4, 2, 1)],
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": c.vocab_size,
            "hidden_size": c.text_dim,
            "intermediate_size": 4 * c.text_dim,
            "projection_dim": projection,
            "num_hidden_layers": c.text_layers,
            "num_attention_heads": c.text_heads,
            "max_position_embeddings": c.text_length,
            "hidden_act": "gelu",
            "bos_token_id": c.vocab_size - 2,
            "eos_token_id": c.vocab_size - 1,
        },
        "geometry_encoder_config": {
            "model_type": "sam3_geometry_encoder",
            **stack,
            "num_layers": c.geometry_layers,
        },
        "detr_encoder_config": {
            "model_type": "sam3_detr_encoder",
            **stack,
            "num_layers": c.fusion_layers,
        },
        "detr_decoder_config": {
            "model_type": "sam3_detr_decoder",
            **stack,
            "num_layers": c.decoder_layers,
            "num_queries": c.queries,
        },
        "mask_decoder_config": {
            "model_type": "sam3_mask_decoder",
            "hidden_size": c.dim,
            "num_attention_heads": c.heads,
        },
    }


def processor_files(c: ModelConfig, tokenizer: str) -> dict[str, dict[str, Any]]:
    """What `Sam3Processor.from_pretrained` reads beside the `tokenizer.json` of this text, by file name."""
    vocabulary = json.loads(tokenizer)["model"]["vocab"]
    start, end = (next(name for name in names if name in vocabulary) for names in (STARTS, ENDS))
    square = {"height": c.image_size, "width": c.image_size}
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": c.text_length,
            "bos_token": start,
            "eos_token": end,
            "unk_token": end,
            "pad_token": end,
        },
        "processor_config.json": {
            "processor_class": "Sam3Processor",
            "image_processor": {
                "image_processor_type": "Sam3ImageProcessor",
                "size": square,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            },
        },
    }
