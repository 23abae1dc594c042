"""The configuration: every setting of a run, typed, documented field by field, unknown keys refused.

A run is described by one YAML file plus `key=value` on the command line (`load_config`). The parts
that a jitted function needs (model, loss, LoRA) are frozen and hashable and go straight into it.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A setting is wrong; the message names it, says what was expected and what to do."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelConfig(_Section):
    """Widths, depths and switches of the detector. The defaults are the published SAM 3."""

    preset: Literal["sam3", "tiny"] = Field(
        "sam3", description="sizes to start from; other keys override it"
    )
    image_size: int = Field(1008, description="edge of the square picture the model sees, pixels")
    patch_size: int = 14
    pretrain_image_size: int = Field(
        336, description="picture edge of the absolute positions, pixels"
    )
    window_size: int = Field(24, description="edge of an attention window, patches")
    vit_dim: int = 1024
    vit_stages: int = Field(
        4, description="each stage is windowed blocks followed by one global block"
    )
    vit_stage_blocks: int = Field(8, description="blocks per stage, the last one attends globally")
    vit_heads: int = 16
    vit_mlp_ratio: float = 4.625
    vit_norm_eps: float = Field(1e-5, description="1e-5 in sam3, 1e-6 in transformers")
    text_dim: int = 1024
    text_layers: int = 24
    text_heads: int = 16
    vocab_size: int = 49408
    text_length: int = Field(32, description="tokens of a phrase, start and end included")
    dim: int = Field(256, description="width of everything behind the backbone")
    ffn: int = 2048
    heads: int = 8
    fusion_layers: int = 6
    decoder_layers: int = 6
    geometry_layers: int = 3
    queries: int = Field(
        200, description="one-to-one queries; training adds as many one-to-many ones"
    )
    mask_decoder_heads: int = Field(
        8, ge=1, description="attention heads of the mask decoder (clicks)"
    )
    mask_decoder_ffn: int = Field(
        2048, ge=1, description="hidden width of the mask decoder's blocks"
    )
    mask_decoder_iou_hidden: int = Field(
        256, ge=1, description="hidden width of the head that predicts a mask's IoU"
    )
    mask_prompt_channels: int = Field(
        16, ge=4, multiple_of=4, description="channels on the way from a mask prompt to features"
    )
    dropout: float = Field(
        0.1, description="in fusion, decoder, geometry and scorer; training only"
    )
    drop_path: float = Field(
        0.1, description="stochastic depth of the last ViT block, rising from 0"
    )
    geometry_without_boxes: bool = Field(
        True,
        description="run the geometry encoder (class token) also when a prompt has no box; transformers does not",
    )
    clamp_presence: bool = Field(
        False, description="clamp presence logits to +-10, as transformers does"
    )
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        return (
            {**PRESETS.get(values.get("preset", "sam3"), {}), **values}
            if isinstance(values, dict)
            else values
        )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.image_size % (self.patch_size * self.window_size):
            step = self.patch_size * self.window_size
            raise ValueError(
                f"image_size {self.image_size} does not divide into windows of {self.window_size} patches of "
                f"{self.patch_size} px: use a multiple of {step}"
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
        mask_decoder_heads=4, mask_decoder_ffn=256, mask_decoder_iou_hidden=64, fusion_layers=2, decoder_layers=3, geometry_layers=1, queries=20, dropout=0.0, drop_path=0.0,
    ),
}  # fmt: skip


class LoraConfig(_Section):
    """Which linear layers get a low-rank adapter. Patterns match torch layer names, layer by layer."""

    enabled: bool = True
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, description="the adapter's output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input, training only")
    targets: tuple[str, ...] = Field(
        (
            "backbone.vision_backbone.trunk.blocks.*.attn.*",
            "backbone.vision_backbone.trunk.blocks.*.mlp.*",
            "transformer.encoder.layers.*",
            "transformer.decoder.layers.*",
        ),
        description="shell patterns over per-layer torch names; each must match at least one linear layer",
    )


class LossConfig(_Section):
    """The published training loss under its published names (sam3.train.loss)."""

    preset: Literal["segmentation", "published_boxes"] = Field(
        "segmentation",
        description="segmentation: with masks; published_boxes: the active published file",
    )
    # Matcher
    cost_class: float = 2.0
    cost_bbox: float = 5.0
    cost_giou: float = 2.0
    cost_alpha: float = 0.25
    cost_gamma: float = 2.0
    o2m_alpha: float = Field(0.3, description="one-to-many score: alpha * p + (1 - alpha) * IoU")
    o2m_threshold: float = 0.4
    o2m_topk: int = 4
    # Boxes
    loss_bbox: float = Field(5.0, description="weight of the L1 box loss")
    loss_giou: float = 2.0
    # IABCEMdetr
    loss_ce: float = Field(20.0, description="weight of the classification loss")
    presence_loss: float = 20.0
    alpha: float = 0.25
    gamma: float = 2.0
    pos_weight: float = 10.0
    pos_focal: bool = False
    weak_loss: bool = Field(
        False, description="no negatives from non-exhaustive prompts; ignores pad_n_queries"
    )
    pad_n_queries: int | None = 200
    pad_scale_pos: float = 1.0
    use_presence: bool = True
    presence_alpha: float = 0.5
    presence_gamma: float = 0.0
    # Masks
    masks: bool = True
    loss_mask: float = 200.0
    loss_dice: float = 10.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    mask_resolution: Literal["target", "prediction"] = Field(
        "target",
        description="where masks are compared; prediction: targets are sampled at the centres of the "
        "predicted pixels, a twelfth of the pixels at full size",
    )
    num_sample_points: int | None = Field(
        None, description="compare masks at sampled uncertain points instead"
    )
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    mask_pairs: int | None = Field(
        None,
        description="masks compared per device and step at most, one-to-one first, the rest counted in "
        "mask_pairs_dropped; None: every matched pair",
    )
    mask_chunk: int = Field(8, ge=1, description="masks drawn at a time")
    # SemanticSegCriterion
    semantic: bool = False
    loss_semantic_seg: float = 20.0
    loss_semantic_dice: float = 30.0
    semantic_focal: bool = True
    semantic_focal_alpha: float = 0.6
    semantic_focal_gamma: float = 2.0
    semantic_downsample: bool = True
    semantic_positive_only: bool = Field(
        True, description="average over prompts with a target (presence_head)"
    )
    # Sam3LossWrapper
    aux: bool = Field(True, description="supervise every decoder layer, not only the last")
    o2m: bool = True
    o2m_weight: float = 2.0
    use_o2m_matcher_on_o2m_aux: bool = False
    normalization: Literal["global", "local", "none"] = Field(
        "global",
        description="N of box and mask losses: targets of the global batch, of this device, or 1",
    )
    normalize_by_valid_object_num: bool = False
    normalize_by_stage_num: bool = Field(
        False, description="divide the loss of clips by their number of frames"
    )
    scale_by_find_batch_size: bool = Field(
        True, description="times the square root of the number of prompts"
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


STANDARD_AUGMENTATION: dict[str, Any] = dict(
    flip=True, crop=0.7, brightness=0.2, contrast=0.2, colour=0.2, grey=0.05, blur=1.0, noise=6.0
)  # what data.augment=standard means


class DataConfig(_Section):
    """Where the pictures are and what is asked of them."""

    train: str | None = Field(
        None, description="folder with pictures and COCO JSON, or 'shapes' for generated data"
    )
    valid: str | None = Field(
        None, description="the same for validation; None: the folder's own valid split, if any"
    )
    train_split: str = Field("train", description="split of a Roboflow or classic COCO folder")
    valid_split: str = Field("valid", description="the same for validation")
    allow_outside: bool = Field(
        False,
        description="read pictures that names or links of the data lead to outside its folder",
    )
    window: tuple[float, float] | None = Field(
        None,
        description="values that become black and white in pictures of more than eight bits; None: "
        "what each picture holds",
    )
    slices: Literal[1, 3] = Field(
        1,
        description="3: a slice and its two neighbours (of a stack, or by the number in the file name) "
        "are the three channels",
    )
    max_megapixels: float = Field(
        150, gt=0, le=178, description="larger pictures are refused before they fill the memory"
    )
    limit: int | None = Field(
        None, ge=1, description="use only the first pictures of each split, to see whether they fit"
    )
    phrases: dict[str, str] = Field(
        {}, description="category name -> what to ask instead, for names like GlassBottle_Close"
    )
    allow_missing_masks: bool = Field(
        False, description="train masks though a category has boxes only (its boxes still train)"
    )
    max_prompts: int = Field(4, ge=1, description="prompts per picture, negatives included")
    positives: int | None = Field(
        None,
        ge=1,
        description="present categories asked per picture at most, taking turns over the epochs; None: "
        "as many as max_prompts has room for",
    )
    negatives: int = Field(
        1, ge=0, description="absent categories asked per picture, where there is room"
    )
    negative_phrases: tuple[str, ...] = Field(
        (),
        description="further phrases to ask as negatives: things that are in no training picture",
    )
    max_targets: int | None = Field(
        None, ge=1, description="targets per prompt; None: the most that the data has"
    )
    exemplars: int = Field(0, ge=0, description="box exemplars per prompt at most")
    exemplar_probability: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of questions that show box exemplars, where exemplars > 0",
    )
    visual_probability: float = Field(
        0.0, ge=0, le=1, description="ask with a box alone (phrase 'visual')"
    )
    flip: bool = Field(False, description="mirror half of the training pictures left to right")
    turn: bool = Field(False, description="turn training pictures by 0, 90, 180 or 270 degrees")
    crop: float = Field(
        1.0, gt=0, le=1, description="smallest share of each edge that a random crop keeps; 1: none"
    )
    min_size: int | None = Field(
        None,
        ge=1,
        description="smallest random edge, pixels; the rest is padded. None: no random size",
    )
    repeat_threshold: float = Field(
        0.0,
        ge=0,
        le=1,
        description="pictures of a category that is in a smaller share of all pictures are shown more "
        "often, by the square root of the ratio (repeat factor sampling, LVIS); 0: off",
    )
    augment: Literal["off", "standard"] = Field(
        "off",
        description="standard: flip, crop and moderate colour, grey, blur and noise; other keys "
        "override it",
    )
    brightness: float = Field(
        0.0, ge=0, le=1, description="brightness times 1 - this to 1 + this, training only"
    )
    contrast: float = Field(
        0.0, ge=0, le=1, description="contrast around the picture's mean, the same way"
    )
    colour: float = Field(0.0, ge=0, le=1, description="strength of colours, the same way")
    grey: float = Field(0.0, ge=0, le=1, description="share of training pictures without colour")
    blur: float = Field(
        0.0,
        ge=0,
        le=10,
        description="largest radius, pixels of the model's picture; a quarter of the pictures",
    )
    noise: float = Field(
        0.0,
        ge=0,
        le=100,
        description="largest standard deviation of noise, of 255 grey levels; a quarter of the pictures",
    )
    workers: int = Field(0, ge=0, le=256, description="loader processes; 0: in the main process")
    shapes_concepts: Literal["basic", "seen", "combinations", "new", "new_with_old", "all"] = Field(
        "basic", description="phrases of the generated data, see sam3jax/data/shapes.py"
    )
    shapes_size: int = Field(256, ge=64, description="longer edge of generated pictures, pixels")
    shapes_seed: int = Field(0, ge=0, description="another seed, other generated pictures")
    shapes_train: int = Field(2000, ge=1, description="generated training pictures")
    shapes_valid: int = Field(100, ge=1, description="generated validation pictures")

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("augment") == "standard":
            return {**STANDARD_AUGMENTATION, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        phrases = [*self.phrases, *self.phrases.values(), *self.negative_phrases]
        if not all(phrase.strip() for phrase in phrases):
            raise ValueError("phrases and negative_phrases: a phrase is empty; give it words")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(
                f"window {list(self.window)}: the first value, for black, must be below the second"
            )
        if self.visual_probability and not self.exemplars:
            raise ValueError(
                "visual_probability asks with boxes, but exemplars is 0: set data.exemplars=1 or more"
            )
        return self


class OptimConfig(_Section):
    """AdamW with warm-up, decay and clipping."""

    learning_rate: float = Field(1e-4, gt=0)
    vision_scale: float = Field(
        1.0, gt=0, description="learning rate of the vision backbone, relative"
    )
    text_scale: float = Field(1.0, gt=0, description="learning rate of the text tower, relative")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="per ViT block, from the last block down"
    )
    weight_decay: float = Field(0.1, ge=0, description="none on biases, norms and adapters' biases")
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = Field(20, ge=0)
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = "cosine"
    timescale: int = Field(20, description="of inverse_sqrt, steps")
    cooldown_steps: int = Field(
        0, ge=0, description="linear to zero at the end (inverse_sqrt, constant)"
    )
    clip_norm: float = Field(0.1, gt=0, description="global gradient norm")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of averaged weights used for evaluation; 0: off"
    )


class EvalConfig(_Section):
    """How predictions are made and counted, in validation, evaluate and predict alike."""

    batch_size: int = Field(2, ge=1, description="pictures that a device looks at at once")
    threshold: float = Field(0.5, ge=0, le=1, description="score of a detection worth showing")
    max_detections: int = Field(
        100,
        ge=1,
        description="per picture and phrase; evaluation keeps more where the data have more",
    )
    score_floor: float = Field(
        1e-3, ge=0, lt=1, description="weakest score that AP still looks at; the rest is not stored"
    )
    mask_threshold: float = Field(0.5, gt=0, lt=1)
    nms: float | None = Field(
        None, description="mask IoU above which the weaker of two detections is dropped"
    )
    batches: int | None = Field(
        None, description="validate on at most this many batches during training"
    )
    panels: int = Field(4, ge=0, description="pictures drawn at each validation")


class ClicksConfig(_Section):
    """Interactive training (task clicks): prompts, rounds of corrections, loss, validation."""

    objects: int = Field(
        8, ge=1, description="objects of a picture trained per step at most, drawn at random"
    )
    # The first prompt of an object
    first_point: float = Field(
        0.5, ge=0, le=1, description="share of objects that start with one point"
    )
    first_box: float = Field(
        0.4, ge=0, le=1, description="share that start with a box; the three shares make 1"
    )
    first_mask: float = Field(
        0.1, ge=0, le=1, description="share that start with a coarse, damaged mask"
    )
    box_noise: float = Field(
        0.1,
        ge=0,
        le=1,
        description="how far a side of a first box moves at most, of its width or height",
    )
    box_noise_pixels: float = Field(
        20.0,
        ge=0,
        description="most that a side of a first box moves, pixels of the model's picture",
    )
    # Corrections
    rounds: int = Field(
        7, ge=0, le=31, description="rounds of corrections, each with one more click"
    )
    clicks_from_truth: float = Field(
        0.1, ge=0, le=1, description="share of corrections anywhere on the object, not on an error"
    )
    mask_only_round: bool = Field(
        True, description="one round more, at a random place, that adds no click"
    )
    # Loss
    loss_mask: float = Field(20.0, ge=0, description="weight of the pixelwise mask loss")
    loss_dice: float = Field(1.0, ge=0, description="weight of the dice loss")
    loss_iou: float = Field(1.0, ge=0, description="weight of the predicted IoU's error")
    loss_score: float = Field(1.0, ge=0, description="weight of the object score's loss")
    mask_loss: Literal["focal", "bce"] = Field("focal", description="pixelwise mask loss")
    focal_alpha: float = Field(
        0.25, le=1, description="weight of foreground pixels in focal; negative: none"
    )
    focal_gamma: float = Field(
        2.0, ge=0, description="how much focal forgets pixels that are right"
    )
    iou_error: Literal["l1", "mse"] = Field("l1", description="error of the predicted IoU")
    iou_of: Literal["all", "best"] = Field(
        "all", description="masks whose predicted IoU is taught: all of a round, or the best one"
    )
    mask_resolution: Literal["target", "prediction"] = Field(
        "target",
        description="where masks are compared; prediction: a twelfth of the pixels at full size",
    )
    objects_at_once: int = Field(
        8, ge=1, description="objects whose full-size masks exist at a time, on each device"
    )
    # Validation
    valid_clicks: int = Field(
        5, ge=1, le=32, description="clicks per object in validation; NoC counts no further"
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


class Config(_Section):
    """A whole run."""

    task: Literal["detect", "clicks"] = Field(
        "detect",
        description="what is trained: detect: find every instance of a phrase; clicks: masks from points, "
        "boxes and masks, corrected click by click",
    )
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    clicks: ClicksConfig = ClicksConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: EvalConfig = EvalConfig()
    init: str | None = Field(
        None,
        description="what to start from: a model folder (python -m convert), a run folder, or "
        "shipped:tiny_shapes; None: random weights",
    )
    output: str = Field("runs/run", description="run folder")
    train: Literal["lora", "all"] = Field(
        "lora", description="lora: adapters (and `trainable`); all: every live parameter"
    )
    trainable: tuple[str, ...] = Field(
        (), description="patterns of parameters trained beside the adapters"
    )
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(
        1, ge=1, description="pictures of one update, over all devices and micro-batches"
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="pictures that a device holds at once; gradients of several micro-batches are added up. "
        "None: batch_size divided by the number of devices",
    )
    seed: int = 0
    eval_every: int = Field(200, ge=0, description="steps between validations; 0: only at the end")
    save_every: int = Field(200, ge=1)
    log_every: int = Field(10, ge=1)
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best one")
    best_metric: str | None = Field(
        None,
        description="metric by which the best checkpoint is chosen; None: the task's own, for detection "
        "segm/AP, or bbox/AP where no mask is annotated",
    )
    resume: bool = Field(
        True, description="continue where the run folder's newest checkpoint stands"
    )

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


def load_config(
    path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()
) -> Config:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML).

    Raises ConfigError naming the key, what was found and what was expected.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(
                f"no config file {file}: give the path of a YAML file, for example configs/shapes.yaml"
            )
        try:
            raw = yaml.safe_load(file.read_text()) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is not readable YAML: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{file} holds a {type(raw).__name__}, expected `key: value` lines")
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(
                f"override {item!r} has no '=': write section.key=value, for example optim.learning_rate=1e-4"
            )
        node = raw
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {item!r}: {parent} is a value, not a section")
        try:
            node[last] = _scalar(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(
                f"override {item!r}: the value is not readable YAML: {error}"
            ) from error
    return parse_config(raw)


def parse_config(raw: dict[str, Any], section: type[_Section] = Config) -> Any:
    """Validate a mapping against a section, all errors in one ConfigError."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(e, section) for e in error.errors()]
        raise ConfigError("; ".join(lines)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to the same Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _scalar(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 (no dot) as a string; people mean a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


# Settings of earlier versions: what stands in their place.
_GONE = {
    "optim.accumulate": "batch_size now counts the pictures of one update, and micro_batch those that a device "
    "holds at once: batch_size 1 with accumulate 4 is batch_size=4 micro_batch=1, with a quarter of the steps",
}


def _explain(error: dict[str, Any], section: type[BaseModel]) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path) or "config"
    if name in _GONE:
        return f"config key {name} is gone: {_GONE[name]}"
    if error["type"] == "extra_forbidden":
        fields = section
        for part in path[:-1]:
            annotation = (
                fields.model_fields[part].annotation if part in fields.model_fields else None
            )
            fields = (
                annotation
                if isinstance(annotation, type) and issubclass(annotation, BaseModel)
                else section
            )
        close = difflib.get_close_matches(path[-1], fields.model_fields, n=1)
        hint = (
            f", did you mean {close[0]}?"
            if close
            else f"; known keys: {', '.join(fields.model_fields)}"
        )
        return f"unknown config key {name}{hint}"
    message = error["msg"].removeprefix("Value error, ")
    return (
        f"config key {name}: {message} (found {error['input']!r})"
        if not isinstance(error["input"], dict)
        else f"config key {name}: {message}"
    )
