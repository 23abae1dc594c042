"""The settings of interactive training (`task: clicks`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sam3jax.config.loss import WEIGHT
from sam3jax.config.section import Section


class ClicksConfig(Section):
    """Prompts, rounds of corrections, loss and validation of clicks."""

    objects: int = Field(
        default=8,
        ge=1,
        le=10_000,
        description="Most objects of a picture that a step trains, drawn at random.",
    )
    # The first prompt of an object
    first_point: float = Field(
        default=0.5, ge=0, le=1, description="Share of the objects that start with one point."
    )
    first_box: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="Share of the objects that start with a box. The three shares make 1.",
    )
    first_mask: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of the objects that start with a coarse, damaged mask.",
    )
    box_noise: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="How far a side of a first box moves at most, as a share of its width or height.",
    )
    box_noise_pixels: float = Field(
        default=20.0,
        ge=0,
        le=16384,
        description="How far a side of a first box moves at most, in pixels of the model's picture.",
    )
    # Corrections
    rounds: int = Field(
        default=7, ge=0, le=31, description="Rounds of corrections, each with one more click."
    )
    clicks_from_truth: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of the corrections that lie anywhere on the object, not on an error.",
    )
    mask_only_round: bool = Field(
        default=True,
        description="One round more, at a random place, that adds no click.",
    )
    # Loss
    loss_mask: float = Field(
        default=20.0, ge=0, le=WEIGHT, description="Weight of the pixelwise mask loss."
    )
    loss_dice: float = Field(default=1.0, ge=0, le=WEIGHT, description="Weight of the dice loss.")
    loss_iou: float = Field(
        default=1.0, ge=0, le=WEIGHT, description="Weight of the error of the predicted IoU."
    )
    loss_score: float = Field(
        default=1.0, ge=0, le=WEIGHT, description="Weight of the loss of the object score."
    )
    mask_loss: Literal["focal", "bce"] = Field(
        default="focal", description="The pixelwise mask loss."
    )
    focal_alpha: float = Field(
        default=0.25,
        ge=-1,
        le=1,
        description="Weight of foreground pixels in the focal loss. Negative: none.",
    )
    focal_gamma: float = Field(
        default=2.0,
        ge=0,
        le=10,
        description="How strongly the focal loss forgets pixels that are right.",
    )
    iou_error: Literal["l1", "mse"] = Field(
        default="l1", description="Error of the predicted IoU: absolute or squared."
    )
    iou_of: Literal["all", "best"] = Field(
        default="all",
        description="Masks whose predicted IoU is taught: all of a round, or the best one.",
    )
    mask_resolution: Literal["target", "prediction"] = Field(
        default="target",
        description="Where masks are compared. prediction: a twelfth of the pixels at full size.",
    )
    objects_at_once: int = Field(
        default=8,
        ge=1,
        le=10_000,
        description="Objects whose full-size masks exist at a time, on each device.",
    )
    # Validation
    valid_clicks: int = Field(
        default=5,
        ge=1,
        le=32,
        description="Clicks on an object in validation. NoC counts no further.",
    )

    @model_validator(mode="after")
    def _check(self) -> ClicksConfig:
        shares = self.first_point + self.first_box + self.first_mask
        if abs(shares - 1) > 1e-6:
            raise ValueError(
                f"first_point, first_box and first_mask make {shares:g}: they are shares of all "
                "objects, so let them make 1"
            )
        return self
