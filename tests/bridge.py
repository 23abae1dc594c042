"""Between the torch oracle and the Flax detector: sizes, batches and outputs in each other's terms."""

from __future__ import annotations

import functools

import jax
import numpy as np

from convert import to_flax
from sam3jax.config import ModelConfig
from sam3jax.model import Sam3, draw_masks
from sam3jax.types import Outputs, Prompts, Targets
from tests import torch_reference as reference


def model_config(size: reference.Size, **changes) -> ModelConfig:
    """The ModelConfig of a torch detector of this size."""
    stages = len(size.vit_global)
    return ModelConfig(
        image_size=size.image, patch_size=size.patch, pretrain_image_size=size.pretrain_image,
        window_size=size.window, vit_dim=size.vit_dim, vit_stages=stages,
        vit_stage_blocks=size.vit_depth // stages, vit_heads=size.vit_heads, vit_mlp_ratio=size.mlp_ratio,
        text_dim=size.text_dim, text_layers=size.text_layers, text_heads=size.text_heads,
        vocab_size=size.vocabulary, text_length=size.text_length, dim=size.dim, ffn=size.ffn,
        heads=size.heads, fusion_layers=size.fusion_layers, decoder_layers=size.decoder_layers,
        geometry_layers=size.geometry_layers, queries=size.queries,
        **{"dropout": 0.0, "drop_path": 0.0, **changes},
    )  # fmt: skip


def tensors(model) -> dict[str, np.ndarray]:
    """A torch detector's parameters by name."""
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def params(model, size: reference.Size):
    return to_flax(tensors(model), model_config(size))


def inputs(model, e: dict) -> tuple[np.ndarray, np.ndarray, Prompts]:
    """(images [I, Y, X, 3], tokens [B, N], Prompts) of an oracle batch.

    A phrase is there once; the rows behind the last one are never asked, so that shapes tell nothing
    of what was drawn: each size is compiled once.
    """
    images = e["images"].transpose(0, 2, 3, 1)
    vocabulary = sorted(set(e["texts"]))
    i = len(images)

    def pairs(x):
        x = np.asarray(x)
        return x.reshape(i, len(x) // i, *x.shape[1:])

    prompts = Prompts(
        text_id=pairs([vocabulary.index(t) for t in e["texts"]]).astype(np.int32),
        valid=np.ones((i, len(e["texts"]) // i), bool),
        boxes=pairs(e["prompt_boxes"]),
        box_labels=pairs(e["prompt_labels"]).astype(np.int32),
        box_valid=pairs(e["prompt_valid"]),
    )
    tokens = reference.tokens(model, vocabulary).astype(np.int32)
    unasked = np.repeat(tokens[:1], len(e["texts"]) - len(tokens), axis=0)
    return images, np.concatenate([tokens, unasked]), prompts


def targets(e: dict) -> Targets:
    """The batch's targets in our form: every pair's targets are instances of its image."""
    i = len(e["images"])
    b, t = e["boxes"].shape[:2]
    p = b // i
    real = np.arange(t) < e["num_targets"][:, None]
    index = np.arange(p * t, dtype=np.int32).reshape(1, p, t).repeat(i, 0)
    return Targets(
        boxes=e["boxes"].reshape(i, p * t, 4),
        masks=np.packbits(e["masks"].reshape(i, p * t, *e["masks"].shape[2:]), -1),
        mask_valid=np.ones((i, p * t), bool),
        index=np.where(real.reshape(i, p, t), index, p * t),
        num_targets=e["num_targets"].reshape(i, p).astype(np.int32),
        is_exhaustive=np.ones((i, p), bool),
    )


@functools.cache
def detector(config: ModelConfig, train: bool):
    """A jitted forward pass: (params, images, tokens, prompts) -> (Outputs, intermediates)."""

    @jax.jit
    def run(params, images, tokens, prompts):
        out, state = Sam3(config, train).apply(
            {"params": params}, images, tokens, prompts,
            capture_intermediates=True, mutable=["intermediates"],
        )  # fmt: skip
        return out, state["intermediates"]

    return run


def published(out: Outputs, train: bool) -> dict[str, np.ndarray]:
    """Our outputs under the names and shapes of `torch_reference.stacked`."""

    def layers(x):
        return x if train else x[-1]

    arrays = {
        "pred_logits": layers(out.o2o.logits)[..., None],
        "pred_boxes": layers(out.o2o.boxes),
        "presence_logit_dec": layers(out.presence_logits)[..., None],
        "pred_masks": draw_masks(out.o2o.mask_embed, out.pixel_embed),
        "semantic_seg": out.semantic_logits[:, None],
    }
    if train:
        arrays["pred_logits_o2m"] = out.o2m.logits[..., None]
        arrays["pred_boxes_o2m"] = out.o2m.boxes
        arrays["pred_masks_o2m"] = draw_masks(out.o2m.mask_embed, out.pixel_embed)
    return {name: np.asarray(x) for name, x in arrays.items()}
