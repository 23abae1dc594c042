"""The settings of training on clips of videos (`task: clips`)."""

from __future__ import annotations

from pydantic import Field, model_validator

from sam3jax.config.section import Section


class ClipsConfig(Section):
    """How clips are cut from videos, and how many frames are worked on at once."""

    frames: int = Field(default=4, ge=1, le=10_000, description="Frames of a clip.")
    min_stride: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="Smallest step from one frame of a clip to the next, in annotated frames; smaller in short videos.",
    )
    max_stride: int = Field(
        default=5,
        ge=1,
        le=10_000,
        description="Largest step from one frame of a clip to the next, in annotated frames; drawn from min_stride up.",
    )
    reverse: float = Field(
        default=0.5, ge=0, le=1, description="Share of the clips that run backwards."
    )
    motion: float = Field(
        default=0.15,
        ge=0,
        le=0.9,
        description="How far the crop of a video of one frame moves over a clip, as a share of its edges.",
    )
    max_objects: int = Field(
        default=300,
        ge=1,
        le=100_000,
        description="Most objects of a clip. Phrases of objects left out count as partly annotated.",
    )
    frames_at_once: int = Field(
        default=1,
        ge=1,
        le=1_000_000,
        description="Most frames whose activations a device holds in training; the others are computed "
        "again for the gradient. More is faster where memory allows.",
    )
    generated_frames: int = Field(
        default=12, ge=1, le=1000, description="Frames of a video where data.train is shapes."
    )

    @model_validator(mode="after")
    def _strides(self) -> ClipsConfig:
        if self.min_stride > self.max_stride:
            raise ValueError(
                f"min_stride ({self.min_stride}) is above max_stride ({self.max_stride})"
            )
        return self
