"""The data sets that a configuration names: COCO folders, or the generated shapes."""

from __future__ import annotations

from dataclasses import replace

from sam3jax.config import Config
from sam3jax.data.coco import Dataset, rename_categories, require_masks, used_categories
from sam3jax.data.folders import has_split, read_dataset
from sam3jax.data.pictures import DataError
from sam3jax.data.shapes import shapes_dataset

SHAPES = "shapes"  # what data.train says for them


def open_datasets(config: Config) -> tuple[Dataset, Dataset | None]:
    """The training and the validation data of a run; None where there is no validation split.

    `data.train: shapes` is the generated data set. Raises DataError.
    """
    data = config.data
    if data.train is None:
        raise DataError("no training data: set data.train to a COCO folder, or to shapes")
    train = open_dataset(config, data.train, data.train_split)
    if not used_categories(train):
        raise DataError(
            f"{train.name} has no usable annotation, so there is no phrase to train: see what was "
            f"read with python -m sam3jax.doctor {data.train}"
        )
    if data.valid is not None:
        return train, open_dataset(config, data.valid, data.valid_split)
    if data.train == SHAPES or has_split(data.train, data.valid_split):
        return train, open_dataset(config, data.train, data.valid_split)
    return train, None


def open_dataset(config: Config, path: str, split: str) -> Dataset:
    """One split with the configuration's phrases; box-only categories refused where masks train."""
    if path == SHAPES:
        return shapes_dataset(split, config.data)
    dataset = read_dataset(path, split)
    if config.data.limit is not None:
        dataset = replace(dataset, images=dataset.images[: config.data.limit])
    if config.data.phrases:
        dataset = rename_categories(dataset, config.data.phrases)
    if config.loss.reads_masks and not config.data.allow_missing_masks:
        require_masks(dataset)
    return dataset
