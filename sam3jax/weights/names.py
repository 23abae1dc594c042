"""THE table: every tensor of the published model, its name in transformers and its place in Flax.

The model has parts: the detector, the second neck and the interactive heads. A caller that names the
parts it uses gets their tensors as leaves of the parameter tree; tensors of other parts are carried.

Names on the left are per layer, as in the checkpoint behind `detector.`; `{block}` numbers the ViT's
blocks and `{layer}` the layers of a stack. In the middle, the same in transformers' `Sam3Model`, which
holds q, k and v apart. Paths on the right are where the array lies in the Flax tree; blocks and layers
of a stack share one array and take a slot of it. The kind says how tensors are named and turned (torch
[out, in] -> kernel [in, out], and so on). LoRA targets, trainable parameters and layer decay are
matched against the official per-layer names. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from sam3jax.config import ModelConfig
from sam3jax.weights.tracker_names import (
    INTERACTIVE_TABLE,
    NECK,
    NECK_HUGGINGFACE,
    SECOND_NECK_DEAD,
    SECOND_NECK_TABLE,
    STACKS,
    dead_neck_rows,
    neck_rows,
)

DETECTOR_PART, SECOND_NECK_PART, INTERACTIVE_PART = "detector", "second_neck", "interactive"
DEFAULT_PARTS = (DETECTOR_PART,)

VIT, TEXT = "backbone.vision_backbone.trunk", "backbone.language_backbone"
HEAD = "segmentation_head"
GEOMETRY, FUSION, DECODER = "geometry_encoder", "transformer.encoder", "transformer.decoder"
# The same parts in transformers.
_VIT = "vision_encoder.backbone"
_TEXT, _DECODER, _HEAD, _SCORE = (
    "text_encoder.text_model",
    "detr_decoder",
    "mask_decoder",
    "dot_product_scoring",
)

PROJECTION = 512  # width of CLIP's joint space, of the text_projection that nothing uses

# name in torch, name in transformers, path in Flax, kind
TABLE: tuple[tuple[str, str, str, str], ...] = (
    (f"{VIT}.pos_embed", f"{_VIT}.embeddings.position_embeddings", "vit/pos_embed", "positions"),
    (f"{VIT}.patch_embed.proj", f"{_VIT}.embeddings.patch_embeddings.projection", "vit/patch_embed", "patch"),
    (f"{VIT}.ln_pre", f"{_VIT}.layer_norm", "vit/ln_pre", "norm"),
    (f"{VIT}.blocks.{{block}}.norm1", f"{_VIT}.layers.{{block}}.layer_norm1", "vit/stages/{block}/norm1", "norm"),
    (f"{VIT}.blocks.{{block}}.attn.qkv", f"{_VIT}.layers.{{block}}.attention", "vit/stages/{block}/attn/qkv", "qkv"),
    (f"{VIT}.blocks.{{block}}.attn.proj", f"{_VIT}.layers.{{block}}.attention.o_proj", "vit/stages/{block}/attn/proj", "linear"),
    (f"{VIT}.blocks.{{block}}.norm2", f"{_VIT}.layers.{{block}}.layer_norm2", "vit/stages/{block}/norm2", "norm"),
    (f"{VIT}.blocks.{{block}}.mlp.fc1", f"{_VIT}.layers.{{block}}.mlp.fc1", "vit/stages/{block}/mlp/fc1", "linear"),
    (f"{VIT}.blocks.{{block}}.mlp.fc2", f"{_VIT}.layers.{{block}}.mlp.fc2", "vit/stages/{block}/mlp/fc2", "linear"),
    *neck_rows(NECK, NECK_HUGGINGFACE, "neck"),
    (f"{TEXT}.encoder.token_embedding.weight", f"{_TEXT}.embeddings.token_embedding.weight", "text_encoder/token_embedding", "same"),
    (f"{TEXT}.encoder.positional_embedding", f"{_TEXT}.embeddings.position_embedding.weight", "text_encoder/positional_embedding", "same"),
    (f"{TEXT}.encoder.transformer.resblocks.{{layer}}", f"{_TEXT}.encoder.layers.{{layer}}", "text_encoder/resblocks", "text_layer"),
    (f"{TEXT}.encoder.ln_final", f"{_TEXT}.final_layer_norm", "text_encoder/ln_final", "norm"),
    (f"{TEXT}.resizer", "text_projection", "text_encoder/resizer", "linear"),
    (f"{GEOMETRY}.label_embed.weight", f"{GEOMETRY}.label_embed.weight", "geometry_encoder/label_embed", "same"),
    (f"{GEOMETRY}.cls_embed.weight", f"{GEOMETRY}.cls_embed.weight", "geometry_encoder/cls_embed", "same"),
    (f"{GEOMETRY}.boxes_direct_project", f"{GEOMETRY}.boxes_direct_project", "geometry_encoder/boxes_direct_project", "linear"),
    (f"{GEOMETRY}.boxes_pool_project", f"{GEOMETRY}.boxes_pool_project", "geometry_encoder/boxes_pool_project", "conv"),
    (f"{GEOMETRY}.boxes_pos_enc_project", f"{GEOMETRY}.boxes_pos_enc_project", "geometry_encoder/boxes_pos_enc_project", "linear"),
    (f"{GEOMETRY}.final_proj", f"{GEOMETRY}.final_proj", "geometry_encoder/final_proj", "linear"),
    (f"{GEOMETRY}.norm", f"{GEOMETRY}.prompt_layer_norm", "geometry_encoder/norm", "norm"),
    (f"{GEOMETRY}.img_pre_norm", f"{GEOMETRY}.vision_layer_norm", "geometry_encoder/img_pre_norm", "norm"),
    (f"{GEOMETRY}.encode.{{layer}}", f"{GEOMETRY}.layers.{{layer}}", "geometry_encoder/encode", "encoder_layer"),
    (f"{GEOMETRY}.encode_norm", f"{GEOMETRY}.output_layer_norm", "geometry_encoder/encode_norm", "norm"),
    (f"{FUSION}.layers.{{layer}}", "detr_encoder.layers.{layer}", "fusion_encoder/layers", "encoder_layer"),
    (f"{DECODER}.layers.{{layer}}", f"{_DECODER}.layers.{{layer}}", "decoder/layers_{layer}", "decoder_layer"),
    (f"{DECODER}.norm", f"{_DECODER}.output_layer_norm", "decoder/norm", "norm"),
    (f"{DECODER}.bbox_embed", f"{_DECODER}.box_head", "decoder/bbox_embed", "mlp3"),
    (f"{DECODER}.query_embed.weight", f"{_DECODER}.query_embed.weight", "decoder/query_embed", "same"),
    (f"{DECODER}.reference_points.weight", f"{_DECODER}.reference_points.weight", "decoder/reference_points", "same"),
    (f"{DECODER}.boxRPB_embed_x", f"{_DECODER}.box_rpb_embed_x", "decoder/boxRPB_embed_x", "mlp2"),
    (f"{DECODER}.boxRPB_embed_y", f"{_DECODER}.box_rpb_embed_y", "decoder/boxRPB_embed_y", "mlp2"),
    (f"{DECODER}.presence_token.weight", f"{_DECODER}.presence_token.weight", "decoder/presence_token", "same"),
    (f"{DECODER}.presence_token_head", f"{_DECODER}.presence_head", "decoder/presence_token_head", "mlp3"),
    (f"{DECODER}.presence_token_out_norm", f"{_DECODER}.presence_layer_norm", "decoder/presence_token_out_norm", "norm"),
    (f"{DECODER}.ref_point_head", f"{_DECODER}.ref_point_head", "decoder/ref_point_head", "mlp2"),
    (f"{HEAD}.pixel_decoder.conv_layers.0", f"{_HEAD}.pixel_decoder.conv_layers.0", f"{HEAD}/pixel_decoder/conv_layers_0", "conv"),
    (f"{HEAD}.pixel_decoder.conv_layers.1", f"{_HEAD}.pixel_decoder.conv_layers.1", f"{HEAD}/pixel_decoder/conv_layers_1", "conv"),
    (f"{HEAD}.pixel_decoder.norms.0", f"{_HEAD}.pixel_decoder.norms.0", f"{HEAD}/pixel_decoder/norms_0", "norm"),
    (f"{HEAD}.pixel_decoder.norms.1", f"{_HEAD}.pixel_decoder.norms.1", f"{HEAD}/pixel_decoder/norms_1", "norm"),
    (f"{HEAD}.mask_predictor.mask_embed", f"{_HEAD}.mask_embedder", f"{HEAD}/mask_embed", "mask_mlp"),
    (f"{HEAD}.cross_attend_prompt", f"{_HEAD}.prompt_cross_attn", f"{HEAD}/cross_attend_prompt", "attention"),
    (f"{HEAD}.cross_attn_norm", f"{_HEAD}.prompt_cross_attn_norm", f"{HEAD}/cross_attn_norm", "norm"),
    (f"{HEAD}.semantic_seg_head", f"{_HEAD}.semantic_projection", f"{HEAD}/semantic_seg_head", "conv"),
    (f"{HEAD}.instance_seg_head", f"{_HEAD}.instance_projection", f"{HEAD}/instance_seg_head", "conv"),
    ("dot_prod_scoring.prompt_mlp", f"{_SCORE}.text_mlp", "scoring/prompt_mlp", "mlp2"),
    ("dot_prod_scoring.prompt_mlp.out_norm", f"{_SCORE}.text_mlp_out_norm", "scoring/prompt_mlp/out_norm", "norm"),
    ("dot_prod_scoring.prompt_proj", f"{_SCORE}.text_proj", "scoring/prompt_proj", "linear"),
    ("dot_prod_scoring.hs_proj", f"{_SCORE}.query_proj", "scoring/hs_proj", "linear"),
)  # fmt: skip

PARTS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    DETECTOR_PART: TABLE,
    SECOND_NECK_PART: SECOND_NECK_TABLE,
    INTERACTIVE_PART: INTERACTIVE_TABLE,
}

# Tensors that reach no output: carried through, never trained. No name: transformers has none.
DEAD: tuple[tuple[str, str, str], ...] = (
    (f"{TEXT}.encoder.text_projection", "text_encoder.text_projection.weight", "projection"),
    *dead_neck_rows(NECK, NECK_HUGGINGFACE),
    (f"{HEAD}.pixel_decoder.conv_layers.2", f"{_HEAD}.pixel_decoder.conv_layers.2", "conv"),
    (f"{HEAD}.pixel_decoder.norms.2", f"{_HEAD}.pixel_decoder.norms.2", "norm"),
    (f"{GEOMETRY}.points_direct_project", "", "linear"),
    (f"{GEOMETRY}.points_pool_project", "", "linear"),
    (f"{GEOMETRY}.points_pos_enc_project", "", "linear"),
)  # fmt: skip

# Composite kinds: (suffix in torch, in transformers, in Flax, kind).
_FFN = (
    (".linear1", ".mlp.fc1", "/linear1", "linear"),
    (".linear2", ".mlp.fc2", "/linear2", "linear"),
)
COMPOSITE: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "mlp2": tuple((f".layers.{i}", f".layer{i + 1}", f"/layers_{i}", "linear") for i in range(2)),
    "mlp3": tuple((f".layers.{i}", f".layer{i + 1}", f"/layers_{i}", "linear") for i in range(3)),
    "mask_mlp": tuple((f".layers.{i}", f".layers.{i}", f"/layers_{i}", "linear") for i in range(3)),
    # transformers names the ends of these, and numbers what lies between.
    "ends_mlp": tuple(
        (f".layers.{i}", f".{name}", f"/layers_{i}", "linear")
        for i, name in enumerate(("proj_in", "layers.0", "proj_out"))
    ),
    "split_attention": tuple(
        (f".{torch}", f".{huggingface}", f"/{torch}", "linear")
        for torch, huggingface in (
            ("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj"),
        )
    ),
    "two_way_layer": (
        *(
            (f".{name}", f".{name}", f"/{name}", "split_attention")
            for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
        ),
        (".mlp.lin1", ".mlp.proj_in", "/lin1", "linear"),
        (".mlp.lin2", ".mlp.proj_out", "/lin2", "linear"),
        *((f".norm{i}", f".layer_norm{i}", f"/norm{i}", "norm") for i in (1, 2, 3, 4)),
    ),
    "text_layer": (
        (".ln_1", ".layer_norm1", "/ln_1", "norm"),
        (".attn", ".self_attn", "/attn", "text_attention"),
        (".ln_2", ".layer_norm2", "/ln_2", "norm"),
        (".mlp.c_fc", ".mlp.fc1", "/c_fc", "linear"),
        (".mlp.c_proj", ".mlp.fc2", "/c_proj", "linear"),
    ),
    "encoder_layer": (
        (".self_attn", ".self_attn", "/self_attn", "attention"),
        (".cross_attn_image", ".cross_attn", "/cross_attn_image", "attention"),
        *_FFN,
        *((f".norm{i}", f".layer_norm{i}", f"/norm{i}", "norm") for i in (1, 2, 3)),
    ),
    "decoder_layer": (
        (".self_attn", ".self_attn", "/self_attn", "attention"),
        (".ca_text", ".text_cross_attn", "/ca_text", "attention"),
        (".cross_attn", ".vision_cross_attn", "/cross_attn", "attention"),
        *_FFN,
        (".norm1", ".vision_cross_attn_layer_norm", "/norm1", "norm"),
        (".norm2", ".self_attn_layer_norm", "/norm2", "norm"),
        (".norm3", ".mlp_layer_norm", "/norm3", "norm"),
        (".catext_norm", ".text_cross_attn_layer_norm", "/catext_norm", "norm"),
    ),
}  # fmt: skip

# Transforms: torch array -> Flax array, and back.
TRANSFORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "same": (lambda x: x, lambda x: x),
    "buffer": (lambda x: x, lambda x: x),
    "row": (lambda x: x[0], lambda x: x[None]),
    "transpose": (lambda x: x.T, lambda x: x.T),
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
    "upsample": (lambda x: x.transpose(0, 2, 3, 1), lambda x: x.transpose(0, 3, 1, 2)),
    "patch": (
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: _square_patch(x).transpose(3, 2, 0, 1),
    ),
}

# Leaves of the simple kinds: (suffix in torch, suffixes in transformers, suffix in Flax, transform, third
# of in_proj or None). Three suffixes in transformers: q, k and v, thirds of one torch tensor.
_BOTH = lambda transform: (
    (".weight", (".weight",), "/kernel", transform, None),
    (".bias", (".bias",), "/bias", "same", None),
)
_ATTENTION = lambda out: (
    *((".in_proj_weight", (f".{p}_proj.weight",), f"/{p}_proj/kernel", "transpose", i) for i, p in enumerate("qkv")),
    *((".in_proj_bias", (f".{p}_proj.bias",), f"/{p}_proj/bias", "same", i) for i, p in enumerate("qkv")),
    (".out_proj.weight", (f"{out}.weight",), "/out_proj/kernel", "transpose", None),
    (".out_proj.bias", (f"{out}.bias",), "/out_proj/bias", "same", None),
)  # fmt: skip
LEAVES: dict[str, tuple[tuple[str, tuple[str, ...], str, str, int | None], ...]] = {
    "same": (("", ("",), "", "same", None),),
    "buffer": (("", ("",), "", "buffer", None),),
    "row": (("", ("",), "", "row", None),),
    "positions": (("", ("",), "", "same", None),),
    "projection": (("", ("",), "", "same", None),),
    "linear": _BOTH("transpose"),
    "norm": ((".weight", (".weight",), "/scale", "same", None), (".bias", (".bias",), "/bias", "same", None)),
    "conv": _BOTH("conv"),
    "upsample": _BOTH("upsample"),
    "patch": _BOTH("patch")[:1],
    "qkv": (
        (".weight", tuple(f".{p}_proj.weight" for p in "qkv"), "/kernel", "transpose", None),
        (".bias", tuple(f".{p}_proj.bias" for p in "qkv"), "/bias", "same", None),
    ),
    "attention": _ATTENTION(".o_proj"),
    "text_attention": _ATTENTION(".out_proj"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """One torch tensor, or a third of one, and its place in the tree.

    torch: the tensor's name. third: which third of its rows (q, k, v), or None for the whole.
    huggingface: its name in transformers; three names where that holds q, k and v of it apart.
    path: the leaf in the tree. slot: index into the leaf's stack axes, () where it has none.
    layer: the per-layer name that patterns are matched against, `....self_attn.q_proj` for a third.
    """

    torch: str
    third: int | None
    huggingface: tuple[str, ...]
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

    @property
    def is_buffer(self) -> bool:
        """Whether the tensor is a constant of the model, which no training may move."""
        return self.transform == "buffer"

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The Flax array of this entry from the torch tensor."""
        if self.third is not None:
            rows = tensor.shape[0] // 3
            tensor = tensor[self.third * rows : (self.third + 1) * rows]
        return TRANSFORMS[self.transform][0](tensor)

    def write(self, array: np.ndarray) -> np.ndarray:
        """The torch tensor (or third of one) from the Flax array of this entry."""
        return TRANSFORMS[self.transform][1](array)


def entries(config: ModelConfig, parts: Iterable[str] = DEFAULT_PARTS) -> list[Entry]:
    """Every live tensor of these parts of a model of this size, in checkpoint order of the table."""
    rows = [row for part in parts for row in PARTS[part]]
    return [entry for row in rows for entry in _expand(*row, config)]


def roots(part: str) -> set[str]:
    """Where a part lies in the parameter tree: the first names of its paths."""
    return {flax.split("/")[0] for _, _, flax, _ in PARTS[part]}


def parts_of(names: Iterable[str]) -> tuple[str, ...]:
    """The parts that these roots of a parameter tree belong to, in the order of PARTS."""
    names = set(names)
    return tuple(part for part in PARTS if roots(part) & names)


def carried_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Detector tensors that reach no output here, by torch name: carried through, never trained."""
    d = config.dim
    shapes = {
        f"{TEXT}.encoder.text_projection": (config.text_dim, PROJECTION),
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


def dead_entries() -> list[Entry]:
    """The tensors that reach no output, in the same form; they have no path."""
    return [
        dataclasses.replace(entry, path=())
        for torch, huggingface, kind in DEAD
        for entry in _leaves(torch, huggingface, "", kind, ())
    ]


def templates() -> list[tuple[Entry, str]]:
    """Every entry once, `{block}` and `{layer}` left in its names, dead ones too; and its kind."""
    rows = [(*row[:2], "", row[3]) for row in TABLE]
    rows += [(torch, huggingface, "", kind) for torch, huggingface, kind in DEAD]
    simple = [leaf for row in rows for leaf in _simple(*row)]
    return [
        (entry, kind)
        for torch, huggingface, _, kind in simple
        for entry in _leaves(torch, huggingface, "", kind, ())
    ]


def _simple(
    torch: str, huggingface: str, flax: str, kind: str
) -> Iterator[tuple[str, str, str, str]]:
    """A row of the table as rows of simple kinds."""
    if kind not in COMPOSITE:
        yield torch, huggingface, flax, kind
        return
    for torch_end, huggingface_end, flax_end, part in COMPOSITE[kind]:
        yield from _simple(torch + torch_end, huggingface + huggingface_end, flax + flax_end, part)


def _expand(torch: str, huggingface: str, flax: str, kind: str, c: ModelConfig) -> Iterator[Entry]:
    for torch_row, huggingface_row, flax_row, part in _simple(torch, huggingface, flax, kind):
        for number, place, slot in _slots(torch_row, flax_row, c):
            torch_name, huggingface_name = (
                n.replace("{block}", number).replace("{layer}", number)
                for n in (torch_row, huggingface_row)
            )
            yield from _leaves(torch_name, huggingface_name, place, part, slot)


def _leaves(
    torch: str, huggingface: str, flax: str, kind: str, slot: tuple[int, ...]
) -> Iterator[Entry]:
    for torch_end, huggingface_ends, flax_end, transform, third in LEAVES[kind]:
        names = tuple(huggingface + end for end in huggingface_ends) if huggingface else ()
        yield Entry(
            torch + torch_end, third, names, tuple((flax + flax_end).split("/")), slot, transform
        )


def _slots(torch: str, flax: str, c: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every layer that a row stands for: its number, its path, its slot in the stack."""
    if "{block}" in torch:
        for block in range(c.vit_stages * c.vit_stage_blocks):
            stage, within = divmod(block, c.vit_stage_blocks)
            last = within == c.vit_stage_blocks - 1
            slot = (stage,) if last else (stage, within)
            yield str(block), flax.replace("{block}", "last" if last else "windows"), slot
    elif "{layer}" in torch:
        stacks = {
            TEXT: c.text_layers,
            GEOMETRY: c.geometry_layers,
            FUSION: c.fusion_layers,
            DECODER: c.decoder_layers,
            **STACKS,
        }
        for layer in range(next(n for prefix, n in stacks.items() if torch.startswith(prefix))):
            slot = () if "{layer}" in flax else (layer,)
            yield str(layer), flax.replace("{layer}", str(layer)), slot
    else:
        yield "", flax, ()


def _square_patch(x: np.ndarray) -> np.ndarray:
    """[patch * patch * 3, D] -> [patch, patch, 3, D]."""
    edge = round((x.shape[0] / 3) ** 0.5)
    return x.reshape(edge, edge, 3, x.shape[1])


def _renames(rows: Iterable[tuple[str, str, str, str]]) -> Iterator[tuple[str, str]]:
    """(official, transformers) name of every tensor of these rows that transformers has."""
    for row in rows:
        for torch, huggingface, _, kind in _simple(*row):
            for entry in _leaves(torch, huggingface, "", kind, ()):
                if entry.huggingface:
                    yield entry.torch, entry.huggingface[0]


# Tensors of the second neck and the heads are only renamed: (official, transformers), `{layer}` left in.
TRACKER_TEMPLATES = tuple(
    _renames(
        (
            *SECOND_NECK_TABLE,
            *((torch, huggingface, "", kind) for torch, huggingface, kind in SECOND_NECK_DEAD),
            *INTERACTIVE_TABLE,
        )
    )
)
