"""The configuration of a run: every setting typed, bounded and documented; unknown keys refused.

The parts that a jitted function needs (model, loss, LoRA) are frozen and hashable and go straight into
it. What a file or a command line says is read in `loading`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sam3jax.config.clicks import ClicksConfig
from sam3jax.config.clips import ClipsConfig
from sam3jax.config.loss import LossConfig
from sam3jax.config.model import LoraConfig, ModelConfig, SizesFollow
from sam3jax.config.section import BILLION, SEEDS, Section, Text

STANDARD_AUGMENTATION: dict[str, Any] = dict(
    flip=True, crop=0.7, brightness=0.2, contrast=0.2, colour=0.2, grey=0.05, blur=1.0, noise=6.0
)  # what data.augment=standard means


class DataConfig(Section):
    """Where the pictures are and what is asked of them."""

    train: Text | None = Field(
        default=None,
        description="Folder with pictures and COCO JSON, or `shapes` or `xrays` for generated pictures.",
    )
    valid: Text | None = Field(
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
    batches: int | None = Field(
        default=None,
        ge=1,
        le=BILLION,
        description="Most batches of a validation during training. null: all.",
    )
    panels: int = Field(
        default=4, ge=0, le=100_000, description="Pictures drawn at each validation."
    )


# What a task sets where the user does not.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "clicks": {
        # The heads are small: they are trained themselves, and the detector beside them stays as it is.
        "trainable": ("backbone.vision_backbone.sam2_convs.*", "tracker.*"),
        "lora": {
            "enabled": False,
            "targets": (
                "backbone.vision_backbone.trunk.blocks.*.attn.*",
                "backbone.vision_backbone.trunk.blocks.*.mlp.*",
                "tracker.sam_mask_decoder.transformer.*",
            ),
        },
    },
}


class Config(Section):
    """A whole run."""

    task: Literal["detect", "clips", "clicks"] = Field(
        default="detect",
        description="What is trained. detect: find every instance of a phrase; clips: the same on several "
        "frames of a video; clicks: masks from points, boxes and masks, corrected click by click.",
    )
    model: ModelConfig = Field(
        default=ModelConfig(), description="Widths, depths and switches of the detector."
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="Low-rank adapters.")
    loss: LossConfig = Field(default=LossConfig(), description="The training loss.")
    data: DataConfig = Field(
        default=DataConfig(), description="Where the pictures are and what is asked of them."
    )
    clips: ClipsConfig = Field(
        default=ClipsConfig(), description="Training on clips of videos, where task is clips."
    )
    clicks: ClicksConfig = Field(
        default=ClicksConfig(), description="Interactive training, where task is clicks."
    )
    optim: OptimConfig = Field(default=OptimConfig(), description="The optimizer.")
    evaluation: EvalConfig = Field(
        default=EvalConfig(), description="How predictions are made and counted."
    )
    init: Text | None = Field(
        default=None,
        description="What to start from: a model folder (made by `sam3jax convert`), a run folder, or "
        "shipped:tiny_shapes. null: random weights.",
    )
    output: Text = Field(default="runs/run", description="Folder of the run.")
    train: Literal["lora", "all"] = Field(
        default="lora",
        description="lora trains the adapters and what `trainable` names; all trains every parameter.",
    )
    trainable: tuple[Text, ...] = Field(
        default=(),
        strict=False,
        description="Shell patterns of torch parameter names that train beside the adapters.",
    )
    steps: int = Field(default=1000, ge=1, le=BILLION, description="Steps of the training.")
    batch_size: int = Field(
        default=1,
        ge=1,
        le=1_000_000,
        description="Pictures of one update, over all devices and micro-batches.",
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Pictures that a device holds at once; the gradients of several micro-batches are added up. "
        "null: batch_size divided by the number of devices.",
    )
    seed: int = Field(
        default=0, ge=0, le=SEEDS, description="Seed of weights, shuffling and augmentation."
    )
    eval_every: int = Field(
        default=200,
        ge=0,
        le=BILLION,
        description="Steps from one validation to the next. 0: only at the end.",
    )
    save_every: int = Field(
        default=200, ge=1, le=BILLION, description="Steps from one checkpoint to the next."
    )
    save_minutes: float = Field(
        default=15,
        gt=0,
        le=100_000,
        description="Minutes after which a step is saved in any case, where save_every takes longer.",
    )
    log_every: int = Field(
        default=10, ge=1, le=BILLION, description="Steps from one line of the log to the next."
    )
    draw_batches: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="First training batches that are drawn into batches/, as the model sees them. 0: none.",
    )
    keep: int = Field(
        default=2, ge=1, le=1_000_000, description="Newest checkpoints kept, beside the best one."
    )
    best_metric: Text | None = Field(
        default=None,
        description="Metric of the validation that chooses the best checkpoint. null: the task's own, for "
        "detection segm/AP, or bbox/AP where no mask is annotated.",
    )
    max_skipped: int = Field(
        default=20,
        ge=1,
        le=BILLION,
        description="Steps in a row whose loss or gradient may be not finite before the run ends.",
    )
    resume: Literal["true", "false", "force"] = Field(
        default="true",
        description="true: continue from the newest checkpoint of the run folder. false: refuse a folder that holds "
        "a run. force: continue although the data have changed.",
    )
    id: Text | None = Field(
        default=None,
        description="Identity of the run, by which it knows its checkpoints. Set by the trainer.",
    )

    @field_validator("resume", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        word = str(value).lower()
        return {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(word, word)

    @model_validator(mode="before")
    @classmethod
    def _sizes_come_with_the_weights(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("init") is not None:
            model = values.get("model")
            if isinstance(model, dict):
                return {**values, "model": SizesFollow(model)}
        return values

    @model_validator(mode="before")
    @classmethod
    def _start_from_task(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = TASK_DEFAULTS.get(str(values.get("task", "detect")), {})
        out = dict(values)
        for key, value in own.items():
            given = out.get(key, {} if isinstance(value, dict) else value)
            both = isinstance(value, dict) and isinstance(given, dict)
            out[key] = {**value, **given} if both else given
        return out

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.loss.weak_loss and self.micro_batch is not None:
            raise ValueError(
                "loss.weak_loss divides by the queries that were matched in the whole batch, which a micro-batch "
                "cannot know: leave micro_batch out"
            )
        return self
