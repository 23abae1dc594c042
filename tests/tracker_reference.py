"""The torch tracker on a CPU, at any size, with seeded weights: sizes, construction, checkpoints, the port.

Beside `torch_reference.py` (same needs). The `sam3` package is only ever imported and called, part by
part. float32 throughout: the package's casts to bfloat16 are held back.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests import torch_reference as base

warnings.filterwarnings("ignore", message=".*autocast.*")
from sam3.model.decoder import TransformerDecoderLayerv2, TransformerEncoderCrossAttention
from sam3.model.memory import CXBlock, SimpleFuser, SimpleMaskDownSampler, SimpleMaskEncoder
from sam3.model.model_misc import TransformerWrapper
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.sam.mask_decoder import MLP, MaskDecoder
from sam3.sam.prompt_encoder import PromptEncoder
from sam3.sam.transformer import RoPEAttention, TwoWayTransformer


class OnCpuInFloat32(TorchFunctionMode):
    """`.cuda()`, `.to("cuda")` and `.to(torch.bfloat16)` leave a tensor where and as it is."""

    def __torch_function__(self, func, types_, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "to":
            kept = lambda x: (
                not (
                    x is torch.bfloat16 or (isinstance(x, (str, torch.device)) and "cuda" in str(x))
                )
            )
            args = (args[0], *(x for x in args[1:] if kept(x)))
            kwargs = {k: x for k, x in kwargs.items() if kept(x)}
            if len(args) == 1 and not set(kwargs) - {"non_blocking"}:
                return args[0]
        return func(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class TrackerSize:
    """Widths and depths of a tracker; `PUBLISHED` is the released one. The detector beside it must agree in image, patch and dim."""

    image: int = 112
    patch: int = 14
    dim: int = 32
    memory_dim: int = 8
    memories: int = 7
    pointers: int = 16
    conditioning: int = 4
    attention_layers: int = 2
    attention_ffn: int = 64
    decoder_heads: int = 4
    decoder_ffn: int = 64
    iou_hidden: int = 24
    mask_channels: int = 16

    @property
    def grid(self) -> int:
        return self.image // self.patch


SMALL = TrackerSize()
WIDE = TrackerSize(
    image=168,
    dim=64,
    memory_dim=16,
    attention_layers=4,
    attention_ffn=96,
    decoder_heads=8,
    decoder_ffn=80,
    iou_hidden=40,
)
PUBLISHED = TrackerSize(1008, 14, 256, 64, 7, 16, 4, 4, 2048, 8, 2048, 256, 16)
DETECTORS = {SMALL: base.SMALL, WIDE: base.WIDE, PUBLISHED: base.PUBLISHED}


def tracker(
    size: TrackerSize = SMALL, seed: int = 0, dropout: float = 0.0, memory_selection: bool = False
) -> Sam3TrackerPredictor:
    """A torch tracker of this size, every parameter and the prompt encoder's random frequencies drawn from `seed`.

    memory_selection: frames without the object are left out of the memories (the published video model has it on, the image model off).
    The attributes that the released code reads in training but never sets are set to SAM 2's: no teacher forcing, no dropped memories.
    """
    d, g, m = size.dim, size.grid, size.memory_dim

    class Sized(Sam3TrackerPredictor):
        def _build_sam_heads(self) -> None:
            self.sam_prompt_embed_dim, self.sam_image_embedding_size = d, g
            self.sam_prompt_encoder = PromptEncoder(
                embed_dim=d,
                image_embedding_size=(g, g),
                input_image_size=(size.image, size.image),
                mask_in_chans=size.mask_channels,
            )
            self.sam_mask_decoder = MaskDecoder(
                num_multimask_outputs=3,
                transformer_dim=d,
                iou_head_depth=3,
                iou_head_hidden_dim=size.iou_hidden,
                transformer=TwoWayTransformer(
                    depth=2, embedding_dim=d, mlp_dim=size.decoder_ffn, num_heads=size.decoder_heads
                ),
                use_high_res_features=True,
                iou_prediction_use_sigmoid=True,
                pred_obj_scores=True,
                pred_obj_scores_mlp=True,
                use_multimask_token_for_obj_ptr=True,
                **self.sam_mask_decoder_extra_args,
            )
            self.obj_ptr_proj = MLP(d, d, d, 3)
            self.obj_ptr_tpos_proj = nn.Linear(d, m)

    def attention(**options) -> nn.Module:
        return RoPEAttention(
            embedding_dim=d,
            num_heads=1,
            downsample_rate=1,
            dropout=dropout,
            rope_theta=10000.0,
            feat_sizes=[g, g],
            **options,
        )

    layer = TransformerDecoderLayerv2(
        cross_attention_first=False,
        activation="relu",
        dim_feedforward=size.attention_ffn,
        dropout=dropout,
        pos_enc_at_attn=False,
        pre_norm=True,
        self_attention=attention(),
        d_model=d,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        cross_attention=attention(kv_in_dim=m, rope_k_repeat=True),
    )
    encoder = TransformerEncoderCrossAttention(
        remove_cross_attention_layers=[],
        batch_first=True,
        d_model=d,
        frozen=False,
        pos_enc_at_input=True,
        layer=layer,
        num_layers=size.attention_layers,
        use_act_checkpoint=False,
    )
    memory_encoder = SimpleMaskEncoder(
        out_dim=m,
        in_dim=d,
        position_encoding=PositionEmbeddingSine(
            num_pos_feats=m, normalize=True, scale=None, temperature=10000
        ),
        mask_downsampler=SimpleMaskDownSampler(
            embed_dim=d, kernel_size=3, stride=2, padding=1, interpol_size=[16 * g, 16 * g]
        ),
        fuser=SimpleFuser(
            layer=CXBlock(
                dim=d, kernel_size=7, padding=3, layer_scale_init_value=1e-6, use_dwconv=True
            ),
            num_layers=2,
        ),
    )
    model = Sized(
        image_size=size.image,
        num_maskmem=size.memories,
        backbone=None,
        backbone_stride=size.patch,
        maskmem_backbone=memory_encoder,
        transformer=TransformerWrapper(encoder=encoder, decoder=None, d_model=d),
        multimask_output_in_sam=True,
        multimask_output_for_tracking=True,
        multimask_min_pt_num=0,
        multimask_max_pt_num=1,
        non_overlap_masks_for_mem_enc=False,
        non_overlap_masks_for_output=False,
        max_cond_frames_in_attn=size.conditioning,
        max_obj_ptrs_in_encoder=size.pointers,
        clear_non_cond_mem_around_input=True,
        fill_hole_area=0,
        use_memory_selection=memory_selection,
        forward_backbone_per_frame_for_eval=True,
        sam_mask_decoder_extra_args=dict(
            dynamic_multimask_via_stability=True,
            dynamic_multimask_stability_delta=0.05,
            dynamic_multimask_stability_thresh=0.98,
        ),
    )
    model.teacher_force_obj_scores_for_mem, model.prob_to_dropout_spatial_mem = False, 0.0
    fill(model, seed)
    return model.eval()


# So that masks have both signs, scores of the object both signs, IoUs differ, and what is seen and remembered moves the answer.
GAIN = {
    **{f"cross_attn_image.{part}_proj": 3.0 for part in ("q", "k", "v", "out")}, "mask_downsampler.encoder.12": 4.0,
    **{f"{way}.{part}_proj": 2.0 for way in ("token_to_image", "image_to_token") for part in ("q", "k", "v", "out")},
    "output_hypernetworks_mlps": 2.0, "iou_prediction_head.layers.2": 5.0, "pred_obj_score_head.layers.2": 9.0, "obj_ptr_proj": 1.6,
    "output_upscaling": 2.0, "conv_s": 2.0, "maskmem_backbone.out_proj": 1.5, "sam2_convs": 1.5,
}  # fmt: skip
CENTRED = ("iou_prediction_head.layers.2.bias", "pred_obj_score_head.layers.2.bias")


def fill(model: nn.Module, seed: int) -> None:
    """Draw every parameter: matrices with a fan-in scale, norm weights around one, biases and embeddings small but not zero."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator)
    for name, p in model.named_parameters():
        table = (
            "point_embeddings." in name
            or name.endswith(("_embed.weight", "token.weight", "tokens.weight"))
            or name.startswith(("no_", "maskmem_tpos"))
        )
        scale = 0.3 if p.ndim == 1 or table else 0.7 / np.sqrt(p[0].numel())
        scale *= next((gain for part, gain in GAIN.items() if part in name), 1.0)
        p.data = (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0) + scale * draw(p.shape)
        if name.endswith(CENTRED):
            p.data.zero_()
    for name, buffer in model.named_buffers():
        if "gaussian" in name:
            buffer.copy_(draw(buffer.shape))


def detector_with_neck(size: base.Size, seed: int = 0) -> nn.Module:
    """A torch detector whose backbone has the second neck (`sam2_convs`) that feeds the tracker."""
    model = base.detector(size, seed)
    neck = model.backbone.vision_backbone
    neck.sam2_convs = copy.deepcopy(neck.convs)
    fill(neck.sam2_convs, seed + 1000)
    return model


def checkpoint(detector: nn.Module | None, tracker_: nn.Module | None) -> dict[str, np.ndarray]:
    """Tensors of both under the names of the published checkpoint, `detector.` and `tracker.`; rotary and causal tables left out."""
    tensors = {}
    for prefix, model in (("detector.", detector), ("tracker.", tracker_)):
        if model is not None:
            real = {
                n: t
                for n, t in model.state_dict().items()
                if t.is_floating_point() and "attn_mask" not in n and "freqs" not in n
            }
            tensors |= {prefix + name: tensor.numpy().copy() for name, tensor in real.items()}
    return tensors


def load(model: nn.Module, tensors: dict[str, np.ndarray], prefix: str) -> nn.Module:
    """Give a model the tensors of a checkpoint that stand behind `prefix`; every parameter must be among them."""
    inside = {
        n.removeprefix(prefix): torch.from_numpy(np.asarray(t))
        for n, t in tensors.items()
        if n.startswith(prefix)
    }
    missing, unexpected = model.load_state_dict(inside, strict=False)
    parameters = dict(model.named_parameters())
    assert not unexpected
    assert not [n for n in missing if n in parameters]
    return model


# transformers' Sam3TrackerVideoModel, an independent port

HUGGINGFACE = (
    (r"^transformer\.encoder\.norm", "memory_attention.layer_norm"), (r"^transformer\.encoder", "memory_attention"), (r"^obj_ptr_proj", "object_pointer_proj"),
    (r"^maskmem_backbone\.out_proj", "memory_encoder.projection"), (r"pix_feat_proj", "feature_projection"), (r"^maskmem_backbone\.fuser", "memory_encoder.memory_fuser"),
    (r"^maskmem_backbone", "memory_encoder"), (r"mask_downsampler\.encoder\.12", "mask_downsampler.final_conv"),
    *((rf"mask_downsampler\.encoder\.{3 * i + j}\.", f"mask_downsampler.layers.{i}.{n}.") for i in range(4) for j, n in enumerate(("conv", "layer_norm"))),
    (r"\.gamma$", ".scale"), (r"\.dwconv", ".depthwise_conv"), (r"\.pwconv", ".pointwise_conv"), (r"^maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed", "no_memory_embedding"), (r"^no_mem_pos_enc", "no_memory_positional_encoding"), (r"^no_obj_ptr", "no_object_pointer"),
    (r"^no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"), (r"^obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer"),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"), (r"^sam_", ""), (r"\.mlp\.lin1", ".mlp.proj_in"), (r"\.mlp\.lin2", ".mlp.proj_out"),
    *((rf"mask_downscaling\.{i}\.", f"mask_embed.{n}.") for i, n in ((0, "conv1"), (1, "layer_norm1"), (3, "conv2"), (4, "layer_norm2"), (6, "conv3"))),
    *((rf"output_upscaling\.{i}\.", f"{n}.") for i, n in ((0, "upscale_conv1"), (1, "upscale_layer_norm"), (3, "upscale_conv2"))),
    (r"\.norm_final_attn", ".layer_norm_final_attn"), (r"\.norm(\d?)\.", r".layer_norm\1."), (r"\.out_proj", ".o_proj"),
    *((rf"(hypernetworks_mlps\.\d|prediction_head|score_head|pointer_proj)\.layers\.{i}\.", rf"\1.{n}.") for i, n in ((0, "proj_in"), (2, "proj_out"), (1, "layers.0"))),
)  # fmt: skip


def huggingface(model: Sam3TrackerPredictor, size: TrackerSize):
    """transformers' Sam3TrackerVideoModel with this tracker's weights, without a vision encoder. Its memories must be 64 wide."""
    from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel

    d, edges = size.dim, dict(image_size=size.image, patch_size=size.patch)
    config = Sam3TrackerVideoConfig(
        vision_config=dict(model_type="sam3_vision_model", fpn_hidden_size=d, backbone_config=dict(model_type="sam3_vit_model", **edges)),
        prompt_encoder_config=dict(hidden_size=d, mask_input_channels=size.mask_channels, **edges),
        mask_decoder_config=dict(hidden_size=d, mlp_dim=size.decoder_ffn, num_attention_heads=size.decoder_heads, iou_head_hidden_dim=size.iou_hidden),
        memory_attention_hidden_size=d, memory_attention_num_layers=size.attention_layers, memory_attention_feed_forward_hidden_size=size.attention_ffn,
        memory_encoder_hidden_size=d, memory_encoder_output_channels=size.memory_dim, mask_downsampler_embed_dim=d, memory_fuser_embed_dim=d,
        memory_fuser_intermediate_dim=4 * d, image_size=size.image,
    )  # fmt: skip
    port = Sam3TrackerVideoModel(config, remove_vision_encoder=True).eval()
    named: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        for old, new in HUGGINGFACE:
            name = re.sub(old, new, name)
        named[name] = tensor
    named["prompt_encoder.point_embed.weight"] = torch.cat(
        [named.pop(f"prompt_encoder.point_embeddings.{i}.weight") for i in range(4)]
    )
    named["shared_image_embedding.positional_embedding"] = named[
        "prompt_encoder.shared_embedding.positional_embedding"
    ]
    port.load_state_dict(named)
    return port
