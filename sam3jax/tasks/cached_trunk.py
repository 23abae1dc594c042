"""`cache_trunk`: the trunk's features of the training pictures, computed once and read in every step."""

from __future__ import annotations

from jax.sharding import Mesh

from sam3jax.config import Config, ConfigError
from sam3jax.data.coco import Dataset
from sam3jax.data.features import FeatureStore, stamps_of
from sam3jax.data.loader import view_of
from sam3jax.data.sampling import fingerprint
from sam3jax.data.shapes import cache_folder
from sam3jax.evaluation.progress import progress
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


def empty_store(config: Config, dataset: Dataset, processes: int) -> FeatureStore | None:
    """The store that a run reads from, not opened yet; None where it asks for none.

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
    shape = (model.grid, model.grid, model.vit_dim)
    return FeatureStore(config.cache_trunk, len(dataset.images), shape, model.compute_dtype)


def fill_store(
    store: FeatureStore, config: Config, dataset: Dataset, model: Sam3, frozen: Tree, mesh: Mesh
) -> None:
    """Open a store in the cache folder and compute what it lacks. Raises DataError where the disk is too small."""
    trunk = {"params": {"vit": frozen["params"]["vit"]}}
    about = {
        "weights": checksum(trunk), "data": fingerprint(dataset), "views": store.views, "seed": config.seed,
        "seen": config.data.model_dump(mode="json", exclude=_NOT_SEEN), "dtype": store.dtype, "shape": store.shape,
        "image_size": config.model.image_size,
    }  # fmt: skip
    store.open(cache_folder() / "trunk", about)
    stamps = stamps_of(dataset, config.data.slices)
    at_once = config.evaluation.batch_size
    with progress(f"trunk features of {dataset.name}") as advance:
        picture = lambda row, view: view_of(dataset, row, view, config)
        fill(store, stamps, picture, model, trunk, mesh, at_once=at_once, advance=advance)
