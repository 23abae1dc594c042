"""What a model computes otherwise where an export of it is opened: said, and measured on pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from scipy import ndimage

from convert.adapters import merge
from convert.huggingface_config import PROCESSOR_LENGTH
from convert.layouts import FLOATS
from convert.sources import Source
from sam3jax.config import DESTINATIONS, ModelConfig
from sam3jax.data.datasets import read_datasets
from sam3jax.data.pictures import open_rgb
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.errors import UserError, remark
from sam3jax.files import FileError
from sam3jax.model import Sam3, draw_masks
from sam3jax.types import Outputs, Prompts
from sam3jax.weights.tensor_file import DTYPES
from sam3jax.weights.tree import unflatten

PICTURES = 3  # at once, however many were given: a model at full size takes minutes on a CPU
PHRASES = 4  # at once; and as many of a run's own where nobody chose
OWN = 2  # pictures of a run that nobody chose
FOUND = 0.5  # the score above which an object counts as found


def destination(config: ModelConfig, layout: str) -> ModelConfig:
    """The model as the program of this layout computes it."""
    return config.model_copy(
        update=DESTINATIONS["transformers" if layout == "huggingface" else "sam3"]
    )


def warnings(config: ModelConfig, layout: str) -> list[str]:
    """Sentences about answers that will differ; none where they will not."""
    lines = []
    if layout == "huggingface" and config.text_length != PROCESSOR_LENGTH:
        lines.append(
            f"Sam3Processor pads phrases to {PROCESSOR_LENGTH} tokens, this model reads {config.text_length}: cut its "
            f"input_ids and attention_mask to [:, :{config.text_length}]"
        )
    if config.geometry_without_boxes == (layout == "official"):
        return lines
    other = "sam3" if layout == "official" else "transformers"
    does = (
        "transformers leaves the geometry encoder out where a prompt has no box, and this model was trained with it"
        if layout == "huggingface"
        else "sam3 runs the geometry encoder also where a prompt has no box, and this model was trained without it"
    )
    return [
        *lines,
        f"WARNING: {does}: answers to phrases alone differ there and may be much worse. Train with "
        f"destination={other} for equal answers; --compare PICTURE ... measures the difference",
    ]


def compared(
    source: Source,
    layout: str,
    pictures: Sequence[Path] | None = (),
    phrases: Sequence[str] = (),
    dtype: str | None = None,
) -> list[str]:
    """The sentences of `warnings`, and of `measured` where there are pictures.

    pictures: (): where answers will differ, some of the run's own data, if they are there; None: nothing is
    measured. phrases, dtype: see `measured`.
    """
    config = source.folder.config
    said = warnings(config, layout)
    if pictures:
        return said + measured(source, layout, pictures, phrases, dtype)
    there = destination(config, layout).geometry_without_boxes
    if pictures is None or config.geometry_without_boxes == there:
        return said
    asked = list(phrases or _learned(source))[:PHRASES]
    if not asked or not (own := _own_pictures(source)):
        return said
    remark(
        f"measuring on {len(own)} pictures of the run's data how answers differ; --no-compare leaves it out"
    )
    return said + measured(source, layout, own, asked, dtype)


def _learned(source: Source) -> list[str]:
    """The phrases that a run was validated on."""
    return list(source.training.run.thresholds) if source.training else []


def _own_pictures(source: Source) -> list[Image.Image]:
    """Some pictures of a run's validation data, else of its training data; none where they are gone."""
    if source.training is None:
        return []
    try:
        train, valid = read_datasets(source.training.run.config)
        return [record.open() for record in (valid or train).images[:OWN]]
    except UserError:
        return []


def measured(
    source: Source,
    layout: str,
    pictures: Sequence[Path | Image.Image],
    phrases: Sequence[str] = (),
    dtype: str | None = None,
) -> list[str]:
    """A sentence with the largest differences of scores and masks on these pictures.

    phrases: what is asked; (): those of the run. dtype: of the export's floats; None: nothing is rounded.
    Raises FileError where there are no phrases.
    """
    phrases = list(phrases or _learned(source))
    if not phrases or source.folder.tokenizer is None:
        raise FileError(
            "--compare needs phrases: give some with --phrase (those of a validated run are known)"
        )
    config = source.folder.config
    models = config, destination(config, layout)
    leaves = merge(source.folder.leaves, source.adapters)
    flat = {path: np.asarray(t.read(), np.float32) for path, t in leaves.items()}
    variables = [{"params": unflatten(flat)}] * 2
    if dtype not in (None, "float32"):
        narrow = DTYPES[FLOATS[dtype]]
        rounded = {path: x.astype(narrow).astype(np.float32) for path, x in flat.items()}
        variables[1] = {"params": unflatten(rounded)}
    tokens = Tokenizer(source.folder.tokenizer, config.text_length)(phrases)
    images = [_picture(file, config.image_size) for file in pictures[:PICTURES]]
    scores: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    moved: list[float] = []
    for image in images:
        for rows in _chunks(tokens):  # what a phrase leaves in memory is 85 MB at full size
            answers = [_ask(c, v, image, rows) for c, v in zip(models, variables, strict=True)]
            here, there = (np.asarray(_scores(out)) for out in answers)
            scores[0].append(here)
            scores[1].append(there)
            for pair, query in _asked(here, there):
                moved.append(
                    _moved(*(_mask(out, pair, query, config.image_size) for out in answers))
                )
    first, second = (np.concatenate(found) for found in scores)
    gone = sum(np.isinf(moved))
    edges = max((x for x in moved if np.isfinite(x)), default=0.0)
    return [
        f"measured on {len(images)} pictures, {len(phrases)} phrases: the best score of a phrase is "
        f"{first.max(-1).mean():.3f} here and {second.max(-1).mean():.3f} there in the mean, single scores differ by up "
        f"to {np.abs(first - second).max():.2g}; edges of {len(moved)} masks differ by up to {edges:.3g} pixels of "
        f"{config.image_size}" + (f", {gone} masks are empty on one side" if gone else "")
    ]


def _chunks(tokens: np.ndarray) -> list[np.ndarray]:
    """A few phrases at a time: rows [P, N] of at most two different P."""
    return [tokens[i : i + PHRASES] for i in range(0, len(tokens), PHRASES)]


def _ask(config: ModelConfig, variables: Any, image: np.ndarray, tokens: np.ndarray) -> Outputs:
    """What the model answers to each of P phrases on one picture."""
    count = len(tokens)
    prompts = Prompts(
        text_id=np.arange(count, dtype=np.int32)[None],
        valid=np.ones((1, count), bool),
        boxes=np.zeros((1, count, 1, 4), np.float32),
        box_labels=np.zeros((1, count, 1), np.int32),
        box_valid=np.zeros((1, count, 1), bool),
    )
    return _compiled(config)(variables, image[None], tokens, prompts)


@functools.cache
def _compiled(config: ModelConfig) -> Callable[..., Outputs]:
    return jax.jit(Sam3(config).apply)


def _scores(out: Outputs) -> jax.Array:
    """[P, Q], as predictions have them."""
    presence = jax.nn.sigmoid(out.presence_logits[-1])[:, None]
    return jax.nn.sigmoid(out.o2o.logits[-1]) * presence


def _mask(out: Outputs, pair: int, query: int, size: int) -> np.ndarray:
    """[size, size] bool."""
    embed = out.o2o.mask_embed[pair, query][None, None]
    logits = draw_masks(embed, out.pixel_embed[pair][None])[0, 0]
    return np.asarray(jax.image.resize(logits, (size, size), "linear") > 0)


def _asked(here: np.ndarray, there: np.ndarray) -> list[tuple[int, int]]:
    """(pair, query) of each whose masks are compared: the best of each phrase, and all that are found on one side."""
    found = (here > FOUND) | (there > FOUND)
    found[np.arange(len(here)), here.argmax(-1)] = True
    return [(int(pair), int(query)) for pair, query in np.argwhere(found)]


def _moved(first: np.ndarray, second: np.ndarray) -> float:
    """How far two masks reach beyond each other, in pixels; infinite where one alone is empty.

    The Hausdorff distance: 0 for equal masks, 1 where an edge moved by a pixel.
    """
    if not (first.any() and second.any()):
        return float("inf") if first.any() != second.any() else 0.0
    beyond = lambda a, b: np.asarray(ndimage.distance_transform_edt(~b))[a].max()
    return float(max(beyond(first, second), beyond(second, first)))


def _picture(picture: Path | Image.Image, size: int) -> np.ndarray:
    """[size, size, 3] uint8, squashed to the square."""
    opened = picture if isinstance(picture, Image.Image) else open_rgb(picture)
    return np.asarray(opened.resize((size, size)))
