"""Batches of numpy arrays with static shapes, from a data set, by grain.

A batch is a function of its number alone: shuffling, prompts and transforms follow from (seed,
epoch, row). So the order does not depend on workers, every process computes its own part of the
same global batch, and the state of an iterator is one number.
"""

from __future__ import annotations

import atexit
import pickle
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np
from absl import flags

from sam3jax.config import Config, ConfigError
from sam3jax.data import prompts as asking
from sam3jax.data import transforms
from sam3jax.data.coco import Annotation, Dataset, ImageRecord, decode_mask
from sam3jax.data.pictures import DataError, read_picture
from sam3jax.data.prompts import NO_CATEGORY, Question, Shapes
from sam3jax.types import Batch, Prompts, Targets

Arrays = dict[str, np.ndarray]
_ENDLESS = 2**40


@dataclass(frozen=True)
class EvalBatch:
    """A batch with what its rows and columns mean.

    category_ids [I, P] int, the category each prompt asks, -1 for padding. The picture of a row is
    `dataset.images[batch.image_id[i]]`; rows without `batch.image_valid` only fill up.
    """

    batch: Batch
    category_ids: np.ndarray


class TrainLoader:
    """An endless iterator over this process's part of the training batches, with a small state."""

    def __init__(self, stream: Callable[[int], Iterator[Batch]], batch_size: int, identity: dict):
        self._stream, self._batch_size, self._identity = stream, batch_size, identity
        self._next, self._iterator = 0, None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
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

    def get_state(self) -> dict[str, int]:
        """What `set_state` needs to continue behind the batch handed out last; fits into JSON."""
        return {"pictures_seen": self._next * self._batch_size, **self._identity}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue exactly there. Raises DataError where the data are not those of the state."""
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise DataError(
                    f"cannot resume: the checkpoint was made with {key} {state.get(key)}, now it is "
                    f"{value}; restore the data or setting, or start a new run (output=...)"
                )
        self.close()
        self._next = state["pictures_seen"] // self._batch_size


class EvalLoader:
    """Iterable of EvalBatch, from the start each time; `len` batches, the same on every process."""

    def __init__(self, stream: Callable[[], Iterator[EvalBatch]], length: int):
        self._stream, self._length = stream, length

    def __iter__(self) -> Iterator[EvalBatch]:
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
    process_index: int = 0,
    process_count: int = 1,
) -> TrainLoader:
    """Shuffled, augmented batches of config.batch_size pictures, this process's rows of them.

    phrases: `vocabulary(...)`; tokens [V, N], one row for each; they become `Batch.tokens`.
    shapes: default `training_shapes(dataset, config.data)`. Raises ConfigError and DataError.
    """
    if (config.data.min_size or 0) > config.model.image_size:
        raise ConfigError(
            f"config key data.min_size: {config.data.min_size} is larger than model.image_size "
            f"{config.model.image_size}; random edges lie between the two"
        )
    shapes = shapes or asking.training_shapes(dataset, config.data)
    local = _local_size(config.batch_size, process_count, "batch_size")
    order = grain.MapDataset.range(len(dataset.images)).seed(config.seed).shuffle().repeat()
    batch_of = partial(
        _train_batch,
        dataset=dataset,
        names=asking.phrases_of(dataset),
        order=order,
        text_ids={phrase: k for k, phrase in enumerate(phrases)},
        config=config,
        shapes=shapes,
        stride=config.batch_size,
        offset=process_index * local,
        local=local,
    )
    identity = {"pictures": len(dataset.images), "seed": config.seed}

    def stream(start: int) -> Iterator[Batch]:
        for arrays in _run(batch_of, start, _ENDLESS, config.data.workers):
            yield _batch(arrays, tokens)

    return TrainLoader(stream, config.batch_size, identity)


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
    them empty (num_targets 0), for evaluation that reads the truth from `dataset` itself.
    """
    shapes = shapes or asking.evaluation_shapes(dataset, config.data)
    names = asking.phrases_of(dataset)
    batch_size = batch_size or config.evaluation.batch_size
    local = _local_size(batch_size, process_count, "evaluation.batch_size")
    rows = tuple(
        (row, questions)
        for row, record in enumerate(dataset.images)
        for questions in asking.evaluation_questions(
            record, names, prompts=shapes.prompts, targets=shapes.targets
        )
    )
    length = -(-len(rows) // batch_size)
    batch_of = partial(
        _eval_batch,
        dataset=dataset,
        rows=rows,
        text_ids={phrase: k for k, phrase in enumerate(phrases)},
        size=config.model.image_size,
        masks=config.loss.reads_masks and targets,
        targets=targets,
        shapes=shapes,
        stride=batch_size,
        offset=process_index * local,
        local=local,
    )

    def stream() -> Iterator[EvalBatch]:
        for arrays in _run(batch_of, 0, length, config.data.workers):
            yield EvalBatch(_batch(arrays, tokens), arrays["category_ids"])

    return EvalLoader(stream, length)


def example(
    record: ImageRecord,
    questions: tuple[Question, ...],
    transform: transforms.Transform,
    text_ids: dict[str, int],
    shapes: Shapes,
    *,
    masks: bool = True,
) -> Arrays:
    """One row of a batch, every array of Batch, Prompts and Targets without its first axis.

    Instances that the transform leaves outside the picture are no targets.
    """
    P, T, M, G = shapes.prompts, shapes.targets, shapes.instances, shapes.exemplars
    size_x, size_y = transform.canvas
    out: Arrays = {
        "images": transforms.move_picture(
            transform, read_picture(record.file, record.width, record.height)
        ),
        "text_id": np.zeros(P, np.int32),
        "valid": np.zeros(P, bool),
        "box_prompts": np.zeros((P, G, 4), np.float32),
        "box_labels": np.zeros((P, G), np.int32),
        "box_valid": np.zeros((P, G), bool),
        "boxes": np.zeros((M, 4), np.float32),
        "masks": np.zeros((M, size_y, -(-size_x // 8)), np.uint8),
        "mask_valid": np.zeros(M, bool),
        "index": np.full((P, T), M, np.int32),
        "num_targets": np.zeros(P, np.int32),
        "is_exhaustive": np.ones(P, bool),
        "category_ids": np.full(P, NO_CATEGORY, np.int64),
    }
    slots: dict[int, int] = {}  # annotation index -> row of `boxes` and `masks`
    for k in dict.fromkeys(k for question in questions for k in question.targets):
        moved = _move_instance(record.annotations[k], record, transform, masks)
        if moved is not None:
            slots[k] = m = len(slots)
            out["boxes"][m], mask = moved
            if mask is not None:
                out["masks"][m], out["mask_valid"][m] = transforms.pack_mask(mask), True
    for p, question in enumerate(questions):
        targets = [slots[k] for k in question.targets if k in slots]
        shown = [slots[k] for k in question.exemplars if k in slots][:G]
        if question.phrase == asking.VISUAL and not shown:
            continue  # a question without a phrase and without a box asks nothing
        out["text_id"][p] = text_ids[question.phrase]
        out["valid"][p] = True
        out["category_ids"][p] = question.category_id
        out["index"][p, : len(targets)] = targets
        out["num_targets"][p] = len(targets)
        out["is_exhaustive"][p] = question.exhaustive
        out["box_prompts"][p, : len(shown)] = out["boxes"][shown]
        out["box_labels"][p, : len(shown)] = 1
        out["box_valid"][p, : len(shown)] = True
    return out


def _move_instance(
    annotation: Annotation, record: ImageRecord, transform: transforms.Transform, masks: bool
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Box and mask (None: no usable one) on the canvas, or None where nothing is left of it."""
    box = transforms.move_boxes(transform, np.array(annotation.bbox))
    if box[2] <= 0 or box[3] <= 0:
        return None
    cut = transform.crop != (0, 0, record.width, record.height)
    if annotation.segmentation is None or not (masks or cut):
        return box, None
    mask = decode_mask(annotation, record.height, record.width)
    if cut:
        left, top, width, height = transform.crop
        rows = slice(int(top), int(np.ceil(top + height)))
        columns = slice(int(left), int(np.ceil(left + width)))
        if mask.any() and not mask[rows, columns].any():
            return None  # the box reaches into the crop, the instance does not
    moved = transforms.move_mask(transform, mask)
    if not moved.any():
        return box, None  # thinner than a pixel
    return (transforms.box_of_mask(moved) if cut else box), (moved if masks else None)


def _train_batch(
    number: int,
    *,
    dataset: Dataset,
    names: dict[int, str],
    order: grain.MapDataset,
    text_ids: dict[str, int],
    config: Config,
    shapes: Shapes,
    stride: int,
    offset: int,
    local: int,
) -> Arrays:
    rows = []
    for position in range(number * stride + offset, number * stride + offset + local):
        epoch, row = position // len(dataset.images), int(order[position])
        record = dataset.images[row]
        questions = asking.training_questions(
            record,
            names,
            config.data,
            targets=shapes.targets,
            seed=config.seed,
            epoch=epoch,
            row=row,
        )
        rng = np.random.default_rng((config.seed, epoch, row, 1))
        size = config.model.image_size
        transform = transforms.draw_transform(rng, record.width, record.height, size, config.data)
        arrays = example(
            record, questions, transform, text_ids, shapes, masks=config.loss.reads_masks
        )
        rows.append({**arrays, "image_id": np.int32(row), "image_valid": np.True_})
    return _stack(rows)


def _eval_batch(
    number: int,
    *,
    dataset: Dataset,
    rows: tuple[tuple[int, tuple[Question, ...]], ...],
    text_ids: dict[str, int],
    size: int,
    masks: bool,
    targets: bool,
    shapes: Shapes,
    stride: int,
    offset: int,
    local: int,
) -> Arrays:
    out = []
    for position in range(number * stride + offset, number * stride + offset + local):
        row, questions = rows[min(position, len(rows) - 1)]
        real = position < len(rows)
        if not real:
            questions = ()
        elif not targets:
            questions = tuple(Question(q.phrase, q.category_id) for q in questions)
        record = dataset.images[row]
        transform = transforms.square(record.width, record.height, size)
        arrays = example(record, questions, transform, text_ids, shapes, masks=masks)
        out.append({**arrays, "image_id": np.int32(row), "image_valid": np.bool_(real)})
    return _stack(out)


def _stack(rows: list[Arrays]) -> Arrays:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _batch(arrays: Arrays, tokens: np.ndarray) -> Batch:
    return Batch(
        images=arrays["images"],
        tokens=np.asarray(tokens, np.int32),
        prompts=Prompts(
            text_id=arrays["text_id"],
            valid=arrays["valid"],
            boxes=arrays["box_prompts"],
            box_labels=arrays["box_labels"],
            box_valid=arrays["box_valid"],
        ),
        targets=Targets(
            boxes=arrays["boxes"],
            masks=arrays["masks"],
            mask_valid=arrays["mask_valid"],
            index=arrays["index"],
            num_targets=arrays["num_targets"],
            is_exhaustive=arrays["is_exhaustive"],
        ),
        image_valid=arrays["image_valid"],
        image_id=arrays["image_id"],
    )


def _run(
    batch_of: Callable[[int], Arrays], start: int, stop: int, workers: int
) -> Iterator[Arrays]:
    """batch_of(start), batch_of(start + 1), ... computed ahead by threads or worker processes."""
    batches = grain.MapDataset.range(start, stop).map(batch_of)
    # Batches hold masks and are large: grain's own default would keep 500 of them.
    ahead = grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=2)
    if not workers:
        return iter(batches.to_iter_dataset(ahead))
    if not flags.FLAGS.is_parsed():  # grain asks absl, which only absl's own main() sets up
        flags.FLAGS.mark_as_parsed()
    # As bytes: grain moves arrays through /dev/shm, which is 64 MB in a container.
    packed = batches.map(pickle.dumps).to_iter_dataset(ahead)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    stream = _unpacked(packed.mp_prefetch(options))
    _open_streams.add(stream)
    return stream


def _unpacked(packed: grain.IterDataset) -> Generator[Arrays]:
    iterator = iter(packed)
    try:
        yield from map(pickle.loads, iterator)
    finally:
        iterator.close()


_open_streams: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """End worker processes while there is still an interpreter: later they end with tracebacks."""
    for stream in list(_open_streams):
        stream.close()


def _local_size(size: int, processes: int, key: str) -> int:
    if size % processes:
        raise DataError(
            f"{key} {size} does not divide among {processes} processes: use a multiple of {processes}"
        )
    return size // processes
