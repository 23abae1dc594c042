"""What a model computes otherwise where an export of it is opened: said, and measured on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.adapters import merge
from convert.sources import Source
from sam3jax.config import ModelConfig
from sam3jax.data.pictures import open_rgb
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.files import FileError
from sam3jax.model import Sam3
from sam3jax.types import Prompts
from sam3jax.weights.tree import unflatten

PICTURES = 3  # at once, however many were given: a model at full size takes minutes on a CPU


def destination(config: ModelConfig, layout: str) -> ModelConfig:
    """The model as the program of this layout computes it."""
    there = layout == "huggingface"
    return config.model_copy(update={"geometry_without_boxes": not there, "clamp_presence": there})


def warnings(config: ModelConfig, layout: str) -> list[str]:
    """Sentences about answers that will differ; none where they will not."""
    if config.geometry_without_boxes == (layout == "official"):
        return []
    other = "true" if layout == "official" else "false"
    does = (
        "transformers leaves the geometry encoder out where a prompt has no box, and this model was trained with it"
        if layout == "huggingface"
        else "sam3 runs the geometry encoder also where a prompt has no box, and this model was trained without it"
    )
    return [
        f"WARNING: {does}: answers to phrases alone differ there and may be much worse. Train with "
        f"model.geometry_without_boxes={other} for equal answers; --compare PICTURE ... measures the difference"
    ]


def measured(source: Source, layout: str, pictures: Sequence[Path]) -> list[str]:
    """A sentence with the largest difference of scores on these pictures, for the run's phrases.

    Raises FileError where the source names no phrases.
    """
    phrases = list(source.training.run.thresholds) if source.training else []
    if not phrases or source.folder.tokenizer is None:
        raise FileError("--compare needs the phrases of a run that was validated: leave it out")
    config = source.folder.config
    leaves = merge(source.folder.leaves, source.adapters)
    params = unflatten({path: t.read().astype(np.float32) for path, t in leaves.items()})
    tokens = Tokenizer(source.folder.tokenizer, config.text_length)(phrases)
    images = [_picture(file, config.image_size) for file in pictures[:PICTURES]]
    here, there = (
        np.concatenate([_scores(c, params, image, tokens) for image in images])
        for c in (config, destination(config, layout))
    )
    change = np.abs(here - there)
    return [
        f"measured on {len(images)} pictures, {len(phrases)} phrases: the best score of a phrase is "
        f"{here.max(-1).mean():.3f} here and {there.max(-1).mean():.3f} there in the mean, single scores differ by up to "
        f"{change.max():.3f}"
    ]


def _scores(config: ModelConfig, params: Any, image: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[P, Q]: the scores of all queries for each phrase on one picture."""
    count = len(tokens)
    prompts = Prompts(
        text_id=np.arange(count, dtype=np.int32)[None],
        valid=np.ones((1, count), bool),
        boxes=np.zeros((1, count, 1, 4), np.float32),
        box_labels=np.zeros((1, count, 1), np.int32),
        box_valid=np.zeros((1, count, 1), bool),
    )
    out = jax.jit(Sam3(config).apply)({"params": params}, image[None], tokens, prompts)
    presence = jax.nn.sigmoid(out.presence_logits[-1])[:, None]
    return np.asarray(jax.nn.sigmoid(out.o2o.logits[-1]) * presence)


def _picture(file: Path, size: int) -> np.ndarray:
    """[size, size, 3] uint8, squashed to the square."""
    return np.asarray(open_rgb(file).resize((size, size)))
