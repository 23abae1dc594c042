"""The torch detector and its training loss on a CPU, at any size, with seeded weights: the oracle of the parity tests.

Needs: pip install sam3==0.1.4 torch torchvision torchmetrics einops scipy pycocotools open_clip_torch "setuptools<81".
Self-check: `python torch_reference.py` builds two sizes, takes one training step on each and lists the parameters that reach no output.
The `sam3` package is only ever imported, never copied.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings

import numpy as np

warnings.filterwarnings("ignore", category=FutureWarning)
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """The package hard-codes device="cuda" and pin_memory(); under this mode both stay on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        if getattr(func, "__name__", "") == "pin_memory":
            return args[0]
        return func(*args, **kwargs)


OnCpu().__enter__()

import open_clip
from sam3.model.data_misc import BatchedDatapoint, BatchedFindTarget, FindStage
from sam3.model.decoder import TransformerDecoder, TransformerDecoderLayer
from sam3.model.encoder import TransformerEncoderFusion, TransformerEncoderLayer
from sam3.model.geometry_encoders import SequenceGeometryEncoder
from sam3.model.maskformer_segmentation import PixelDecoder, UniversalSegmentationHead
from sam3.model.model_misc import (
    MLP,
    DotProductScoring,
    MultiheadAttentionWrapper,
    TransformerWrapper,
)
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.sam3_image import Sam3Image
from sam3.model.text_encoder_ve import VETextEncoder
from sam3.model.tokenizer_ve import SimpleTokenizer
from sam3.model.vitdet import ViT
from sam3.model.vl_combiner import SAM3VLBackbone
from sam3.train.loss import loss_fns, sam3_loss
from sam3.train.matcher import BinaryHungarianMatcherV2, BinaryOneToManyMatcher

# The Triton kernel needs a GPU; the module's own torch branch is the same formula.
loss_fns.sigmoid_focal_loss = functools.partial(loss_fns.sigmoid_focal_loss, triton=False)
VOCABULARY = os.path.join(os.path.dirname(open_clip.__file__), "bpe_simple_vocab_16e6.txt.gz")


@dataclasses.dataclass(frozen=True)
class Size:
    """Widths and depths of a detector; `published` is the released one."""

    image: int = 112
    pretrain_image: int = 56
    patch: int = 14
    vit_dim: int = 48
    vit_depth: int = 4
    vit_heads: int = 4
    vit_global: tuple[int, ...] = (1, 3)
    window: int = 4
    mlp_ratio: float = 4.625
    dim: int = 32
    ffn: int = 64
    heads: int = 4
    fusion_layers: int = 2
    decoder_layers: int = 3
    geometry_layers: int = 2
    queries: int = 10
    text_dim: int = 32
    text_layers: int = 2
    text_heads: int = 4
    vocabulary: int = 49408
    text_length: int = 32


SMALL = Size()
WIDE = Size(
    image=168,
    window=6,
    vit_depth=6,
    vit_global=(2, 5),
    vit_dim=60,
    vit_heads=3,
    dim=64,
    heads=8,
    decoder_layers=6,
    queries=14,
)
NARROW = Size(
    image=84,
    pretrain_image=42,
    window=3,
    vit_dim=40,
    vit_depth=2,
    vit_heads=2,
    vit_global=(1,),
    mlp_ratio=4.0,
    dim=48,
    ffn=56,
    heads=2,
    fusion_layers=1,
    decoder_layers=2,
    geometry_layers=1,
    queries=9,
    text_dim=24,
    text_layers=1,
    text_heads=2,
    text_length=16,
)
PUBLISHED = Size(
    1008,
    336,
    14,
    1024,
    32,
    16,
    (7, 15, 23, 31),
    24,
    4.625,
    256,
    2048,
    8,
    6,
    6,
    3,
    200,
    1024,
    24,
    16,
)


def detector(size: Size = SMALL, seed: int = 0, dropout: float = 0.0) -> Sam3Image:
    """A torch detector of this size with every parameter drawn from `seed` (nothing left at a neutral or zero init)."""
    d, h = size.dim, size.heads
    sine = functools.partial(
        PositionEmbeddingSine, num_pos_feats=d, normalize=True, scale=None, temperature=10000
    )
    vit = ViT(
        img_size=size.image,
        pretrain_img_size=size.pretrain_image,
        patch_size=size.patch,
        embed_dim=size.vit_dim,
        depth=size.vit_depth,
        num_heads=size.vit_heads,
        mlp_ratio=size.mlp_ratio,
        norm_layer="LayerNorm",
        drop_path_rate=dropout,
        qkv_bias=True,
        use_abs_pos=True,
        tile_abs_pos=True,
        global_att_blocks=size.vit_global,
        rel_pos_blocks=(),
        use_rope=True,
        use_interp_rope=True,
        window_size=size.window,
        pretrain_use_cls_token=True,
        retain_cls_token=False,
        ln_pre=True,
        ln_post=False,
        return_interm_layers=False,
        bias_patch_embed=False,
    )
    neck = Sam3DualViTDetNeck(
        position_encoding=sine(),
        d_model=d,
        scale_factors=[4.0, 2.0, 1.0, 0.5],
        trunk=vit,
        add_sam2_neck=False,
    )
    text = VETextEncoder(
        tokenizer=SimpleTokenizer(bpe_path=VOCABULARY),
        d_model=d,
        width=size.text_dim,
        heads=size.text_heads,
        layers=size.text_layers,
        context_length=size.text_length,
        vocab_size=size.vocabulary,
    )

    def attention(batch_first: bool = False) -> nn.Module:
        return MultiheadAttentionWrapper(
            num_heads=h, dropout=dropout, embed_dim=d, batch_first=batch_first
        )

    def layer(batch_first: bool, pos_at_self: bool, pos_at_cross_keys: bool) -> nn.Module:
        return TransformerEncoderLayer(
            activation="relu",
            d_model=d,
            dim_feedforward=size.ffn,
            dropout=dropout,
            pos_enc_at_attn=pos_at_self,
            pre_norm=True,
            pos_enc_at_cross_attn_queries=False,
            pos_enc_at_cross_attn_keys=pos_at_cross_keys,
            self_attention=attention(batch_first),
            cross_attention=attention(batch_first),
        )

    encoder = TransformerEncoderFusion(
        layer=layer(True, True, False),
        num_layers=size.fusion_layers,
        d_model=d,
        num_feature_levels=1,
        frozen=False,
        use_act_checkpoint=True,
        add_pooled_text_to_img_feat=False,
        pool_text_with_mask=True,
    )
    decoder = TransformerDecoder(
        layer=TransformerDecoderLayer(
            activation="relu",
            d_model=d,
            dim_feedforward=size.ffn,
            dropout=dropout,
            cross_attention=attention(),
            n_heads=h,
            use_text_cross_attention=True,
        ),
        num_layers=size.decoder_layers,
        num_queries=size.queries,
        return_intermediate=True,
        box_refine=True,
        num_o2m_queries=0,
        dac=True,
        boxRPB="log",
        d_model=d,
        frozen=False,
        interaction_layer=None,
        dac_use_selfatt_ln=True,
        resolution=size.image,
        stride=size.patch,
        use_act_checkpoint=True,
        presence_token=True,
    )
    geometry = SequenceGeometryEncoder(
        pos_enc=sine(),
        encode_boxes_as_points=False,
        points_direct_project=True,
        points_pool=True,
        points_pos_enc=True,
        boxes_direct_project=True,
        boxes_pool=True,
        boxes_pos_enc=True,
        d_model=d,
        num_layers=size.geometry_layers,
        layer=layer(False, False, True),
        use_act_ckpt=True,
        add_cls=True,
        add_post_encode_proj=True,
    )
    head = UniversalSegmentationHead(
        hidden_dim=d,
        upsampling_stages=3,
        aux_masks=False,
        presence_head=False,
        dot_product_scorer=None,
        act_ckpt=True,
        cross_attend_prompt=MultiheadAttentionWrapper(num_heads=h, dropout=0, embed_dim=d),
        pixel_decoder=PixelDecoder(
            num_upsampling_stages=3, interpolation_mode="nearest", hidden_dim=d
        ),
    )
    scoring = DotProductScoring(
        d_model=d,
        d_proj=d,
        prompt_mlp=MLP(
            input_dim=d,
            hidden_dim=size.ffn,
            output_dim=d,
            num_layers=2,
            dropout=dropout,
            residual=True,
            out_norm=nn.LayerNorm(d),
        ),
    )
    model = Sam3Image(
        backbone=SAM3VLBackbone(visual=neck, text=text, scalp=1),
        transformer=TransformerWrapper(encoder=encoder, decoder=decoder, d_model=d),
        input_geometry_encoder=geometry,
        segmentation_head=head,
        num_feature_levels=1,
        o2m_mask_predict=True,
        dot_prod_scoring=scoring,
        use_instance_query=False,
        multimask_output=True,
        matcher=hungarian_matcher(),
    )
    fill(model, seed)
    return model


# Heads whose output would saturate under the plain rule (boxes at 0 or 1, presence at -10), and those that would hardly move anything.
GAIN = {
    "bbox_embed.layers.2": 0.25,
    "presence_token_head.layers.2": 0.3,
    "mask_embed.layers.2": 1.0,
    "hs_proj": 4.0,
    "boxRPB_embed": 3.0,
    "reference_points": 3.0,
}


def fill(model: nn.Module, seed: int) -> None:
    """Draw every parameter: matrices with a fan-in scale, norm weights around one, biases and embeddings small but not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        table = any(
            word in name
            for word in ("_embed.weight", "token", "positional", "pos_embed", "reference_points")
        )
        scale = 0.3 if p.ndim == 1 or table else 0.7 / np.sqrt(p[0].numel())
        scale *= next((gain for part, gain in GAIN.items() if part in name), 1.0)
        p.data = (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0) + scale * torch.randn(
            p.shape, generator=generator
        )


def hungarian_matcher() -> BinaryHungarianMatcherV2:
    return BinaryHungarianMatcherV2(
        focal=True, cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2, stable=False
    )


def loss_wrapper(
    *,
    masks: bool = True,
    pad_n_queries: int | None = 200,
    o2m_matcher_on_aux: bool = False,
    weak_loss: bool = False,
    sqrt_batch: bool = False,
) -> sam3_loss.Sam3LossWrapper:
    """The published fine-tuning loss; `masks` adds its segmentation variant (without the semantic head)."""
    terms = [
        loss_fns.Boxes(weight_dict={"loss_bbox": 5.0, "loss_giou": 2.0}),
        loss_fns.IABCEMdetr(
            weight_dict={"loss_ce": 20.0, "presence_loss": 20.0},
            pos_weight=10.0,
            alpha=0.25,
            gamma=2,
            weak_loss=weak_loss,
            use_presence=True,
            pos_focal=False,
            pad_n_queries=pad_n_queries,
            pad_scale_pos=1.0,
        ),
    ]
    if masks:
        terms.append(
            loss_fns.Masks(
                weight_dict={"loss_mask": 200.0, "loss_dice": 10.0},
                focal_alpha=0.25,
                focal_gamma=2.0,
                compute_aux=False,
            )
        )
    return sam3_loss.Sam3LossWrapper(
        loss_fns_find=terms,
        matcher=hungarian_matcher(),
        o2m_matcher=BinaryOneToManyMatcher(alpha=0.3, threshold=0.4, topk=4),
        o2m_weight=2.0,
        use_o2m_matcher_on_o2m_aux=o2m_matcher_on_aux,
        normalization="local",
        scale_by_find_batch_size=sqrt_batch,
    )


def example(
    size: Size,
    seed: int,
    images: int = 3,
    prompts: int = 2,
    max_targets: int = 4,
    box_prompts: int = 0,
) -> dict[str, np.ndarray]:
    """A random batch in padded form. Images [I, 3, Y, X] in -1..1; per pair B = I * prompts: text, targets, box exemplars.

    Keys: images, image_of_pair [B], texts (list of B), num_targets [B] (some zero), boxes [B, T, 4] cxcywh in 0..1, masks [B, T, Y, X],
    prompt_boxes [B, G, 4], prompt_labels [B, G], prompt_valid [B, G].
    """
    rng, pairs, edge = np.random.default_rng(seed), images * prompts, size.image
    words = [
        "a red car",
        "wheel",
        "person in a blue t-shirt",
        "yellow school bus",
        "dog",
        "glass bottle",
        "cell nucleus",
        "crack",
    ]
    counts = rng.integers(0, max_targets + 1, pairs)
    boxes = np.concatenate(
        [
            rng.uniform(0.25, 0.75, (pairs, max_targets, 2)),
            rng.uniform(0.1, 0.45, (pairs, max_targets, 2)),
        ],
        -1,
    )
    boxes *= (np.arange(max_targets) < counts[:, None])[..., None]
    rows, columns = np.mgrid[:edge, :edge] / edge
    inside = [
        abs(grid - boxes[..., i, None, None]) <= boxes[..., i + 2, None, None] / 2
        for i, grid in ((0, columns), (1, rows))
    ]
    return {
        "images": rng.uniform(-1, 1, (images, 3, edge, edge)).astype(np.float32),
        "image_of_pair": np.repeat(np.arange(images), prompts),
        "texts": [words[i] for i in rng.integers(0, len(words), pairs)],
        "num_targets": counts,
        "boxes": boxes.astype(np.float32),
        "masks": inside[0] & inside[1] & (boxes[..., 2] > 0)[..., None, None],
        "prompt_boxes": np.concatenate(
            [
                rng.uniform(0.3, 0.7, (pairs, box_prompts, 2)),
                rng.uniform(0.1, 0.4, (pairs, box_prompts, 2)),
            ],
            -1,
        ).astype(np.float32),
        "prompt_labels": rng.integers(0, 2, (pairs, box_prompts)),
        "prompt_valid": np.arange(box_prompts)
        < rng.integers(0, box_prompts + 1, (pairs, 1)),  # valid first: the package asserts it
    }


def _datapoint(e: dict) -> tuple[BatchedDatapoint, BatchedFindTarget]:
    pairs, counts = len(e["texts"]), torch.from_numpy(e["num_targets"])
    vocabulary = sorted(set(e["texts"]))
    width = max(int(counts.max()), 1)
    real = torch.arange(e["boxes"].shape[1])[None] < counts[:, None]
    boxes, masks = torch.from_numpy(e["boxes"]), torch.from_numpy(e["masks"])
    find = FindStage(
        img_ids=torch.from_numpy(e["image_of_pair"]),
        text_ids=torch.tensor([vocabulary.index(t) for t in e["texts"]]),
        input_boxes=torch.from_numpy(e["prompt_boxes"]).transpose(0, 1),
        input_boxes_mask=~torch.from_numpy(e["prompt_valid"]),
        input_boxes_label=torch.from_numpy(e["prompt_labels"]).transpose(0, 1),
        input_points=torch.zeros(pairs, 0, 257),
        input_points_mask=torch.zeros(pairs, 0, dtype=torch.bool),
        object_ids=[[0]] * pairs,
    )
    ids = torch.where(real, torch.arange(real.shape[1])[None], -1)[:, :width]
    target = BatchedFindTarget(
        num_boxes=counts,
        boxes=boxes[real],
        boxes_padded=boxes[:, :width],
        repeated_boxes=torch.zeros(0, 4),
        segments=masks[real],
        semantic_segments=None,
        is_valid_segment=torch.ones(int(counts.sum()), dtype=torch.bool),
        is_exhaustive=torch.ones(pairs, dtype=torch.bool),
        object_ids=torch.arange(int(counts.sum())),
        object_ids_padded=ids,
    )
    return BatchedDatapoint(
        img_batch=torch.from_numpy(e["images"]),
        find_text_batch=vocabulary,
        find_inputs=[find],
        find_targets=[target],
        find_metadatas=[None],
    ), target


OUTPUTS = (
    "pred_logits",
    "pred_boxes",
    "presence_logit_dec",
    "pred_masks",
    "semantic_seg",
    "pred_logits_o2m",
    "pred_boxes_o2m",
    "pred_masks_o2m",
)
WATCHED = (
    "backbone.vision_backbone.trunk", *(f"backbone.vision_backbone.convs.{i}" for i in range(3)), "backbone.language_backbone",
    "geometry_encoder", "transformer.encoder", "transformer.decoder", "segmentation_head", "dot_prod_scoring",
)  # fmt: skip


def _snapshot(x):
    """Containers copied, tensors kept: the package changes its lists in place."""
    if isinstance(x, dict):
        return {k: _snapshot(v) for k, v in x.items()}
    return type(x)(_snapshot(v) for v in x) if type(x) in (list, tuple) else x


def forward(model: Sam3Image, e: dict, train: bool) -> tuple[dict, dict]:
    """Run the detector. Returns (out, inside): `out` is the package's own dict (with aux_outputs and *_o2m in train mode, gradients attached);
    `inside` maps each module named in WATCHED to (args, kwargs, what it returned)."""
    model.train(train)
    inside: dict = {}
    modules = dict(model.named_modules())
    given: dict = {}

    def before(name):
        return lambda _module, args, kwargs: given.__setitem__(
            name, (_snapshot(args), _snapshot(kwargs))
        )

    def after(name):
        return lambda _module, _args, _kwargs, out: inside.__setitem__(
            name, (*given[name], _snapshot(out))
        )

    hooks = [modules[n].register_forward_pre_hook(before(n), with_kwargs=True) for n in WATCHED]
    hooks += [modules[n].register_forward_hook(after(n), with_kwargs=True) for n in WATCHED]
    try:
        stage = next(iter(model(_datapoint(e)[0])))
    finally:
        for hook in hooks:
            hook.remove()
    return (stage[0] if isinstance(stage, list) else stage), inside


def stacked(out: dict) -> dict[str, np.ndarray]:
    """The detector's outputs as arrays, decoder layers first where there are any: pred_logits [L, B, Q, 1], pred_boxes [L, B, Q, 4], ..."""
    layers = [*out.get("aux_outputs", []), out]
    arrays = {}
    for key in OUTPUTS:
        if out.get(key) is not None:
            with_layers = [o[key] for o in layers if key in o]
            arrays[key] = (
                (torch.stack(with_layers) if len(with_layers) > 1 else out[key])
                .detach()
                .float()
                .numpy()
            )
    return arrays


def train_step(
    model: Sam3Image, e: dict, **loss_options
) -> tuple[dict[str, float], dict[str, np.ndarray], dict]:
    """Forward, published loss, backward. Returns (terms under the published keys, gradient of core_loss by parameter name, out)."""
    model.zero_grad(set_to_none=True)
    out, _ = forward(model, e, train=True)
    wrapper = loss_wrapper(**loss_options)
    target = model.back_convert(_datapoint(e)[1])
    terms = wrapper.compute_loss(out, target)
    total = terms["core_loss"] * (
        len(e["texts"]) ** 0.5 if wrapper.scale_by_find_batch_size else 1.0
    )
    total.backward()
    grads = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
    return (
        {**{k: float(v) for k, v in terms.items()}, "core_loss": float(total.detach())},
        grads,
        out,
    )


def tokens(model: Sam3Image, texts: list[str]) -> np.ndarray:
    """Token ids [len(texts), context], zero padded."""
    encoder = model.backbone.language_backbone
    return encoder.tokenizer(texts, context_length=encoder.context_length).numpy()


if __name__ == "__main__":
    for label, size, boxes in (
        ("SMALL", SMALL, 0),
        ("SMALL with exemplars", SMALL, 2),
        ("WIDE", WIDE, 1),
    ):
        model = detector(size, seed=1)
        terms, grads, out = train_step(model, example(size, seed=2, box_prompts=boxes))
        print(
            label,
            f"{sum(p.numel() for p in model.parameters()):,} parameters, core_loss {terms['core_loss']:.3f}",
        )
        print("  outputs:", {k: v.shape for k, v in stacked(out).items()})
        print(
            "  without gradient:",
            sorted(
                n
                for n, p in model.named_parameters()
                if n not in grads or not np.abs(grads[n]).max() > 0
            ),
        )
