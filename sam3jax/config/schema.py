"""The configuration of a run: every setting typed, bounded and documented; unknown keys refused.

The parts that a jitted function needs (model, loss, LoRA) are frozen and hashable and go straight into
it. What a file or a command line says is read in `loading`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sam3jax.config.clicks import ClicksConfig
from sam3jax.config.clips import ClipsConfig
from sam3jax.config.data import DataConfig
from sam3jax.config.learning import EvalConfig, OptimConfig
from sam3jax.config.loss import LossConfig
from sam3jax.config.model import DESTINATIONS, LoraConfig, ModelConfig, SizesFollow
from sam3jax.config.section import BILLION, SEEDS, Place, Section, Text

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
    init: Place | None = Field(
        default=None,
        description="What to start from: a checkpoint (.pt, .safetensors, a folder of transformers or peft), a hub id such "
        "as facebook/sam3, each converted once into a cache; a model folder (made by `sam3jax convert`), a run folder, or "
        "shipped:tiny_shapes. null: random weights.",
    )
    destination: Literal["sam3", "transformers"] | None = Field(
        default=None,
        description="Program that will run the tuned model: the training computes what it computes "
        "(model.geometry_without_boxes and model.clamp_presence), so that answers stay the same there. null: as "
        "where the weights came from.",
    )
    output: Place = Field(default="runs/run", description="Folder of the run.")
    train: Literal["lora", "all"] = Field(
        default="lora",
        description="lora trains the adapters and what `trainable` names; all trains every parameter.",
    )
    base_dtype: Literal["float", "int8"] = Field(
        default="float",
        description="Number format of the kernels that are not trained. float: that of the computation. int8: eight bits "
        "and a scale for each output channel; less memory, and weights rounded to 255 steps.",
    )
    trainable: tuple[Text, ...] = Field(
        default=(),
        strict=False,
        description="Shell patterns of torch parameter names that train beside the adapters.",
    )
    steps: int = Field(
        default=1000,
        ge=1,
        le=BILLION,
        description="Steps of the training. Counted from `epochs` where these are set.",
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="Times that every picture (or video) is shown, in the place of `steps`. null: `steps` says it.",
    )
    patience: int = Field(
        default=0,
        ge=0,
        le=BILLION,
        description="Validations in a row that may be no better than the best one before the run ends. 0: it goes on "
        "to the last step.",
    )
    min_improvement: float = Field(
        default=0.0,
        ge=0,
        le=1e9,
        description="By how much a validation must be better to count, for `patience`; in units of best_metric.",
    )
    batch_size: int = Field(
        default=1,
        ge=1,
        le=1_000_000,
        description="Pictures of one update, over all devices and micro-batches.",
    )
    micro_batch: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] | None = Field(
        default=None,
        description="Pictures that a device holds at once; the gradients of several micro-batches are added up. "
        "null: batch_size divided by the number of devices. auto: as many as fit, found by compiling a few steps (minutes "
        "at full size), and kept by the run; on a CPU as null.",
    )
    shard: bool = Field(
        default=False,
        description="Split weights and optimizer over all devices; each layer is gathered while it runs. Less memory, "
        "more traffic between devices, the same result.",
    )
    cache_trunk: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Views of each picture (clips of each video) whose trunk features are computed once, kept on disk "
        "($SAM3JAX_CACHE) and read back in every step; augmentation draws among these views. For runs that train nothing of the trunk. 0: none.",
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
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=("tensorboard",),
        strict=False,
        description="Where curves and panels go beside metrics.jsonl. wandb and mlflow are packages to install.",
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
    def _start_from_presets(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = dict(TASK_DEFAULTS.get(str(values.get("task", "detect")), {}))
        if switches := DESTINATIONS.get(str(values.get("destination"))):
            own["model"] = switches
        out = dict(values)
        for key, value in own.items():
            given = out.get(key, {} if isinstance(value, dict) else value)
            both = isinstance(value, dict) and isinstance(given, dict)
            out[key] = {**value, **given} if both else given
        return out

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.base_dtype == "int8" and self.train == "all":
            raise ValueError(
                "base_dtype int8 is for weights that are not trained, and train=all trains every one: use train=lora, or "
                "leave base_dtype out"
            )
        if self.loss.weak_loss and self.micro_batch is not None:
            raise ValueError(
                "loss.weak_loss divides by the queries that were matched in the whole batch, which a micro-batch "
                "cannot know: leave micro_batch out"
            )
        return self
