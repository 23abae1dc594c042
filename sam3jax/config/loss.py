"""The settings of the training loss."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from sam3jax.config.section import BILLION, Section

WEIGHT = 1e6  # largest weight of a term


class LossConfig(Section):
    """The published training loss under its published names (sam3.train.loss)."""

    preset: Literal["segmentation", "published_boxes"] = Field(
        default="segmentation",
        description="segmentation trains with masks; published_boxes is the loss of the published "
        "training file, without masks.",
    )
    # Matcher
    cost_class: float = Field(
        default=2.0,
        ge=0,
        le=WEIGHT,
        description="Matching: weight of the classification cost.",
    )
    cost_bbox: float = Field(
        default=5.0,
        ge=0,
        le=WEIGHT,
        description="Matching: weight of the L1 distance of boxes.",
    )
    cost_giou: float = Field(
        default=2.0,
        ge=0,
        le=WEIGHT,
        description="Matching: weight of the generalised IoU of boxes.",
    )
    cost_alpha: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Matching: share of the focal cost that positives get.",
    )
    cost_gamma: float = Field(
        default=2.0,
        ge=0,
        le=100,
        description="Matching: exponent of the focal cost.",
    )
    o2m_alpha: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="One-to-many matching: a query scores alpha * probability + (1 - alpha) * IoU.",
    )
    o2m_threshold: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="One-to-many matching: smallest score of a match.",
    )
    o2m_topk: int = Field(
        default=4,
        ge=1,
        le=100_000,
        description="One-to-many matching: most queries of a target.",
    )
    # Boxes
    loss_bbox: float = Field(
        default=5.0,
        ge=0,
        le=WEIGHT,
        description="Weight of the L1 box loss.",
    )
    loss_giou: float = Field(
        default=2.0,
        ge=0,
        le=WEIGHT,
        description="Weight of the generalised IoU loss of boxes.",
    )
    # IABCEMdetr
    loss_ce: float = Field(
        default=20.0,
        ge=0,
        le=WEIGHT,
        description="Weight of the classification loss.",
    )
    presence_loss: float = Field(
        default=20.0,
        ge=0,
        le=WEIGHT,
        description="Weight of the loss of the presence token.",
    )
    alpha: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Classification: the target of a match is probability^alpha * IoU^(1 - alpha).",
    )
    gamma: float = Field(
        default=2.0,
        ge=0,
        le=100,
        description="Classification: exponent that plays down easy negatives.",
    )
    pos_weight: float = Field(
        default=10.0,
        ge=0,
        le=WEIGHT,
        description="Classification: weight of positives.",
    )
    pos_focal: bool = Field(
        default=False, description="Classification: focal loss for positives too."
    )
    weak_loss: bool = Field(
        default=False,
        description="Classification: no negatives from prompts that are not annotated exhaustively. "
        "pad_n_queries is ignored then.",
    )
    pad_n_queries: int | None = Field(
        default=200,
        ge=1,
        le=100_000,
        description="Classification: divide as if there were at least so many queries. null: the real number.",
    )
    pad_scale_pos: float = Field(
        default=1.0,
        ge=0,
        le=WEIGHT,
        description="Classification: weight of positives where there are fewer queries than pad_n_queries.",
    )
    use_presence: bool = Field(
        default=True,
        description="Train the presence token; classification then counts only prompts with a target.",
    )
    presence_alpha: float = Field(
        default=0.5,
        ge=-1,
        le=1,
        description="Presence: share of the focal loss that positives get; below 0: no weighting.",
    )
    presence_gamma: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Presence: exponent of the focal loss.",
    )
    # Masks
    masks: bool = Field(default=True, description="Train masks.")
    loss_mask: float = Field(
        default=200.0,
        ge=0,
        le=WEIGHT,
        description="Weight of the focal loss of masks.",
    )
    loss_dice: float = Field(
        default=10.0,
        ge=0,
        le=WEIGHT,
        description="Weight of the Dice loss of masks.",
    )
    focal_alpha: float = Field(
        default=0.25,
        ge=-1,
        le=1,
        description="Masks: share of the focal loss that positives get; below 0: no weighting.",
    )
    focal_gamma: float = Field(
        default=2.0,
        ge=0,
        le=100,
        description="Masks: exponent of the focal loss.",
    )
    mask_resolution: Literal["target", "prediction"] = Field(
        default="target",
        description="Where masks are compared. target: at the pixels of the target; prediction: targets are "
        "sampled at the centres of the predicted pixels, a twelfth of the pixels at full size.",
    )
    num_sample_points: int | None = Field(
        default=None,
        ge=1,
        le=BILLION,
        description="Compare masks at this many sampled uncertain points. null: at every pixel.",
    )
    oversample_ratio: float = Field(
        default=3.0,
        ge=1,
        le=1000,
        description="Sampled points: candidates drawn for each point.",
    )
    importance_sample_ratio: float = Field(
        default=0.75,
        ge=0,
        le=1,
        description="Sampled points: share of points taken where the prediction is least certain.",
    )
    mask_pairs: int | None = Field(
        default=None,
        ge=1,
        le=BILLION,
        description="Most masks compared per device and step, one-to-one matches first; the rest is counted in "
        "mask_pairs_dropped. null: every match.",
    )
    mask_chunk: int = Field(
        default=8,
        ge=1,
        le=100_000,
        description="Masks drawn at a time. Fewer need less memory.",
    )
    # SemanticSegCriterion
    semantic: bool = Field(
        default=False, description="Train the semantic map of a prompt: the union of its masks."
    )
    loss_semantic_seg: float = Field(
        default=20.0,
        ge=0,
        le=WEIGHT,
        description="Weight of the pixelwise loss of semantic maps.",
    )
    loss_semantic_dice: float = Field(
        default=30.0,
        ge=0,
        le=WEIGHT,
        description="Weight of the Dice loss of semantic maps.",
    )
    semantic_focal: bool = Field(
        default=True,
        description="Semantic maps: focal loss instead of cross-entropy.",
    )
    semantic_focal_alpha: float = Field(
        default=0.6,
        ge=-1,
        le=1,
        description="Semantic maps: share of the focal loss that positives get; below 0: no weighting.",
    )
    semantic_focal_gamma: float = Field(
        default=2.0,
        ge=0,
        le=100,
        description="Semantic maps: exponent of the focal loss.",
    )
    semantic_downsample: bool = Field(
        default=True,
        description="Semantic maps: shrink the target to the prediction, instead of enlarging the prediction.",
    )
    semantic_positive_only: bool = Field(
        default=True,
        description="Semantic maps: average over the prompts that have a target (presence_head).",
    )
    # Sam3LossWrapper
    aux: bool = Field(default=True, description="Supervise every decoder layer, not only the last.")
    o2m: bool = Field(default=True, description="Train the one-to-many queries.")
    o2m_weight: float = Field(
        default=2.0,
        ge=0,
        le=WEIGHT,
        description="Weight of all one-to-many terms.",
    )
    use_o2m_matcher_on_o2m_aux: bool = Field(
        default=False,
        description="Match the one-to-many queries one-to-many in every decoder layer, not only in the last.",
    )
    normalization: Literal["global", "local", "none"] = Field(
        default="global",
        description="What box and mask losses are divided by: targets of the whole batch, of this device, or 1.",
    )
    normalize_by_valid_object_num: bool = Field(
        default=False, description="Count only targets whose box has an area."
    )
    normalize_by_stage_num: bool = Field(
        default=False, description="Divide the loss of clips by their number of frames."
    )
    scale_by_find_batch_size: bool = Field(
        default=True,
        description="Multiply the loss by the square root of the number of prompts.",
    )

    @property
    def reads_masks(self) -> bool:
        """Whether any term compares with the targets' masks."""
        return self.masks or self.semantic

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "published_boxes":
            return {"masks": False, **values}
        return values
