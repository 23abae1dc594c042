"""`cache_trunk`: the trunk's features of the training pictures or clips, computed once and read in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from sam3jax.config import Config, ConfigError
from sam3jax.data.clip_loader import clip_of, clip_stamps, pixels_of
from sam3jax.data.clips import Sampling
from sam3jax.data.coco import Dataset
from sam3jax.data.features import FeatureStore, stamps_of
from sam3jax.data.loader import view_of
from sam3jax.data.sampling import fingerprint
from sam3jax.data.videos import VideoDataset
from sam3jax.evaluation.progress import progress
from sam3jax.files import cache_folder
from sam3jax.inference.trunk_features import checksum, fill
from sam3jax.model import Sam3
from sam3jax.weights.trainable import adapted_entries, trained_entries
from sam3jax.weights.tree import Tree

# Settings of the data that no pixel of a training picture depends on.
_NOT_SEEN = {
    "train", "valid", "train_split", "valid_split", "allow_outside", "limit", "phrases", "allow_missing_masks",
    "max_prompts", "positives", "negatives", "negative_phrases", "max_targets", "exemplars", "exemplar_probability",
    "visual_probability", "repeat_threshold", "workers",
}  # fmt: skip


class Views(NamedTuple):
    """What a store is filled from: `row` numbers pictures, or videos of which each view is a clip.

    name: of the data set. stamps: one a row, of what its pixels follow from. pixels(row, view): [Y, X, 3]
    uint8, of clips [F, Y, X, 3]. about: what else tells the data apart.
    """

    name: str
    stamps: list[int]
    pixels: Callable[[int, int], np.ndarray]
    about: Any


def picture_views(dataset: Dataset, config: Config) -> Views:
    """A view is what a turn of the data shows of a picture. Raises DataError."""
    pixels = lambda row, view: view_of(dataset, row, view, config)
    return Views(dataset.name, stamps_of(dataset), pixels, fingerprint(dataset))


def clip_views(dataset: VideoDataset, config: Config, sampling: Sampling) -> Views:
    """A view is the clip that a turn of the data shows of a video. Raises DataError."""
    pixels = lambda row, view: pixels_of(*clip_of(dataset, row, view, config, sampling))
    stamps = clip_stamps(dataset, config.cache_trunk, config, sampling)
    return Views(
        dataset.name, stamps, pixels, {"videos": len(dataset.videos), **sampling._asdict()}
    )


def empty_store(
    config: Config, rows: int, processes: int, *, frames: int | None = None
) -> FeatureStore | None:
    """The store that a run reads from, not opened yet; None where it asks for none.

    rows: pictures, or videos with clips of `frames` frames.

    Raises ConfigError where what the trunk makes of a picture is not the same in every step.
    """
    if not config.cache_trunk:
        return None
    entries = *adapted_entries(config), *trained_entries(config)
    moved = [e.name for e in entries if e.path[0] == "vit"]
    if moved:
        raise ConfigError(
            f"cache_trunk is for runs that leave the trunk as it is, and {len(moved)} of its tensors are trained, "
            f"{moved[0]} first: set lora.targets (and trainable) to parts behind it, for example "
            "lora.targets=[transformer.*]"
        )
    if config.model.drop_path:
        raise ConfigError(
            "cache_trunk keeps one answer of the trunk, and model.drop_path makes it random: set model.drop_path=0"
        )
    if processes > 1:
        raise ConfigError("cache_trunk fills its store in one process: leave it out on many hosts")
    model = config.model
    shape = (*(() if frames is None else (frames,)), model.grid, model.grid, model.vit_dim)
    return FeatureStore(config.cache_trunk, rows, shape, model.compute_dtype)


def fill_store(
    store: FeatureStore,
    config: Config,
    views: Views,
    model: Sam3,
    frozen: Tree,
    mesh: Mesh,
) -> None:
    """Open a store in the cache folder and compute what it lacks. Raises DataError where the disk is too small."""
    trunk = {"params": {"vit": frozen["params"]["vit"]}}
    about = {
        "weights": checksum(trunk), "data": views.about, "views": store.views, "seed": config.seed,
        "seen": config.data.model_dump(mode="json", exclude=_NOT_SEEN), "dtype": store.dtype, "shape": store.shape,
        "image_size": config.model.image_size,
    }  # fmt: skip
    store.open(cache_folder() / "trunk", about)
    frames = store.shape[0] if len(store.shape) == 4 else 1
    at_once = max(config.evaluation.batch_size // frames, 1)
    with progress(f"trunk features of {views.name}") as advance:
        fill(
            store, views.stamps, views.pixels, model, trunk, mesh, at_once=at_once, advance=advance
        )
