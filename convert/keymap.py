"""THE table: every tensor of the published detector and the place of it in the Flax tree.

Names on the left are per layer, as in the checkpoint behind `detector.`; `{block}` numbers the ViT's
blocks and `{layer}` the layers of a stack. Paths on the right are where the array lies; blocks and
layers of a stack share one array and take a slot of it. The kind says how tensors are named and
turned (torch [out, in] -> kernel [in, out], and so on). LoRA targets, trainable parameters and
layer decay are matched against the same per-layer names. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sam3jax.config import ModelConfig

VIT, TEXT = "backbone.vision_backbone.trunk", "backbone.language_backbone"
NECK, HEAD = "backbone.vision_backbone.convs", "segmentation_head"
GEOMETRY, FUSION, DECODER = "geometry_encoder", "transformer.encoder", "transformer.decoder"

# name in torch, path in Flax, kind
TABLE: tuple[tuple[str, str, str], ...] = (
    (f"{VIT}.pos_embed", "vit/pos_embed", "same"),
    (f"{VIT}.patch_embed.proj", "vit/patch_embed", "patch"),
    (f"{VIT}.ln_pre", "vit/ln_pre", "norm"),
    (f"{VIT}.blocks.{{block}}.norm1", "vit/stages/{block}/norm1", "norm"),
    (f"{VIT}.blocks.{{block}}.attn.qkv", "vit/stages/{block}/attn/qkv", "linear"),
    (f"{VIT}.blocks.{{block}}.attn.proj", "vit/stages/{block}/attn/proj", "linear"),
    (f"{VIT}.blocks.{{block}}.norm2", "vit/stages/{block}/norm2", "norm"),
    (f"{VIT}.blocks.{{block}}.mlp.fc1", "vit/stages/{block}/mlp/fc1", "linear"),
    (f"{VIT}.blocks.{{block}}.mlp.fc2", "vit/stages/{block}/mlp/fc2", "linear"),
    (f"{NECK}.0.dconv_2x2_0", "neck/convs_0_dconv_2x2_0", "upsample"),
    (f"{NECK}.0.dconv_2x2_1", "neck/convs_0_dconv_2x2_1", "upsample"),
    (f"{NECK}.0.conv_1x1", "neck/convs_0_conv_1x1", "conv"),
    (f"{NECK}.0.conv_3x3", "neck/convs_0_conv_3x3", "conv"),
    (f"{NECK}.1.dconv_2x2", "neck/convs_1_dconv_2x2", "upsample"),
    (f"{NECK}.1.conv_1x1", "neck/convs_1_conv_1x1", "conv"),
    (f"{NECK}.1.conv_3x3", "neck/convs_1_conv_3x3", "conv"),
    (f"{NECK}.2.conv_1x1", "neck/convs_2_conv_1x1", "conv"),
    (f"{NECK}.2.conv_3x3", "neck/convs_2_conv_3x3", "conv"),
    (f"{TEXT}.encoder.token_embedding.weight", "text_encoder/token_embedding", "same"),
    (f"{TEXT}.encoder.positional_embedding", "text_encoder/positional_embedding", "same"),
    (f"{TEXT}.encoder.transformer.resblocks.{{layer}}.ln_1", "text_encoder/resblocks/ln_1", "norm"),
    (f"{TEXT}.encoder.transformer.resblocks.{{layer}}.attn", "text_encoder/resblocks/attn", "attention"),
    (f"{TEXT}.encoder.transformer.resblocks.{{layer}}.ln_2", "text_encoder/resblocks/ln_2", "norm"),
    (f"{TEXT}.encoder.transformer.resblocks.{{layer}}.mlp.c_fc", "text_encoder/resblocks/c_fc", "linear"),
    (f"{TEXT}.encoder.transformer.resblocks.{{layer}}.mlp.c_proj", "text_encoder/resblocks/c_proj", "linear"),
    (f"{TEXT}.encoder.ln_final", "text_encoder/ln_final", "norm"),
    (f"{TEXT}.resizer", "text_encoder/resizer", "linear"),
    (f"{GEOMETRY}.label_embed.weight", "geometry_encoder/label_embed", "same"),
    (f"{GEOMETRY}.cls_embed.weight", "geometry_encoder/cls_embed", "same"),
    (f"{GEOMETRY}.boxes_direct_project", "geometry_encoder/boxes_direct_project", "linear"),
    (f"{GEOMETRY}.boxes_pool_project", "geometry_encoder/boxes_pool_project", "conv"),
    (f"{GEOMETRY}.boxes_pos_enc_project", "geometry_encoder/boxes_pos_enc_project", "linear"),
    (f"{GEOMETRY}.final_proj", "geometry_encoder/final_proj", "linear"),
    (f"{GEOMETRY}.norm", "geometry_encoder/norm", "norm"),
    (f"{GEOMETRY}.img_pre_norm", "geometry_encoder/img_pre_norm", "norm"),
    (f"{GEOMETRY}.encode.{{layer}}", "geometry_encoder/encode", "encoder_layer"),
    (f"{GEOMETRY}.encode_norm", "geometry_encoder/encode_norm", "norm"),
    (f"{FUSION}.layers.{{layer}}", "fusion_encoder/layers", "encoder_layer"),
    (f"{DECODER}.layers.{{layer}}", "decoder/layers_{layer}", "decoder_layer"),
    (f"{DECODER}.norm", "decoder/norm", "norm"),
    (f"{DECODER}.bbox_embed", "decoder/bbox_embed", "mlp3"),
    (f"{DECODER}.query_embed.weight", "decoder/query_embed", "same"),
    (f"{DECODER}.reference_points.weight", "decoder/reference_points", "same"),
    (f"{DECODER}.boxRPB_embed_x", "decoder/boxRPB_embed_x", "mlp2"),
    (f"{DECODER}.boxRPB_embed_y", "decoder/boxRPB_embed_y", "mlp2"),
    (f"{DECODER}.presence_token.weight", "decoder/presence_token", "same"),
    (f"{DECODER}.presence_token_head", "decoder/presence_token_head", "mlp3"),
    (f"{DECODER}.presence_token_out_norm", "decoder/presence_token_out_norm", "norm"),
    (f"{DECODER}.ref_point_head", "decoder/ref_point_head", "mlp2"),
    (f"{HEAD}.pixel_decoder.conv_layers.0", f"{HEAD}/pixel_decoder/conv_layers_0", "conv"),
    (f"{HEAD}.pixel_decoder.conv_layers.1", f"{HEAD}/pixel_decoder/conv_layers_1", "conv"),
    (f"{HEAD}.pixel_decoder.norms.0", f"{HEAD}/pixel_decoder/norms_0", "norm"),
    (f"{HEAD}.pixel_decoder.norms.1", f"{HEAD}/pixel_decoder/norms_1", "norm"),
    (f"{HEAD}.mask_predictor.mask_embed", f"{HEAD}/mask_embed", "mlp3"),
    (f"{HEAD}.cross_attend_prompt", f"{HEAD}/cross_attend_prompt", "attention"),
    (f"{HEAD}.cross_attn_norm", f"{HEAD}/cross_attn_norm", "norm"),
    (f"{HEAD}.semantic_seg_head", f"{HEAD}/semantic_seg_head", "conv"),
    (f"{HEAD}.instance_seg_head", f"{HEAD}/instance_seg_head", "conv"),
    ("dot_prod_scoring.prompt_mlp", "scoring/prompt_mlp", "mlp2"),
    ("dot_prod_scoring.prompt_mlp.out_norm", "scoring/prompt_mlp/out_norm", "norm"),
    ("dot_prod_scoring.prompt_proj", "scoring/prompt_proj", "linear"),
    ("dot_prod_scoring.hs_proj", "scoring/hs_proj", "linear"),
)  # fmt: skip

# Composite kinds: (suffix in torch, suffix in Flax, kind).
COMPOSITE: dict[str, tuple[tuple[str, str, str], ...]] = {
    "mlp2": tuple((f".layers.{i}", f"/layers_{i}", "linear") for i in range(2)),
    "mlp3": tuple((f".layers.{i}", f"/layers_{i}", "linear") for i in range(3)),
    "encoder_layer": (
        *((f".{n}", f"/{n}", "attention") for n in ("self_attn", "cross_attn_image")),
        *((f".{n}", f"/{n}", "linear") for n in ("linear1", "linear2")),
        *((f".{n}", f"/{n}", "norm") for n in ("norm1", "norm2", "norm3")),
    ),
    "decoder_layer": (
        *((f".{n}", f"/{n}", "attention") for n in ("self_attn", "ca_text", "cross_attn")),
        *((f".{n}", f"/{n}", "linear") for n in ("linear1", "linear2")),
        *((f".{n}", f"/{n}", "norm") for n in ("norm1", "norm2", "norm3", "catext_norm")),
    ),
}  # fmt: skip

# Transforms: torch array -> Flax array, and back.
TRANSFORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "same": (lambda x: x, lambda x: x),
    "transpose": (lambda x: x.T, lambda x: x.T),
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
    "upsample": (lambda x: x.transpose(0, 2, 3, 1), lambda x: x.transpose(0, 3, 1, 2)),
    "patch": (
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: _square_patch(x).transpose(3, 2, 0, 1),
    ),
}

# Leaves of the simple kinds: (suffix in torch, suffix in Flax, transform, third of in_proj or None).
LEAVES: dict[str, tuple[tuple[str, str, str, int | None], ...]] = {
    "same": (("", "", "same", None),),
    "linear": ((".weight", "/kernel", "transpose", None), (".bias", "/bias", "same", None)),
    "norm": ((".weight", "/scale", "same", None), (".bias", "/bias", "same", None)),
    "conv": ((".weight", "/kernel", "conv", None), (".bias", "/bias", "same", None)),
    "upsample": ((".weight", "/kernel", "upsample", None), (".bias", "/bias", "same", None)),
    "patch": ((".weight", "/kernel", "patch", None),),
    "attention": (
        *((".in_proj_weight", f"/{p}_proj/kernel", "transpose", i) for i, p in enumerate("qkv")),
        *((".in_proj_bias", f"/{p}_proj/bias", "same", i) for i, p in enumerate("qkv")),
        (".out_proj.weight", "/out_proj/kernel", "transpose", None),
        (".out_proj.bias", "/out_proj/bias", "same", None),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """One torch tensor, or a third of one, and its place in the tree.

    torch: the tensor's name. third: which third of its rows (q, k, v), or None for the whole.
    path: the leaf in the tree. slot: index into the leaf's stack axes, () where it has none.
    layer: the per-layer name that patterns are matched against, `....self_attn.q_proj` for a third.
    """

    torch: str
    third: int | None
    path: tuple[str, ...]
    slot: tuple[int, ...]
    transform: str

    @property
    def layer(self) -> str:
        owner = self.torch.rpartition(".")[0]
        return owner if self.third is None else f"{owner}.{'qkv'[self.third]}_proj"

    @property
    def name(self) -> str:
        """Per-layer name of the parameter: the layer's, and `weight` or `bias`."""
        if self.third is None:
            return self.torch
        return f"{self.layer}.{'bias' if self.torch.endswith('bias') else 'weight'}"

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The Flax array of this entry from the torch tensor."""
        if self.third is not None:
            rows = tensor.shape[0] // 3
            tensor = tensor[self.third * rows : (self.third + 1) * rows]
        return TRANSFORMS[self.transform][0](tensor)

    def write(self, array: np.ndarray) -> np.ndarray:
        """The torch tensor (or third of one) from the Flax array of this entry."""
        return TRANSFORMS[self.transform][1](array)


def entries(config: ModelConfig) -> list[Entry]:
    """Every live tensor of a detector of this size, in checkpoint order of the table."""
    return [entry for row in TABLE for entry in _expand(*row, config)]


def carried_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Detector tensors that reach no output here, by torch name: carried through, never trained."""
    d = config.dim
    shapes = {
        f"{TEXT}.encoder.text_projection": (config.text_dim, 2 * d),
        f"{NECK}.3.conv_1x1.weight": (d, config.vit_dim, 1, 1),
        f"{NECK}.3.conv_1x1.bias": (d,),
        f"{NECK}.3.conv_3x3.weight": (d, d, 3, 3),
        f"{NECK}.3.conv_3x3.bias": (d,),
        f"{HEAD}.pixel_decoder.conv_layers.2.weight": (d, d, 3, 3),
        f"{HEAD}.pixel_decoder.conv_layers.2.bias": (d,),
        f"{HEAD}.pixel_decoder.norms.2.weight": (d,),
        f"{HEAD}.pixel_decoder.norms.2.bias": (d,),
    }
    for name, width in (("direct", 2), ("pool", d), ("pos_enc", d)):
        shapes[f"{GEOMETRY}.points_{name}_project.weight"] = (d, width)
        shapes[f"{GEOMETRY}.points_{name}_project.bias"] = (d,)
    return shapes


def _expand(torch: str, flax: str, kind: str, config: ModelConfig) -> Iterator[Entry]:
    if kind in COMPOSITE:
        for torch_end, flax_end, part in COMPOSITE[kind]:
            yield from _expand(torch + torch_end, flax + flax_end, part, config)
        return
    for torch_name, flax_path, slot in _slots(torch, flax, config):
        for torch_end, flax_end, transform, third in LEAVES[kind]:
            path = tuple((flax_path + flax_end).split("/"))
            yield Entry(torch_name + torch_end, third, path, slot, transform)


def _slots(torch: str, flax: str, c: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every layer that a row stands for: its torch name, its path, its slot in the stack."""
    if "{block}" in torch:
        for block in range(c.vit_stages * c.vit_stage_blocks):
            stage, within = divmod(block, c.vit_stage_blocks)
            last = within == c.vit_stage_blocks - 1
            slot = (stage,) if last else (stage, within)
            place = flax.replace("{block}", "last" if last else "windows")
            yield torch.replace("{block}", str(block)), place, slot
    elif "{layer}" in torch:
        stacks = {
            TEXT: c.text_layers,
            GEOMETRY: c.geometry_layers,
            FUSION: c.fusion_layers,
            DECODER: c.decoder_layers,
        }
        for layer in range(next(n for prefix, n in stacks.items() if torch.startswith(prefix))):
            slot = () if "{layer}" in flax else (layer,)
            number = str(layer)
            yield torch.replace("{layer}", number), flax.replace("{layer}", number), slot
    else:
        yield torch, flax, ()


def _square_patch(x: np.ndarray) -> np.ndarray:
    """[patch * patch * 3, D] -> [patch, patch, 3, D]."""
    edge = round((x.shape[0] / 3) ** 0.5)
    return x.reshape(edge, edge, 3, x.shape[1])
