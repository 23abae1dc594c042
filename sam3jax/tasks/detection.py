"""Detection: find, box and mask every instance of a phrase in a picture. SAM 3's published training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from PIL import Image

from sam3jax.config import Config
from sam3jax.data.coco import Dataset
from sam3jax.data.datasets import open_datasets
from sam3jax.data.describe import describe
from sam3jax.data.features import FeatureStore
from sam3jax.data.loader import TrainLoader, make_eval_loader, make_train_loader
from sam3jax.data.prompts import balance, tokenize, vocabulary
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.evaluation.ask import detections_to_keep, evaluate_dataset
from sam3jax.evaluation.comparison import write_evaluation
from sam3jax.evaluation.progress import Advance, untold
from sam3jax.inference.detector import Detector, encode_text
from sam3jax.losses.detection import breakdown, loss_shares, with_f1
from sam3jax.losses.totals import Totals, count_totals
from sam3jax.model import Sam3
from sam3jax.model.sam3 import reader_of
from sam3jax.tasks.cached_trunk import empty_store, fill_store, picture_views
from sam3jax.tasks.validated import Ask, Validated
from sam3jax.types import AXIS, Batch, Outputs, Prompts, TextFeatures
from sam3jax.viewing.batches import draw_batch
from sam3jax.viewing.draw import dataset_panel
from sam3jax.viewing.shown import Shown
from sam3jax.weights.trainable import (
    merge,
    touches,
    without_text_tower,
)
from sam3jax.weights.tree import Tree


class DetectionData(NamedTuple):
    """valid: None without a validation split. phrases: of both; tokens [V, N], a row for each."""

    train: Dataset
    valid: Dataset | None
    phrases: tuple[str, ...]
    tokens: np.ndarray


_SPLIT: Any = P(AXIS)  # specs stand in a Batch where arrays do
_EVERYWHERE: Any = P()


class Detection:
    """The task `detect`; see `tasks.Task` for what each method is for."""

    parts: tuple[str, ...] = ("detector",)
    # Pictures and what belongs to them are split over devices; the phrases are everywhere.
    batch_spec: Any = Batch(
        images=_SPLIT, tokens=_EVERYWHERE, prompts=_SPLIT, targets=_SPLIT, image_valid=_SPLIT, image_id=_SPLIT
    )  # fmt: skip
    best_by: tuple[str, ...] = ("segm/AP", "bbox/AP")

    def __init__(self, config: Config, backend: str | None = None) -> None:
        self.config = config
        self.model = Sam3(config.model, train=True, backend=backend)
        self.asked = Sam3(config.model, backend=backend)
        self._features: FeatureStore | None = None
        self._loader: TrainLoader | None = None

    @property
    def together(self) -> int:
        return 1

    def open(self, tokenizer: Tokenizer) -> DetectionData:
        train, valid = open_datasets(self.config)
        phrases = vocabulary(self.config.data, *filter(None, (train, valid)))
        return DetectionData(train, valid, phrases, tokenize(phrases, tokenizer))

    def describe(self, data: DetectionData) -> Iterator[str]:
        yield from describe(data.train, self.config.model.queries)
        yield balance(data.train, self.config.data, self.config.seed)
        if (store := self._features) is not None:
            yield store.line

    def loader(self, data: DetectionData, **process: Any) -> TrainLoader:
        rows, processes = len(data.train.images), process.get("process_count", 1)
        self._features = empty_store(self.config, rows, processes)
        self._loader = make_train_loader(
            data.train, data.phrases, data.tokens, self.config, valid=data.valid, features=self._features, **process
        )  # fmt: skip
        return self._loader

    def keep(self, frozen: Tree, data: DetectionData, mesh: Mesh) -> None:
        """Trunk features of the training pictures, where the run asks for them."""
        if self._features is not None:
            views = picture_views(data.train, self.config)
            fill_store(self._features, self.config, views, self.asked, frozen, mesh)

    def draw(self, data: DetectionData, batch: Batch) -> Image.Image:
        records = data.train.images
        batch = batch if self._loader is None else self._loader.with_pictures(batch)
        return draw_batch(batch, data.phrases, lambda k: records[int(batch.image_id[k])].file.name)

    def prepare(
        self, trainable: Tree, frozen: Tree, data: DetectionData
    ) -> tuple[TextFeatures | None, Tree]:
        """The phrases encoded once. A trained text tower encodes them in each step instead."""
        if touches(trainable, "text_encoder"):
            return None, frozen
        text = encode_text(self.asked, merge(trainable, frozen), data.tokens)
        return text, without_text_tower(frozen)

    def count(self, batch: Batch) -> Totals:
        edge = 4 * self.config.model.grid
        return count_totals(
            batch.targets, asked(batch), self.config.loss, prediction_size=(edge, edge), axis_names=(AXIS,)
        )  # fmt: skip

    def loss(
        self,
        variables: Tree,
        prepared: TextFeatures | None,
        batch: Batch,
        totals: Totals,
        key: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs = forward(self.model, variables, prepared, batch, key)
        return loss_shares(
            outputs, batch.targets, asked(batch), self.config.loss, totals,
            axis_names=(AXIS,), point_rng=jax.random.fold_in(key, 1),
        )  # fmt: skip

    def metrics(self, terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
        parts = breakdown(terms, self.config.loss)
        named = {f"loss/{name}": value for name, value in parts.items()}
        return {**with_f1(terms), **named, "loss": terms["core_loss"]}

    def validation(self, data: DetectionData, mesh: Mesh, **process: Any) -> Ask | None:
        if data.valid is None:
            return None
        dataset, e = data.valid, self.config.evaluation
        detector = Detector(self.asked, e, mesh, limit=detections_to_keep(dataset, e))
        size = e.batch_size * mesh.size * process.get("process_count", 1)
        loader = make_eval_loader(
            dataset, data.phrases, data.tokens, self.config, targets=False, batch_size=size, **process
        )  # fmt: skip

        def validate(variables: Tree, prepared: Any, advance: Advance = untold) -> Validated:
            found = evaluate_dataset(
                detector,
                variables,
                loader,
                dataset,
                e,
                batches=e.batches,
                text=prepared,
                advance=advance,
            )

            def panels() -> Iterator[tuple[str, Image.Image]]:
                seen = {p["image_id"] for p in found.predictions}
                records = [r for r in dataset.images if r.id in seen or e.batches is None]
                for row, record in enumerate(records[: e.panels]):
                    panel = dataset_panel(
                        record, found.predictions, dataset.categories, Shown.by(e, found.thresholds)
                    )
                    yield f"{row}", panel

            def write(folder: Path, base: Validated | None, about: Mapping[str, Any]) -> None:
                before = None if base is None else base.found
                shown = Shown.by(e, found.thresholds)
                write_evaluation(folder, dataset, found, before, about=about, shown=shown)

            return Validated(found.metrics, panels, write, found.thresholds, found)

        return validate


def forward(
    model: Sam3, variables: Tree, text: TextFeatures | None, batch: Batch, key: jax.Array
) -> Outputs:
    """The detector on a batch; phrases encoded here if `text` is None, each at most once."""
    rngs, prompts = {"dropout": key}, batch.prompts
    if text is None:
        text, prompts = encode_asked(model, variables, batch, key)
    image: Any = model.apply(variables, batch.images, method=reader_of(batch.images), rngs=rngs)
    found: Any = model.apply(variables, image, text, prompts, method="detect", rngs=rngs)
    return found


def encode_asked(
    model: Sam3, variables: Tree, batch: Batch, key: jax.Array
) -> tuple[TextFeatures, Prompts]:
    """The phrases of a batch, and its prompts with text_id pointing into them."""
    tokens, prompts = batch.tokens, batch.prompts
    if prompts.text_id.size < len(tokens):
        # A large vocabulary: only the phrases that this batch asks.
        tokens = tokens[prompts.text_id.reshape(-1)]
        rows = jnp.arange(prompts.text_id.size).reshape(prompts.text_id.shape)
        prompts = prompts.replace(text_id=rows)
    text: Any = model.apply(variables, tokens, method="encode_text", rngs={"dropout": key})
    return text, prompts


def asked(batch: Batch) -> jax.Array:
    """[I, P]: the prompts that count."""
    return jnp.asarray(batch.prompts.valid & batch.image_valid[:, None])
