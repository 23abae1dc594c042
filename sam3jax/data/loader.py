"""Batches of numpy arrays with static shapes, from a data set, by grain.

A batch is a function of its number alone: shuffling, prompts and transforms follow from (seed,
epoch, row). So the order does not depend on workers, every process computes its own part of the
same global batch, and the state of an iterator is one number.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sam3jax.config import Config, ConfigError
from sam3jax.data import prompts as asking
from sam3jax.data import transforms
from sam3jax.data.augmentation import Change, draw_change
from sam3jax.data.examples import Arrays, example, stack, to_batch
from sam3jax.data.features import FeatureStore
from sam3jax.data.ledger import DataError
from sam3jax.data.prompts import Question, Shapes
from sam3jax.data.records import Dataset, ImageRecord
from sam3jax.data.sampling import Order, fingerprint
from sam3jax.data.streams import ENDLESS, local_size, run_ahead
from sam3jax.types import Batch


@dataclass(frozen=True)
class EvalBatch:
    """A batch with what its rows and columns mean.

    category_ids [I, P] int, the category each prompt asks, -1 for padding. The picture of a row is
    `dataset.images[batch.image_id[i]]`; rows without `batch.image_valid` only fill up.
    """

    batch: Batch
    category_ids: np.ndarray


class TrainLoader:
    """An endless iterator over this process's part of the training batches, with a small state.

    epoch: pictures (of clips: frames) after which every one was shown, over all processes.
    """

    def __init__(
        self,
        stream: Callable[[int], Iterator[Any]],
        batch_size: int,
        identity: dict[str, int],
        epoch: int,
        pictures: Callable[[int], Any] | None = None,
    ) -> None:
        """pictures(number): a batch with its pictures, where the stream's batches hold their features."""
        self._pictures = pictures
        self._stream, self._batch_size, self._identity = stream, batch_size, identity
        self.epoch = epoch
        self._next = 0
        self._iterator: Any = None  # of the stream, a generator

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._stream(self._next)
        batch = next(self._iterator)
        self._next += 1
        return batch

    def close(self) -> None:
        """Stop what computes ahead; the next batch starts it again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def with_pictures(self, batch: Any) -> Any:
        """The batch handed out last, with pictures where it holds features."""
        return batch if self._pictures is None else self._pictures(self._next - 1)

    def get_state(self) -> dict[str, int]:
        """What `set_state` needs to continue behind the batch handed out last; fits into JSON."""
        return {"pictures_seen": self._next * self._batch_size, **self._identity}

    def set_state(self, state: dict[str, int], *, force: bool = False) -> None:
        """Continue exactly there. Raises DataError where the data are not those of the state, unless `force`."""
        changed = [
            f"{key} {state[key]} -> {value}"
            for key, value in self._identity.items()
            if key in state and state[key] != value
        ]
        if changed and not force:
            raise DataError(
                f"cannot resume: the data are not those of the checkpoint ({', '.join(changed)}); restore the data or "
                "setting, start a new run (output=...), or continue with the new data (resume=force)"
            )
        self.close()
        self._next = state["pictures_seen"] // self._batch_size


class EvalLoader:
    """Iterable of batches, from the start each time; `len` batches, the same on every process."""

    def __init__(self, stream: Callable[[], Iterator[Any]], length: int):
        self._stream, self._length = stream, length

    def __iter__(self) -> Iterator[Any]:
        return self._stream()

    def __len__(self) -> int:
        return self._length


def make_train_loader(
    dataset: Dataset,
    phrases: tuple[str, ...],
    tokens: np.ndarray,
    config: Config,
    *,
    shapes: Shapes | None = None,
    valid: Dataset | None = None,
    features: FeatureStore | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainLoader:
    """Shuffled, augmented batches of config.batch_size pictures, this process's rows of them.

    phrases: `vocabulary(...)`; tokens [V, N], one row for each; they become `Batch.tokens`.
    shapes: default `training_shapes(dataset, config.data)`. valid: what the run validates on, which a resumed
    run must find again as well. features: what the trunk makes of the pictures, read in their place; there are
    as many views of a picture as it holds. Raises ConfigError and DataError.
    """
    if (config.data.min_size or 0) > config.model.image_size:
        raise ConfigError(
            f"config key data.min_size: {config.data.min_size} is larger than model.image_size "
            f"{config.model.image_size}; random edges lie between the two"
        )
    rows = _Rows(config.batch_size, process_index, process_count, "batch_size")
    batch_of = _TrainBatch(
        dataset,
        phrases,
        config,
        shapes or asking.training_shapes(dataset, config.data),
        rows,
        features,
    )
    identity = {**fingerprint(dataset), "seed": config.seed}
    identity["phrases"] = zlib.crc32("\0".join(phrases).encode("utf-8", "replace"))
    if valid is not None:
        identity |= {f"validation {key}": value for key, value in fingerprint(valid).items()}

    def stream(start: int) -> Iterator[Batch]:
        for arrays in run_ahead(batch_of, start, ENDLESS, config.data.workers):
            yield to_batch(arrays, tokens)

    pictures = None
    if features is not None:
        identity["views"] = features.views
        pictures = lambda number: to_batch(batch_of(number, pixels=True), tokens)
    return TrainLoader(stream, config.batch_size, identity, len(batch_of.order), pictures)


def view_of(dataset: Dataset, row: int, view: int, config: Config) -> np.ndarray:
    """Pixels [Y, X, 3] uint8 of a picture as that turn of a training shows it."""
    transform, change = change_of(dataset.images[row], row, view, config)
    return transforms.move_picture(transform, dataset.images[row].open(), change)


def change_of(
    record: ImageRecord, row: int, turn: int, config: Config
) -> tuple[transforms.Transform, Change | None]:
    """Where a picture goes in a turn of the data, and how its pixels change."""
    place = (config.seed, turn, row)
    size = config.model.image_size
    transform = transforms.draw_transform(
        np.random.default_rng((*place, 1)), record.width, record.height, size, config.data
    )
    return transform, draw_change(np.random.default_rng((*place, 2)), config.data)


def make_eval_loader(
    dataset: Dataset,
    phrases: tuple[str, ...],
    tokens: np.ndarray,
    config: Config,
    *,
    shapes: Shapes | None = None,
    batch_size: int | None = None,
    targets: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalLoader:
    """Every category asked of every picture, in order, nothing random; the last batch filled up.

    batch_size: rows over all processes, default config.evaluation.batch_size. targets: False leaves
    them empty (num_targets 0, M 0), for evaluation that reads the truth from `dataset` itself. Raises DataError.
    """
    shapes = shapes or asking.evaluation_shapes(dataset, config.data)
    batch_size = batch_size or config.evaluation.batch_size
    rows = _Rows(batch_size, process_index, process_count, "evaluation.batch_size")
    batch_of = _EvalBatch(dataset, phrases, config, shapes, rows, targets)
    if not batch_of.length:
        raise DataError(
            f"{dataset.name} has no usable annotation, so there is no phrase to ask and nothing to measure: give "
            "pictures of which some are annotated (all phrases are asked of the empty ones among them too), or look "
            "at pictures without annotations with predict"
        )

    def stream() -> Iterator[EvalBatch]:
        for arrays in run_ahead(batch_of, 0, batch_of.length, config.data.workers):
            yield EvalBatch(to_batch(arrays, tokens), arrays["category_ids"])

    return EvalLoader(stream, batch_of.length)


class _Rows:
    """Which positions of the global order are this process's rows of a batch."""

    def __init__(self, batch_size: int, process: int, processes: int, key: str) -> None:
        self.batch_size, self._local = batch_size, local_size(batch_size, processes, key)
        self._offset = process * self._local

    def __call__(self, number: int) -> range:
        start = number * self.batch_size + self._offset
        return range(start, start + self._local)


class _TrainBatch:
    """number -> arrays of that training batch. Its repr is short: grain names transforms by it."""

    def __init__(
        self,
        dataset: Dataset,
        phrases: tuple[str, ...],
        config: Config,
        shapes: Shapes,
        rows: _Rows,
        features: FeatureStore | None = None,
    ) -> None:
        self._dataset, self._config, self._shapes, self._rows = dataset, config, shapes, rows
        self._features = features
        self._names = asking.trained_phrases(dataset)
        self._text_ids = {phrase: k for k, phrase in enumerate(phrases)}
        self.order = Order(dataset, config.seed, config.data.repeat_threshold)

    def __repr__(self) -> str:
        return "TrainBatch"

    def __call__(self, number: int, pixels: bool = False) -> Arrays:
        """pixels: pictures also where there are features."""
        pixels |= self._features is None
        return stack([self._row(position, pixels) for position in self._rows(number)])

    def _row(self, position: int, pixels: bool) -> Arrays:
        config = self._config
        turn, row = self.order(position)
        record = self._dataset.images[row]
        place = dict(seed=config.seed, epoch=turn, row=row)
        questions = asking.training_questions(
            record, self._names, config.data, targets=self._shapes.targets, **place
        )
        view = turn if self._features is None else turn % self._features.views
        transform, change = change_of(record, row, view, config)
        masks = config.loss.reads_masks
        arrays = example(
            record, questions, transform, self._text_ids, self._shapes, masks=masks, change=change, pixels=pixels
        )  # fmt: skip
        if not pixels:
            assert self._features is not None
            arrays["images"] = self._features.read(row, view)
        return {**arrays, "image_id": np.array(row, np.int32), "image_valid": np.array(True)}


class _EvalBatch:
    """number -> arrays of that evaluation batch. Questions are made when they are asked: all pairs of
    20,000 pictures and 2,000 categories would fill the memory."""

    def __init__(
        self,
        dataset: Dataset,
        phrases: tuple[str, ...],
        config: Config,
        shapes: Shapes,
        rows: _Rows,
        targets: bool,
    ) -> None:
        self._dataset, self._rows, self._targets = dataset, rows, targets
        self._shapes = shapes if targets else Shapes(shapes.prompts, 1, 0, 0)
        self._names = asking.phrases_of(dataset)
        self._text_ids = {phrase: k for k, phrase in enumerate(phrases)}
        self._size = config.model.image_size
        self._masks = config.loss.reads_masks and targets
        parts = [
            asking.evaluation_parts(record, self._names, shapes.prompts)
            for record in dataset.images
        ]
        self._ends = np.cumsum(parts, dtype=np.int64)
        self._total = int(self._ends[-1]) if parts else 0
        self.length = -(-self._total // rows.batch_size)

    def __repr__(self) -> str:
        return "EvalBatch"

    def __call__(self, number: int) -> Arrays:
        return stack([self._row(position) for position in self._rows(number)])

    def _row(self, position: int) -> Arrays:
        real = position < self._total
        position = min(position, self._total - 1)
        row = int(np.searchsorted(self._ends, position, side="right"))
        record = self._dataset.images[row]
        questions: tuple[Question, ...] = ()
        if real:
            questions = asking.evaluation_part(
                record,
                self._names,
                prompts=self._shapes.prompts,
                targets=self._shapes.targets,
                part=position - (int(self._ends[row - 1]) if row else 0),
            )
        if not self._targets:
            questions = tuple(Question(q.phrase, q.category_id) for q in questions)
        transform = transforms.square(record.width, record.height, self._size)
        arrays = example(
            record, questions, transform, self._text_ids, self._shapes, masks=self._masks
        )
        return {**arrays, "image_id": np.array(row, np.int32), "image_valid": np.array(real)}
