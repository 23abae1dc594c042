"""Sizes of the interactive heads, from the shapes of the tensors that carry them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sam3jax.weights.parts import by_official_name
from sam3jax.weights.tensor_file import Tensor
from sam3jax.weights.tracker_names import DECODER, LAYERS, PROMPT

# Field of ModelConfig -> the tensor whose first axis it is.
_TELLING = {
    "mask_decoder_ffn": f"{LAYERS}.0.mlp.lin1.weight",
    "mask_decoder_iou_hidden": f"{DECODER}.iou_prediction_head.layers.0.weight",
    "mask_prompt_channels": f"{PROMPT}.mask_downscaling.3.weight",
}


def interactive_sizes(
    carried: Mapping[str, Tensor], written: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """The fields of ModelConfig that the carried heads tell; {} without heads.

    written: the `config.json` of a transformers folder, the one place that states attention heads.
    """
    tensors = by_official_name(carried)
    shapes = {field: tensors[name].shape for field, name in _TELLING.items() if name in tensors}
    found = {field: shape[0] for field, shape in shapes.items() if shape and shape[0]}
    # Heads of no usable size are carried all the same: a task that asks for them says what is wrong.
    if found.get("mask_prompt_channels", 4) % 4:
        del found["mask_prompt_channels"]
    tracker = (written or {}).get("tracker_config") or {}
    heads = (tracker.get("mask_decoder_config") or {}).get("num_attention_heads")
    if found and isinstance(heads, int) and heads > 0:
        found["mask_decoder_heads"] = heads
    return found
