"""The sections `optim` and `evaluation`: how a run learns, and how it is judged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sam3jax.config.section import BILLION, Section


class OptimConfig(Section):
    """AdamW with warm-up, decay and clipping."""

    learning_rate: float = Field(
        default=1e-4, gt=0, le=10, description="Learning rate after the warm-up."
    )
    vision_scale: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Learning rate of the vision backbone, as a multiple of learning_rate.",
    )
    text_scale: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Learning rate of the text tower, as a multiple of learning_rate.",
    )
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor of the learning rate from one ViT block to the one before it.",
    )
    weight_decay: float = Field(
        default=0.1,
        ge=0,
        le=100,
        description="Decoupled weight decay. Biases, norms and biases of adapters have none.",
    )
    beta1: float = Field(
        default=0.9, ge=0, lt=1, description="Decay of Adam's mean of the gradients."
    )
    beta2: float = Field(
        default=0.999, ge=0, lt=1, description="Decay of Adam's mean of the squared gradients."
    )
    warmup_steps: int = Field(
        default=20,
        ge=0,
        le=BILLION,
        description="Steps in which the learning rate rises from 0.",
    )
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = Field(
        default="cosine", description="Course of the learning rate after the warm-up."
    )
    timescale: int = Field(
        default=20,
        ge=1,
        le=BILLION,
        description="Steps after which inverse_sqrt begins to fall.",
    )
    cooldown_steps: int = Field(
        default=0,
        ge=0,
        le=BILLION,
        description="Last steps, in which the learning rate falls linearly to 0.",
    )
    clip_norm: float = Field(
        default=0.1,
        gt=0,
        le=1e9,
        description="Largest norm of the gradient; a larger one is scaled down.",
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay of the averaged weights that evaluation uses. 0: no average.",
    )


class EvalConfig(Section):
    """How predictions are made and counted, in validation, evaluate and predict alike."""

    batch_size: int = Field(
        default=2, ge=1, le=100_000, description="Pictures that a device looks at at once."
    )
    threshold: float = Field(
        default=0.5, ge=0, le=1, description="Score from which a detection is shown."
    )
    max_detections: int = Field(
        default=100,
        ge=1,
        le=100_000,
        description="Most detections of a picture and phrase. Evaluation keeps more where the data have more.",
    )
    score_floor: float = Field(
        default=1e-3,
        ge=0,
        lt=1,
        description="Smallest score that average precision looks at. Weaker detections are not stored.",
    )
    mask_threshold: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Probability from which a pixel belongs to a mask.",
    )
    nms: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="IoU of masks above which the weaker of two detections is dropped. null: drop none.",
    )
    shown_nms: float | None = Field(
        default=0.5,
        ge=0,
        le=1,
        description="IoU of masks above which the weaker of two finds of a phrase is not shown, in predict, panels and "
        "reports. Metrics look at all. null: show all.",
    )
    interactive_steps: int = Field(
        default=0,
        ge=0,
        le=20,
        description="Rounds of correction: each wrong answer is shown one more box, around what it missed or found "
        "in vain, and asked again; metrics exemplars_1/... and on. 0: none.",
    )
    batches: int | None = Field(
        default=None,
        ge=1,
        le=BILLION,
        description="Most batches of a validation during training. null: all.",
    )
    panels: int = Field(
        default=4, ge=0, le=100_000, description="Pictures drawn at each validation."
    )
