"""The section `data`: where the pictures are, what is asked of them, how they are changed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from sam3jax.config.section import BILLION, SEEDS, Place, Section, Text

STANDARD_AUGMENTATION: dict[str, Any] = dict(
    flip=True, crop=0.7, brightness=0.2, contrast=0.2, colour=0.2, grey=0.05, blur=1.0, noise=6.0
)  # what data.augment=standard means


class DataConfig(Section):
    """Where the pictures are and what is asked of them."""

    train: Place | None = Field(
        default=None,
        description="Folder with pictures and COCO JSON, or `shapes` or `xrays` for generated pictures.",
    )
    valid: Place | None = Field(
        default=None,
        description="The same for validation. null: the folder's own valid split, if it has one.",
    )
    train_split: Text = Field(
        default="train", description="Split of the COCO folder to train on (Roboflow or classic)."
    )
    valid_split: Text = Field(
        default="valid", description="Split of the COCO folder to validate on."
    )
    allow_outside: bool = Field(
        default=False,
        description="Read pictures that names or links of the data lead to outside its folder.",
    )
    window: tuple[float, float] | None = Field(
        default=None,
        strict=False,
        description="Values that become black and white, in pictures of more than eight bits. null: what each "
        "picture holds.",
    )
    slices: Literal[1, 3] = Field(
        default=1,
        description="3: a slice and its two neighbours (of a stack, or by the number in the file name) are the "
        "three channels.",
    )
    max_megapixels: float = Field(
        default=150,
        gt=0,
        le=178,
        description="Larger pictures are refused before they fill the memory.",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        le=BILLION,
        description="Use only so many pictures of each split, the first ones. null: all.",
    )
    phrases: dict[Text, Text] = Field(
        default={},
        description="Phrase to ask instead of a category name, for names like GlassBottle_Close.",
    )
    allow_missing_masks: bool = Field(
        default=False,
        description="Train masks although a category has boxes only. Its boxes still train.",
    )
    max_prompts: int = Field(
        default=4,
        ge=1,
        le=100_000,
        description="Most prompts of a picture, negatives included.",
    )
    positives: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Most present categories asked of a picture; they take turns over the epochs. null: as many "
        "as max_prompts has room for.",
    )
    negatives: int = Field(
        default=1,
        ge=0,
        le=100_000,
        description="Absent categories asked of a picture, where there is room.",
    )
    negative_phrases: tuple[Text, ...] = Field(
        default=(),
        strict=False,
        description="Further phrases to ask as negatives: things that are in no training picture.",
    )
    max_targets: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Most targets of a prompt. null: the most that the data has.",
    )
    exemplars: int = Field(
        default=0, ge=0, le=10_000, description="Most example boxes of a prompt."
    )
    exemplar_probability: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the questions that show example boxes beside their phrase, where exemplars > 0.",
    )
    visual_probability: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Probability that a prompt is asked by example boxes alone (its phrase is `visual`).",
    )
    flip: bool = Field(
        default=False, description="Mirror half of the training pictures left to right."
    )
    turn: bool = Field(
        default=False, description="Turn training pictures by 0, 90, 180 or 270 degrees."
    )
    crop: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Smallest share of each edge that a random crop keeps. 1: no crop.",
    )
    min_size: int | None = Field(
        default=None,
        ge=1,
        le=16384,
        description="Smallest random edge of a training picture, in pixels; the rest is padded. null: no random "
        "size.",
    )
    repeat_threshold: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Pictures of a category that is in a smaller share of all pictures are shown more often, by "
        "the square root of the ratio (repeat factor sampling of LVIS). 0: off.",
    )
    augment: Literal["off", "standard"] = Field(
        default="off",
        description="standard: flip, crop and moderate colour, grey, blur and noise; other keys override it.",
    )
    brightness: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Training pictures are made brighter or darker by a factor of 1 - this to 1 + this.",
    )
    contrast: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="The same for the contrast around the picture's mean.",
    )
    colour: float = Field(
        default=0.0, ge=0, le=1, description="The same for the strength of colours."
    )
    grey: float = Field(
        default=0.0, ge=0, le=1, description="Share of training pictures without colour."
    )
    blur: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Largest Gaussian radius, in pixels of the model's picture; a quarter of the pictures.",
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Largest standard deviation of noise, of 255 grey levels; a quarter of the pictures.",
    )
    workers: int = Field(
        default=0, ge=0, le=256, description="Loader processes. 0: load in the main process."
    )
    shapes_concepts: Literal["basic", "seen", "combinations", "new", "new_with_old", "all"] = Field(
        default="basic", description="Concepts of the generated pictures (sam3jax/data/shapes.py)."
    )
    shapes_size: int = Field(
        default=256,
        ge=64,
        le=4096,
        description="Longer edge of a generated picture, in pixels.",
    )
    shapes_seed: int = Field(
        default=0, ge=0, le=SEEDS, description="Seed of the generated pictures."
    )
    shapes_train: int = Field(
        default=2000, ge=1, le=10_000_000, description="Generated training pictures."
    )
    shapes_valid: int = Field(
        default=100, ge=1, le=10_000_000, description="Generated validation pictures."
    )

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("augment") == "standard":
            return {**STANDARD_AUGMENTATION, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(
                f"window {list(self.window)}: the first value, for black, must be below the second"
            )
        if self.visual_probability and not self.exemplars:
            raise ValueError(
                "visual_probability asks with boxes, but exemplars is 0: set data.exemplars=1 or more"
            )
        return self
