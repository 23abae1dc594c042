"""The data sets that a configuration names: COCO folders, or the generated shapes.

`check_training` is what a training refuses; the doctor calls the same function, so that both agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sam3jax.config import Config, DataConfig
from sam3jax.data.folders import find_splits, has_split, read_dataset
from sam3jax.data.judgements import require_masks
from sam3jax.data.ledger import DataError, shown
from sam3jax.data.names import check_phrases, phrase_key, rename_categories
from sam3jax.data.pictures import Reading
from sam3jax.data.prompts import vocabulary
from sam3jax.data.records import Dataset, trained_categories
from sam3jax.data.shapes import shapes_dataset
from sam3jax.data.tokenizer import words
from sam3jax.data.xrays import xrays_dataset

GENERATED = {"shapes": shapes_dataset, "xrays": xrays_dataset}  # what data.train says for them
_SIDES = frozenset(("left", "right", "leftmost", "rightmost", "lefthand", "righthand"))
_UPRIGHT = (
    "top",
    "bottom",
    "upper",
    "lower",
    "topmost",
    "horizontal",
    "vertical",
    "upright",
    "up",
    "down",
)
_TURNED = _SIDES | frozenset(_UPRIGHT)


def open_datasets(config: Config) -> tuple[Dataset, Dataset | None]:
    """The training and the validation data of a run on phrases. Raises DataError."""
    return prepare_datasets(config, *read_datasets(config))


def read_datasets(config: Config) -> tuple[Dataset, Dataset | None]:
    """The training and the validation data of a run as they are; None where there is no validation split.

    `data.train: shapes` is the generated data set. Raises DataError.
    """
    data = config.data
    if data.train is None:
        raise DataError("no training data: set data.train to a COCO folder, or to shapes")
    train = read_dataset_of(config, data.train, data.train_split)
    valid = None
    if data.valid is not None:
        valid = read_dataset_of(config, data.valid, data.valid_split)
    elif data.train in GENERATED or has_split(data.train, data.valid_split):
        valid = read_dataset_of(config, data.train, data.valid_split)
    else:
        check_valid_split(data, find_splits(data.train))
    return train, valid


def check_valid_split(data: DataConfig, splits: Mapping[str, Any]) -> None:
    """Raise DataError where a validation split is asked for by name and is none of the data's."""
    if data.valid_split != DataConfig().valid_split:
        raise DataError(
            f"{data.train} has no split {data.valid_split!r}, it has {', '.join(splits)}: set "
            f"data.valid_split"
        )


def prepare_datasets(
    config: Config, train: Dataset, valid: Dataset | None
) -> tuple[Dataset, Dataset | None]:
    """Data as they were read, under the configuration's phrases. Raises DataError for what cannot be
    trained on."""
    both = [d for d in (train, valid) if d is not None]
    check_phrases(config.data.phrases, *both)
    both = [_renamed(config, dataset) for dataset in both]
    check_training(config, *both)
    return both[0], (both[1] if valid is not None else None)


def check_training(config: Config, train: Dataset, *others: Dataset) -> None:
    """Raise DataError for whatever a training on these data would refuse."""
    if not trained_categories(train):
        raise DataError(
            f"{train.name} has no usable annotation, so there is no phrase to train: see what was "
            f"read with python -m sam3jax.doctor {config.data.train or train.name.rpartition(':')[0]}"
        )
    for dataset in (train, *others):
        _check_masks(config, dataset)
    phrases = vocabulary(config.data, train, *others)
    _check_sides(config.data, phrases)
    room = config.model.text_length - 2
    if long := [phrase for phrase in phrases if len(words(phrase)) > room]:
        raise DataError(
            f"{shown(long[0])} has {len(words(long[0]))} words and signs, more than the {room} tokens that "
            f"the model reads: give it a shorter phrase with data.phrases"
        )


def open_dataset(config: Config, path: str, split: str) -> Dataset:
    """One split with the configuration's phrases, as far as it has such categories.

    Categories with boxes only are refused where masks train.
    """
    dataset = _renamed(config, read_dataset_of(config, path, split))
    _check_masks(config, dataset)
    return dataset


def read_dataset_of(config: Config, path: str, split: str) -> Dataset:
    """One split as it is. Raises DataError."""
    data = config.data
    if path in GENERATED:
        return GENERATED[path](split, data)
    reading = reading_of(data)
    dataset = read_dataset(path, split, allow_outside=data.allow_outside, reading=reading)
    if data.limit is not None:
        dataset = replace(dataset, images=dataset.images[: data.limit])
    return dataset


def reading_of(config: DataConfig) -> Reading:
    """How files become pixels, for whoever opens pictures of these data."""
    return Reading(config.window, config.max_megapixels, config.slices)


def _renamed(config: Config, dataset: Dataset) -> Dataset:
    if not config.data.phrases:
        return dataset
    return rename_categories(dataset, config.data.phrases, strict=False)


def _check_masks(config: Config, dataset: Dataset) -> None:
    if config.loss.reads_masks and not config.data.allow_missing_masks:
        require_masks(dataset)


def _check_sides(config: DataConfig, phrases: tuple[str, ...]) -> None:
    """A mirrored left shoe is a right shoe: such phrases and such pictures do not go together."""
    for key, sides in (("flip", _SIDES), ("turn", _TURNED)):
        named = [p for p in phrases if sides & set(phrase_key(p).split())]
        if getattr(config, key) and named:
            raise DataError(
                f"data.{key}=true would teach the opposite of {shown(named[0])}: set data.{key}=false, or "
                f"give it a phrase that names no side with data.phrases"
            )
