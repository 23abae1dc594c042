"""Rows of the table of names for the parts beside the detector: second neck and interactive heads.

The form is that of sam3jax.weights.names. The second neck's names stand behind `detector.` like the
detector's own; `tracker.` stands beside it, and is written out. No name in transformers: it holds the
four point embeddings as one table (convert.tracker).
"""

from __future__ import annotations

NECK, NECK_HUGGINGFACE = "backbone.vision_backbone.convs", "vision_encoder.neck.fpn_layers"
SECOND_NECK = "backbone.vision_backbone.sam2_convs"
SECOND_NECK_HUGGINGFACE = "tracker_neck.fpn_layers"
# SAM 3.1 has two further necks, and the clicking heads beside those of its multiplex memory.
INTERACTIVE_NECK = "backbone.vision_backbone.interactive_convs"
PROPAGATION_NECK = "backbone.vision_backbone.propagation_convs"
TRACKER, TRACKER_HUGGINGFACE = "tracker.", "tracker_model."
PROMPT, DECODER = f"{TRACKER}sam_prompt_encoder", f"{TRACKER}sam_mask_decoder"
POINTS, LAYERS = f"{PROMPT}.point_embeddings", f"{DECODER}.transformer.layers"
HYPERNETWORKS = f"{DECODER}.output_hypernetworks_mlps"
FREQUENCIES = f"{PROMPT}.pe_layer.positional_encoding_gaussian_matrix"
_PROMPT, _DECODER = f"{TRACKER_HUGGINGFACE}prompt_encoder", f"{TRACKER_HUGGINGFACE}mask_decoder"

# (beginning of a name in SAM 3.1, in SAM 3) of what both have.
MULTIPLEX_NAMES = (
    (f"{TRACKER}model.interactive_sam_prompt_encoder.", f"{PROMPT}."),
    (f"{TRACKER}model.interactive_sam_mask_decoder.", f"{DECODER}."),
    (f"{TRACKER}model.interactivity_no_mem_embed", f"{TRACKER}no_mem_embed"),
    (f"{INTERACTIVE_NECK}.", f"{SECOND_NECK}."),
)

# Layers of each stack that a `{layer}` of these rows numbers.
STACKS = {POINTS: 4, LAYERS: 2, HYPERNETWORKS: 4}

Row = tuple[str, str, str, str]


def neck_rows(torch: str, huggingface: str, flax: str) -> tuple[Row, ...]:
    """The live rows of a neck; both necks are built alike."""
    return (
        (f"{torch}.0.dconv_2x2_0", f"{huggingface}.0.scale_layers.0", f"{flax}/convs_0_dconv_2x2_0", "upsample"),
        (f"{torch}.0.dconv_2x2_1", f"{huggingface}.0.scale_layers.2", f"{flax}/convs_0_dconv_2x2_1", "upsample"),
        (f"{torch}.0.conv_1x1", f"{huggingface}.0.proj1", f"{flax}/convs_0_conv_1x1", "conv"),
        (f"{torch}.0.conv_3x3", f"{huggingface}.0.proj2", f"{flax}/convs_0_conv_3x3", "conv"),
        (f"{torch}.1.dconv_2x2", f"{huggingface}.1.scale_layers.0", f"{flax}/convs_1_dconv_2x2", "upsample"),
        (f"{torch}.1.conv_1x1", f"{huggingface}.1.proj1", f"{flax}/convs_1_conv_1x1", "conv"),
        (f"{torch}.1.conv_3x3", f"{huggingface}.1.proj2", f"{flax}/convs_1_conv_3x3", "conv"),
        (f"{torch}.2.conv_1x1", f"{huggingface}.2.proj1", f"{flax}/convs_2_conv_1x1", "conv"),
        (f"{torch}.2.conv_3x3", f"{huggingface}.2.proj2", f"{flax}/convs_2_conv_3x3", "conv"),
    )  # fmt: skip


def dead_neck_rows(torch: str, huggingface: str) -> tuple[tuple[str, str, str], ...]:
    """The fourth level of a neck, which reaches no output: (torch, transformers, kind)."""
    return (
        (f"{torch}.3.conv_1x1", f"{huggingface}.3.proj1", "conv"),
        (f"{torch}.3.conv_3x3", f"{huggingface}.3.proj2", "conv"),
    )


SECOND_NECK_TABLE = neck_rows(SECOND_NECK, SECOND_NECK_HUGGINGFACE, "tracker_neck")
SECOND_NECK_DEAD = dead_neck_rows(SECOND_NECK, SECOND_NECK_HUGGINGFACE)

INTERACTIVE_TABLE: tuple[Row, ...] = (
    (f"{TRACKER}no_mem_embed", f"{TRACKER_HUGGINGFACE}no_memory_embedding", "no_mem_embed", "same"),
    (FREQUENCIES, f"{_PROMPT}.shared_embedding.positional_embedding", "prompt_encoder/frequencies", "buffer"),
    (f"{POINTS}.{{layer}}.weight", "", "prompt_encoder/point_embed", "row"),
    (f"{PROMPT}.not_a_point_embed.weight", f"{_PROMPT}.not_a_point_embed.weight", "prompt_encoder/not_a_point_embed", "same"),
    (f"{PROMPT}.no_mask_embed.weight", f"{_PROMPT}.no_mask_embed.weight", "prompt_encoder/no_mask_embed", "same"),
    (f"{PROMPT}.mask_downscaling.0", f"{_PROMPT}.mask_embed.conv1", "prompt_encoder/mask_downscaling_0", "conv"),
    (f"{PROMPT}.mask_downscaling.1", f"{_PROMPT}.mask_embed.layer_norm1", "prompt_encoder/mask_downscaling_1", "norm"),
    (f"{PROMPT}.mask_downscaling.3", f"{_PROMPT}.mask_embed.conv2", "prompt_encoder/mask_downscaling_3", "conv"),
    (f"{PROMPT}.mask_downscaling.4", f"{_PROMPT}.mask_embed.layer_norm2", "prompt_encoder/mask_downscaling_4", "norm"),
    (f"{PROMPT}.mask_downscaling.6", f"{_PROMPT}.mask_embed.conv3", "prompt_encoder/mask_downscaling_6", "conv"),
    (f"{DECODER}.obj_score_token.weight", f"{_DECODER}.obj_score_token.weight", "mask_decoder/obj_score_token", "same"),
    (f"{DECODER}.iou_token.weight", f"{_DECODER}.iou_token.weight", "mask_decoder/iou_token", "same"),
    (f"{DECODER}.mask_tokens.weight", f"{_DECODER}.mask_tokens.weight", "mask_decoder/mask_tokens", "same"),
    (f"{DECODER}.conv_s0", f"{_DECODER}.conv_s0", "mask_decoder/conv_s0", "conv"),
    (f"{DECODER}.conv_s1", f"{_DECODER}.conv_s1", "mask_decoder/conv_s1", "conv"),
    (f"{LAYERS}.{{layer}}", f"{_DECODER}.transformer.layers.{{layer}}", "mask_decoder/transformer/layers_{layer}", "two_way_layer"),
    (f"{DECODER}.transformer.final_attn_token_to_image", f"{_DECODER}.transformer.final_attn_token_to_image", "mask_decoder/transformer/final_attn_token_to_image", "split_attention"),
    (f"{DECODER}.transformer.norm_final_attn", f"{_DECODER}.transformer.layer_norm_final_attn", "mask_decoder/transformer/norm_final_attn", "norm"),
    (f"{DECODER}.output_upscaling.0", f"{_DECODER}.upscale_conv1", "mask_decoder/output_upscaling_0", "upsample"),
    (f"{DECODER}.output_upscaling.1", f"{_DECODER}.upscale_layer_norm", "mask_decoder/output_upscaling_1", "norm"),
    (f"{DECODER}.output_upscaling.3", f"{_DECODER}.upscale_conv2", "mask_decoder/output_upscaling_3", "upsample"),
    (f"{HYPERNETWORKS}.{{layer}}", f"{_DECODER}.output_hypernetworks_mlps.{{layer}}", "mask_decoder/output_hypernetworks_mlps", "ends_mlp"),
    (f"{DECODER}.iou_prediction_head", f"{_DECODER}.iou_prediction_head", "mask_decoder/iou_prediction_head", "ends_mlp"),
    (f"{DECODER}.pred_obj_score_head", f"{_DECODER}.pred_obj_score_head", "mask_decoder/pred_obj_score_head", "ends_mlp"),
)  # fmt: skip
