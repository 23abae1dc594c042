"""The model card of an export: `README.md` with the header that the hub reads."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from convert.huggingface_config import PROCESSOR_LENGTH
from convert.sources import Source
from sam3jax.config import ModelConfig

CARD = "README.md"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_LICENSE = {
    "license": "other",
    "license_name": "sam-license",
    "license_link": "https://github.com/facebookresearch/sam3/blob/main/LICENSE",
}


def base_name(source: Source, asked: str | None = None) -> str | None:
    """The model that was trained: as asked, else the hub id it came from, else what `init` names."""
    training = source.training
    return asked or source.folder.source.get("hub") or (training.base if training else None)


def model_card(source: Source, base: str | None = None, *, adapter: bool = False) -> str:
    """The text of the card. base: as in `base_name`. adapter: of a folder for peft."""
    training, folder = source.training, source.folder
    name = folder.path.resolve().name
    base = base_name(source, base)
    head: dict[str, Any] = {}
    if base and _HUB_ID.fullmatch(base) and not Path(base).exists():
        head["base_model"] = base
    head["library_name"] = "peft" if adapter else "transformers"
    head["pipeline_tag"] = "mask-generation"
    head |= _LICENSE if _is_published(folder.config) else {"license": "unknown"}
    head["tags"] = ["sam3", "sam3jax", *(["lora"] if source.adapters else [])]
    lines = [f"# {name}", "", _what(source, base, adapter), ""]
    if training:
        metrics = {k: v for k, v in training.run.metrics.items() if _is_number(v)}
        data = _data(training.run.config.data.train)
        if metrics:
            head["model-index"] = [{"name": name, "results": [_result(data, metrics)]}]
        lines += ["## Training", "", *_training(source, data), ""]
        lines += ["## Metrics", "", *_table(metrics), ""]
    lines += ["## Licence", "", _licence(folder.config), ""]
    lines += ["## In transformers", "", *_differences(folder.config)]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n".join(lines) + "\n"


def _what(source: Source, base: str | None, adapter: bool) -> str:
    of = f" of `{base}`" if base else ""
    if source.training is None:
        return f"The weights{of} of a SAM 3 detector in the layout of transformers, not trained further."
    if adapter:
        return (
            f"Adapters{of}, trained with sam3jax. Load the base in float32, then this folder with "
            "`peft.PeftModel.from_pretrained`."
        )
    return f"A SAM 3 detector, a fine-tune{of}, trained with sam3jax."


def _training(source: Source, data: str) -> list[str]:
    training = source.training
    assert training is not None
    config = training.run.config
    kind = "every parameter" if config.train == "all" else "LoRA"
    if config.train != "all" and not source.adapters:
        kind = "named parameters"
    elif config.train != "all" and config.trainable:
        kind += " and named parameters"
    lines = [
        f"- Data: {data}",
        f"- Trained: {kind}, {training.run.step:,} steps",
        f"- Phrases: {', '.join(training.run.thresholds) or 'see the data'}",
    ]
    if source.adapters:
        lines.append(f"- LoRA: rank {config.lora.rank}, alpha {config.lora.alpha:g}")
    return lines


def _table(metrics: dict[str, float]) -> list[str]:
    if not metrics:
        return ["The run was not validated."]
    return ["| metric | value |", "|---|---|", *(f"| {k} | {v:.4g} |" for k, v in metrics.items())]


def _result(data: str, metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "task": {"type": "mask-generation"},
        "dataset": {"name": data, "type": data},
        "metrics": [{"type": k, "name": k, "value": float(v)} for k, v in metrics.items()],
    }


def _data(path: str | None) -> str:
    """The name of the training data; where they lie on a disk is nobody's business."""
    return Path(path).name if path else "unknown"


def _licence(config: ModelConfig) -> str:
    if _is_published(config):
        return "The weights are a derivative of SAM 3 and fall under the SAM License. The data have their own."
    return "That of the base and of the data."


def _differences(config: ModelConfig) -> list[str]:
    """What transformers' Sam3Model computes otherwise than the model that was trained."""
    lines = []
    if config.geometry_without_boxes:
        lines.append(
            "- transformers leaves the geometry encoder out where a prompt has no box; this model was trained "
            "with it. **Scores, boxes and masks of phrases alone differ there**, and may be worse. Train with "
            "`destination=transformers` for equal answers."
        )
    if not config.clamp_presence:
        lines.append("- transformers clamps presence logits to -10..10.")
    if config.text_length != PROCESSOR_LENGTH:
        lines.append(
            f"- Sam3Processor pads phrases to {PROCESSOR_LENGTH} tokens, this model reads {config.text_length}: cut "
            f"`input_ids` and `attention_mask` to `[:, :{config.text_length}]`."
        )
    return lines or ["- Same answers as in sam3jax."]


def _is_published(config: ModelConfig) -> bool:
    published = ModelConfig()
    return all(getattr(config, k) == getattr(published, k) for k in ("vit_dim", "dim", "text_dim"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
