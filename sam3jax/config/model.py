"""The sizes of the detector, the presets to start from, and the adapters added to it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from sam3jax.config.section import Section, Text

WIDTH, LAYERS, PIXELS = 65536, 1024, 16384  # more than any model that could be built


# What each program that may run the model does, whatever the weights were trained with.
DESTINATIONS: dict[str, dict[str, bool]] = {
    "sam3": {"geometry_without_boxes": True, "clamp_presence": False},
    "transformers": {"geometry_without_boxes": False, "clamp_presence": True},
}


class SizesFollow(dict):
    """Settings of a model whose sizes come with its weights.

    A picture size can only be checked against the window of those weights. So the preset is not filled
    in and nothing is checked here: whoever reads the weights validates a ModelConfig of both.
    """


class ModelConfig(Section):
    """Widths, depths and switches of the detector. The defaults are the published SAM 3."""

    preset: Literal["sam3", "tiny"] = Field(
        default="sam3", description="Sizes to start from; the other keys override them."
    )
    image_size: int = Field(
        default=1008,
        ge=1,
        le=PIXELS,
        description="Edge of the square picture that the model sees, in pixels. It must be a multiple of "
        "patch_size times window_size.",
    )
    patch_size: int = Field(
        default=14, ge=1, le=256, description="Edge of a patch, in pixels of that picture."
    )
    pretrain_image_size: int = Field(
        default=336,
        ge=1,
        le=PIXELS,
        description="Picture edge that the absolute positions of the ViT were made for, in pixels.",
    )
    window_size: int = Field(
        default=24, ge=1, le=1024, description="Edge of an attention window, in patches."
    )
    vit_dim: int = Field(default=1024, ge=1, le=WIDTH, description="Width of the ViT.")
    vit_stages: int = Field(
        default=4,
        ge=1,
        le=LAYERS,
        description="Number of ViT stages. A stage is windowed blocks followed by one global block.",
    )
    vit_stage_blocks: int = Field(
        default=8,
        ge=1,
        le=LAYERS,
        description="Blocks of a ViT stage. The last one attends to the whole picture.",
    )
    vit_heads: int = Field(default=16, ge=1, le=1024, description="Attention heads of a ViT block.")
    vit_mlp_ratio: float = Field(
        default=4.625,
        gt=0,
        lt=1000,
        description="Width of the hidden layer of a ViT block, divided by vit_dim.",
    )
    vit_norm_eps: float = Field(
        default=1e-5,
        gt=0,
        le=0.1,
        description="Epsilon of the ViT's layer norms: 1e-5 in sam3, 1e-6 in transformers.",
    )
    text_dim: int = Field(default=1024, ge=1, le=WIDTH, description="Width of the text tower.")
    text_layers: int = Field(default=24, ge=1, le=LAYERS, description="Layers of the text tower.")
    text_heads: int = Field(
        default=16, ge=1, le=1024, description="Attention heads of a text layer."
    )
    vocab_size: int = Field(
        default=49408, ge=2, le=10_000_000, description="Number of different text tokens."
    )
    text_length: int = Field(
        default=32,
        ge=3,
        le=4096,
        description="Tokens of a phrase, the start and end tokens included.",
    )
    dim: int = Field(
        default=256, ge=1, le=WIDTH, description="Width of everything behind the backbone."
    )
    ffn: int = Field(
        default=2048,
        ge=1,
        le=WIDTH,
        description="Width of the hidden layers behind the backbone.",
    )
    heads: int = Field(
        default=8, ge=1, le=1024, description="Attention heads of a layer behind the backbone."
    )
    fusion_layers: int = Field(
        default=6, ge=1, le=LAYERS, description="Layers of the fusion encoder."
    )
    decoder_layers: int = Field(default=6, ge=1, le=LAYERS, description="Layers of the decoder.")
    geometry_layers: int = Field(
        default=3, ge=1, le=LAYERS, description="Layers of the geometry encoder."
    )
    queries: int = Field(
        default=200,
        ge=1,
        le=100_000,
        description="One-to-one queries of a prompt. Training adds as many one-to-many ones.",
    )
    mask_decoder_heads: int = Field(
        default=8, ge=1, le=1024, description="Attention heads of the mask decoder (clicks)."
    )
    mask_decoder_ffn: int = Field(
        default=2048, ge=1, le=1_000_000, description="Hidden width of the mask decoder's blocks."
    )
    mask_decoder_iou_hidden: int = Field(
        default=256,
        ge=1,
        le=1_000_000,
        description="Hidden width of the head that predicts a mask's IoU.",
    )
    mask_prompt_channels: int = Field(
        default=16,
        ge=4,
        le=1_000_000,
        multiple_of=4,
        description="Channels on the way from a mask prompt to features.",
    )
    dropout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of activations dropped in fusion encoder, decoder, geometry encoder and scorer, in "
        "training only.",
    )
    drop_path: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Probability of skipping the last ViT block, in training only. It rises from 0 at the "
        "first block.",
    )
    geometry_without_boxes: bool = Field(
        default=True,
        description="Run the geometry encoder (its class token) also where a prompt has no box. transformers "
        "does not.",
    )
    clamp_presence: bool = Field(
        default=False, description="Clamp presence logits to -10..10, as transformers does."
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Number format of the computation. Weights stay float32.",
    )
    remat: bool | Literal["products"] = Field(
        default=True,
        description="Compute the inner values of a layer again in the backward pass: far less memory, a third "
        "more computation. products: but keep what linear layers and convolutions returned. "
        "false: keep everything, which suits small models.",
    )
    fused_attention: bool = Field(
        default=False,
        description="Compute the trunk's attention with cuDNN's fused kernel: NVIDIA cards from Ampere on, in bfloat16; "
        "elsewhere it changes nothing. It has not run on a card so far: `scripts/accelerator.py` compares it there.",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, values: Any, handler: ModelWrapValidatorHandler[ModelConfig]) -> ModelConfig:
        if isinstance(values, SizesFollow):
            return handler(dict(values))
        if isinstance(values, dict):
            preset = values.get("preset", "sam3")
            values = {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **values}
        return handler(values).checked()

    def checked(self) -> ModelConfig:
        """This config, if its sizes fit each other. Raises ValueError."""
        step = self.patch_size * self.window_size
        if self.image_size % step:
            raise ValueError(
                f"image_size {self.image_size} does not divide into windows of {self.window_size} patches of "
                f"{self.patch_size} px: use a multiple of {step}"
            )
        if self.pretrain_image_size % self.patch_size:
            raise ValueError(
                f"pretrain_image_size {self.pretrain_image_size} does not divide into patches: use a "
                f"multiple of patch_size {self.patch_size}"
            )
        for width, heads in (
            ("vit_dim", "vit_heads"),
            ("text_dim", "text_heads"),
            ("dim", "heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}"
                )
        if (self.vit_dim // self.vit_heads) % 4:
            raise ValueError(
                f"head width {self.vit_dim // self.vit_heads} of the ViT must be a multiple of 4 (2-d RoPE)"
            )
        return self

    @property
    def grid(self) -> int:
        """Patches along an edge of the picture."""
        return self.image_size // self.patch_size


PRESETS: dict[str, dict[str, Any]] = {
    "sam3": {},
    "tiny": dict(
        image_size=168, pretrain_image_size=84, window_size=6, vit_dim=96, vit_stages=2, vit_stage_blocks=3, vit_heads=4,
        vit_mlp_ratio=4.0, text_dim=64, text_layers=2, text_heads=4, vocab_size=1024, text_length=16, dim=64, ffn=256, heads=4,
        fusion_layers=2, decoder_layers=3, geometry_layers=1, queries=20, mask_decoder_heads=4, mask_decoder_ffn=256,
        mask_decoder_iou_hidden=64, dropout=0.0, drop_path=0.0,
    ),
}  # fmt: skip


class LoraConfig(Section):
    """Which linear layers get a low-rank adapter. Patterns match torch layer names, layer by layer."""

    enabled: bool = Field(default=True, description="Add adapters, where `train` is lora.")
    rank: int = Field(default=16, ge=1, le=WIDTH, description="Inner width of an adapter.")
    alpha: float = Field(
        default=32.0,
        gt=0,
        le=1e6,
        description="The output of an adapter is multiplied by alpha / rank.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of an adapter's input that is dropped, in training only.",
    )
    targets: tuple[Text, ...] = Field(
        default=(
            "backbone.vision_backbone.trunk.blocks.*.attn.*",
            "backbone.vision_backbone.trunk.blocks.*.mlp.*",
            "transformer.encoder.layers.*",
            "transformer.decoder.layers.*",
        ),
        strict=False,
        description="Shell patterns of torch layer names that get an adapter. Each must match at least one "
        "linear layer.",
    )
