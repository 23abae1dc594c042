"""Clips: the detector trained on several frames of a video. Answers to Sam3LossWrapper over stages.

A stage is a time step. Every frame is a picture of its own to the model; the loss has one normaliser
per stage and adds the stages up. Frames are worked off a few at a time and computed again for the
gradient, so memory follows those few, not the clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from PIL import Image

from sam3jax.data.clip_loader import make_clip_loader
from sam3jax.data.loader import TrainLoader
from sam3jax.data.prompts import tokenize, vocabulary
from sam3jax.data.records import Dataset
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.data.video_sets import open_videos, pictures_of, sampling_of
from sam3jax.data.videos import VideoDataset, describe_videos
from sam3jax.evaluation.progress import Advance, untold
from sam3jax.evaluation.steadiness import steadiness_of
from sam3jax.losses.detection import Shares, part_shares, weigh
from sam3jax.losses.totals import Totals, count_totals
from sam3jax.tasks.cached_trunk import clip_views, empty_store, fill_store
from sam3jax.tasks.detection import Detection, DetectionData, asked, encode_asked, forward
from sam3jax.tasks.validated import Ask, Validated
from sam3jax.types import AXIS, ClipBatch, TextFeatures
from sam3jax.viewing.batches import draw_batch
from sam3jax.viewing.draw import found_instances, true_instances
from sam3jax.viewing.film import evenly, strip
from sam3jax.viewing.shown import Shown
from sam3jax.weights.tree import Tree

_SPLIT: Any = P(AXIS)  # specs stand in a batch where arrays do
_EVERYWHERE: Any = P()
_SHOWN = 6  # frames of a strip


class ClipsData(NamedTuple):
    """valid: None without a validation split. phrases: of both; tokens [V, N]. notes: lines about use."""

    train: VideoDataset
    valid: VideoDataset | None
    phrases: tuple[str, ...]
    tokens: np.ndarray
    notes: list[str]


class Clips(Detection):
    """The task `clips`; see `tasks.Task` for what each method is for."""

    batch_spec: Any = ClipBatch(
        images=_SPLIT, tokens=_EVERYWHERE, prompts=_SPLIT, targets=_SPLIT, image_valid=_SPLIT,
        image_id=_SPLIT, clip=_SPLIT, frame=_SPLIT, stage=_SPLIT, object_id=_SPLIT,
    )  # fmt: skip

    @property
    def together(self) -> int:
        return self.config.clips.frames

    def open(self, tokenizer: Tokenizer) -> Any:
        train, valid, notes = open_videos(self.config)
        pictures = [pictures_of(d) for d in (train, valid) if d is not None]
        phrases = vocabulary(self.config.data, *pictures)
        return ClipsData(train, valid, phrases, tokenize(phrases, tokenizer), notes)

    def describe(self, data: Any) -> Iterator[str]:
        for dataset in (data.train, data.valid):
            if dataset is not None:
                yield from describe_videos(dataset)
        yield from data.notes
        if self._features is not None:
            yield self._features.line

    def loader(self, data: Any, **process: int) -> TrainLoader:
        config, rows = self.config, len(data.train.videos)
        processes = process.get("process_count", 1)
        self._features = empty_store(config, rows, processes, frames=config.clips.frames)
        self._loader = make_clip_loader(
            data.train, data.phrases, data.tokens, config, sampling_of(config), features=self._features, **process
        )  # fmt: skip
        return self._loader

    def keep(self, frozen: Tree, data: Any, mesh: Mesh) -> None:
        """Trunk features of the clips, where the run asks for them."""
        if self._features is not None:
            views = clip_views(data.train, self.config, sampling_of(self.config))
            fill_store(self._features, self.config, views, self.asked, frozen, mesh)

    def draw(self, data: Any, batch: Any) -> Image.Image:
        title = lambda k: f"clip {int(batch.clip[k])}, frame {int(batch.frame[k])} of its video"
        batch = batch if self._loader is None else self._loader.with_pictures(batch)
        return draw_batch(batch, data.phrases, title)

    def count(self, batch: Any) -> Totals:
        edge = 4 * self.config.model.grid
        return count_totals(
            batch.targets, asked(batch), self.config.loss, prediction_size=(edge, edge),
            stage=batch.stage, stages=self.config.clips.frames, axis_names=(AXIS,),
        )  # fmt: skip

    def loss(
        self,
        variables: Tree,
        prepared: TextFeatures | None,
        batch: Any,
        totals: Totals,
        key: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        config, text = self.config.loss, prepared
        if text is None:  # here, not frame by frame: each phrase once
            text, prompts = encode_asked(self.model, variables, batch, key)
            batch = batch.replace(prompts=prompts)
        tokens = batch.tokens

        def shares(frames: ClipBatch, key: jax.Array) -> Shares:
            outputs = forward(self.model, variables, text, frames.replace(tokens=tokens), key)
            return part_shares(
                outputs, frames.targets, asked(frames), config, totals, stage=jnp.asarray(frames.stage),
                axis_names=(AXIS,), point_rng=jax.random.fold_in(key, 1),
            )  # fmt: skip

        parts = len(batch.images) // _at_once(len(batch.images), self.config.clips.frames_at_once)
        frames = batch.replace(tokens=None)
        if parts == 1:
            return weigh(shares(frames, key), config, totals, (AXIS,))
        # Not for common subexpressions: inside a loop XLA does not merge the two passes.
        again = jax.checkpoint(
            lambda part: shares(part[0], jax.random.fold_in(key, part[1])), prevent_cse=False
        )
        split = jax.tree.map(lambda x: x.reshape(parts, len(x) // parts, *x.shape[1:]), frames)
        each = jax.lax.map(again, (split, jnp.arange(parts)))
        return weigh(jax.tree.map(lambda x: x.sum(0), each), config, totals, (AXIS,))

    def validation(self, data: Any, mesh: Mesh, **process: int) -> Ask | None:
        """The frames as pictures; beside their metrics how steady scores are from frame to frame."""
        if data.valid is None:
            return None
        videos, pictures, e = data.valid, pictures_of(data.valid), self.config.evaluation
        as_pictures = DetectionData(pictures, pictures, data.phrases, data.tokens)
        ask = super().validation(as_pictures, mesh, **process)
        assert ask is not None

        def validate(variables: Tree, prepared: Any, advance: Advance = untold) -> Validated:
            found = ask(variables, prepared, advance)
            asked = {p["image_id"] for p in found.found.predictions}
            records = [r for r in pictures.images if r.id in asked or e.batches is None]
            steady = steadiness_of(records, found.found.predictions)
            metrics = {**found.metrics, "video/steadiness": steady}
            shown = Shown.by(e, found.thresholds)

            def panels() -> Iterator[tuple[str, Image.Image]]:
                yield from strips(videos, pictures, found.found.predictions, shown, e.panels)

            return replace(found, metrics=metrics, panels=panels)

        return validate


def strips(
    videos: VideoDataset,
    pictures: Dataset,
    predictions: list[dict[str, Any]],
    shown: Shown,
    count: int,
) -> Iterator[tuple[str, Image.Image]]:
    """The first `count` videos: truth above, detections below, a few annotated frames of each."""
    first = 0
    for row, video in enumerate(videos.videos[:count]):
        records = {r.frame: r for r in pictures.images[first : first + len(video.annotated)]}
        first += len(video.annotated)
        by_frame: dict[int, list[dict[str, Any]]] = {r.id: [] for r in records.values()}
        for p in predictions:
            if p["image_id"] in by_frame:
                by_frame[p["image_id"]].append(p)

        def truth(number: int, records=records) -> list:
            ids = [a.id for a in records[number].annotations if not a.iscrowd]
            drawn = true_instances(records[number], pictures.categories)
            # One colour for an object in all frames.
            return [replace(i, number=id % 64) for i, id in zip(drawn, ids, strict=True)]

        def seen(number: int, records=records, by_frame=by_frame) -> list:
            return found_instances(by_frame[records[number].id], pictures.categories, shown)

        numbers = [video.annotated[k] for k in evenly(len(video.annotated), _SHOWN)]
        yield f"{row}", strip(video.frames, numbers, [("truth", truth), ("found", seen)])


def _at_once(frames: int, most: int) -> int:
    """The largest divisor of `frames` that is at most `most`."""
    return max(n for n in range(1, min(frames, most) + 1) if frames % n == 0)
