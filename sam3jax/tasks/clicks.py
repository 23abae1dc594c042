"""Clicks: masks of objects from points, boxes and rough masks, corrected click by click."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from PIL import Image

from sam3jax.config import Config
from sam3jax.data.click_loader import (
    clickable,
    make_click_eval_loader,
    make_click_loader,
    with_objects,
)
from sam3jax.data.describe import describe
from sam3jax.data.features import FeatureStore
from sam3jax.data.loader import TrainLoader
from sam3jax.data.records import Dataset
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.data.video_sets import read_pictures
from sam3jax.evaluation.click_ask import click_on_dataset
from sam3jax.evaluation.click_report import write_click_evaluation
from sam3jax.evaluation.progress import Advance, untold
from sam3jax.model import Interactive, Sam3
from sam3jax.tasks.cached_trunk import empty_store, fill_store, picture_views
from sam3jax.tasks.click_training import training_rounds
from sam3jax.tasks.validated import Ask, Validated
from sam3jax.types import AXIS, ClickBatch
from sam3jax.viewing.batches import draw_click_batch
from sam3jax.viewing.click_panels import click_panel
from sam3jax.weights.scope import CLICKS
from sam3jax.weights.tree import Tree


class ClicksData(NamedTuple):
    """valid: None without a validation split."""

    train: Dataset
    valid: Dataset | None


_SPLIT: Any = P(AXIS)  # specs stand in a batch where arrays do


class Clicks:
    """The task `clicks`; see `tasks.Task` for what each method is for."""

    parts = CLICKS.parts
    batch_spec: Any = ClickBatch(*(_SPLIT,) * 8)
    best_by: tuple[str, ...] = ("clicks/mIoU@3", "clicks/mIoU@1")
    together = 1

    def __init__(self, config: Config, backend: str | None = None) -> None:
        self.config = config
        self.model = Interactive(config.model, train=True, backend=backend)
        self.asked = Interactive(config.model, backend=backend)
        self._features: FeatureStore | None = None
        self._loader: TrainLoader | None = None

    def open(self, tokenizer: Tokenizer) -> ClicksData:
        train, valid = read_pictures(self.config)
        with_objects(train)
        return ClicksData(train, None if valid is None else with_objects(valid))

    def describe(self, data: ClicksData) -> Iterator[str]:
        yield from describe(data.train, self.config.model.queries)
        for name, dataset in (("train", data.train), ("valid", data.valid)):
            if dataset is not None:
                found = [len(clickable(record)) for record in dataset.images]
                pictures = sum(map(bool, found))
                yield f"clicks        {name}: {sum(found)} objects on {pictures} pictures"
        if self._features is not None:
            yield self._features.line

    def loader(self, data: ClicksData, **process: int) -> TrainLoader:
        rows, processes = len(with_objects(data.train).images), process.get("process_count", 1)
        self._features = empty_store(self.config, rows, processes)
        self._loader = make_click_loader(
            data.train, self.config, features=self._features, **process
        )
        return self._loader

    def draw(self, data: ClicksData, batch: ClickBatch) -> Image.Image:
        records = data.train.images
        batch = batch if self._loader is None else self._loader.with_pictures(batch)
        return draw_click_batch(batch, lambda k: records[int(batch.image_id[k])].file.name)

    def prepare(self, trainable: Tree, frozen: Tree, data: ClicksData) -> tuple[None, Tree]:
        """Nothing to compute; the detector's own layers leave."""
        reads = CLICKS.reads or frozen["params"].keys()
        return None, {**frozen, "params": {k: v for k, v in frozen["params"].items() if k in reads}}

    def keep(self, frozen: Tree, data: ClicksData, mesh: Mesh) -> None:
        """Trunk features of the training pictures, where the run asks for them."""
        if self._features is not None:
            views = picture_views(with_objects(data.train), self.config)
            trunk = Sam3(self.config.model, backend=self.asked.backend)
            fill_store(self._features, self.config, views, trunk, frozen, mesh)

    def count(self, batch: ClickBatch) -> jax.Array:
        return (batch.valid & batch.image_valid[:, None]).sum().astype(jnp.float32)

    def loss(
        self, variables: Tree, prepared: None, batch: ClickBatch, totals: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        clicks = self.config.clicks
        luck = jax.random.key(self.config.seed)
        rounds, _ = training_rounds(self.model, variables, batch, luck, clicks, dropout=key)
        share = lambda x: x.sum() / jnp.maximum(totals, 1.0)
        loss = share(rounds.total(clicks))
        terms = {"loss": loss, "IoU_first": share(rounds.iou[0]), "IoU_last": share(rounds.iou[-1])}
        named = ("mask", "dice", "iou_error", "score")
        return loss, terms | {f"loss/{name}": share(getattr(rounds, name)) for name in named}

    def metrics(self, terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return terms

    def validation(self, data: ClicksData, mesh: Mesh, **process: int) -> Ask | None:
        if data.valid is None:
            return None
        dataset, e, clicks = data.valid, self.config.evaluation, self.config.clicks
        size = e.batch_size * mesh.size * process.get("process_count", 1)
        loader = make_click_eval_loader(dataset, self.config, batch_size=size, **process)

        def validate(variables: Tree, prepared: Any, advance: Advance = untold) -> Validated:
            found = click_on_dataset(
                self.asked, mesh, variables, loader, clicks, batches=e.batches, panels=e.panels,
                advance=advance,
            )  # fmt: skip

            def panels() -> Iterator[tuple[str, Image.Image]]:
                for number, p in enumerate(found.pictures):
                    record = dataset.images[p.image_id]
                    drawn = click_panel(
                        record.open(), p.truth, p.masks, p.ious, p.clicks, title=record.file.name
                    )
                    yield f"{number}", drawn

            def write(folder: Path, base: Validated | None, about: Mapping[str, Any]) -> None:
                before = None if base is None else base.found
                write_click_evaluation(folder, dataset, found, before, about=about)

            return Validated(found.metrics, panels, write, found=found)

        return validate
