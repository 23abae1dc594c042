"""Batches of objects to click on, from the same data sets and with the same transforms as the detector's.

As in sam3jax.data.loader a batch is a function of its number alone. A training picture shows up to
`clicks.objects` of its objects, drawn anew each epoch; evaluation shows every object once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sam3jax.config import Config, ConfigError
from sam3jax.data import transforms
from sam3jax.data.augmentation import Change
from sam3jax.data.examples import Arrays, move_instance, stack
from sam3jax.data.features import FeatureStore
from sam3jax.data.judgements import nearly_all
from sam3jax.data.ledger import DataError
from sam3jax.data.loader import EvalLoader, TrainLoader, change_of
from sam3jax.data.records import Annotation, Dataset, ImageRecord
from sam3jax.data.sampling import Order, fingerprint
from sam3jax.data.stored_clicks import is_in_box
from sam3jax.data.streams import ENDLESS, Opaque, local_size, run_ahead
from sam3jax.types import ClickBatch

NO_POINT = -2
MOST_STORED = 16
_SEVERAL = 5  # stored clicks beside their objects that are no slip of the hand


def clickable(record: ImageRecord) -> tuple[Annotation, ...]:
    """The objects of a picture that have a mask; regions of a crowd are no objects.

    An object that is annotated under two categories is one object.
    """
    found = (a for a in record.annotations if a.segmentation is not None and not a.iscrowd)
    return tuple({(a.bbox, a.area): a for a in found}.values())


def with_objects(dataset: Dataset) -> Dataset:
    """The pictures with something to click on. Raises DataError where there are none."""
    images = tuple(record for record in dataset.images if clickable(record))
    if not images:
        raise DataError(
            f"{dataset.name} has no object with a mask, so there is nothing to click on: clicks need "
            "`segmentation` in the annotations (polygons or RLE), boxes are not enough"
        )
    return replace(dataset, images=images)


def make_click_loader(
    dataset: Dataset,
    config: Config,
    *,
    features: FeatureStore | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainLoader:
    """Shuffled, augmented ClickBatches of config.batch_size pictures, this process's rows of them.

    Pictures without an object that has a mask are left out. features: of `with_objects(dataset)`, as in
    `make_train_loader`. Raises ConfigError and DataError.
    """
    if (config.data.min_size or 0) > config.model.image_size:
        raise ConfigError(
            f"config key data.min_size: {config.data.min_size} is larger than model.image_size "
            f"{config.model.image_size}; random edges lie between the two"
        )
    rows = tuple(row for row, record in enumerate(dataset.images) if clickable(record))
    dataset = with_objects(dataset)
    local = local_size(config.batch_size, process_count, "batch_size")
    order = Order(dataset, config.seed, config.data.repeat_threshold)
    batch_of = Opaque(
        _train_batch,
        dataset=dataset,
        rows=rows,
        order=order,
        config=config,
        objects=objects_of(dataset, config),
        stored=stored_clicks(dataset),
        features=features,
        stride=config.batch_size,
        offset=process_index * local,
        local=local,
    )
    identity = {**fingerprint(dataset), "seed": config.seed}

    def stream(start: int) -> Iterator[ClickBatch]:
        for arrays in run_ahead(batch_of, start, ENDLESS, config.data.workers):
            yield ClickBatch(**arrays)

    pictures = None
    if features is not None:
        identity["views"] = features.views
        pictures = lambda number: ClickBatch(**batch_of(number, pixels=True))
    return TrainLoader(stream, config.batch_size, identity, len(order), pictures)


def make_click_eval_loader(
    dataset: Dataset,
    config: Config,
    *,
    batch_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalLoader:
    """Every object once, in order, nothing random; pictures with many objects come several times.

    batch_size: pictures over all processes. The picture of a row is `dataset.images[image_id]`.
    """
    batch_size = batch_size or config.evaluation.batch_size
    local = local_size(batch_size, process_count, "evaluation.batch_size")
    most = objects_of(dataset, config)
    rows = tuple(
        (row, found[start : start + most])
        for row, record in enumerate(dataset.images)
        for found in (clickable(record),)
        for start in range(0, len(found), most)
    )
    length = -(-len(rows) // batch_size)
    batch_of = Opaque(
        _eval_batch,
        dataset=dataset,
        rows=rows,
        size=config.model.image_size,
        objects=most,
        stride=batch_size,
        offset=process_index * local,
        local=local,
    )

    def stream() -> Iterator[ClickBatch]:
        for arrays in run_ahead(batch_of, 0, length, config.data.workers):
            yield ClickBatch(**arrays)

    return EvalLoader(stream, length)


def objects_of(dataset: Dataset, config: Config) -> int:
    """Objects of a picture in a batch: no more than the richest picture has."""
    return min(config.clicks.objects, max(len(clickable(r)) for r in dataset.images) or 1)


def stored_clicks(dataset: Dataset) -> int:
    """Clicks that annotations bring with them: the most of one object, 16 at most as SAM 3 reads.

    Raises DataError where they are shares of the picture instead of pixels, or belong to other objects.
    """
    clicked = [(r, a) for r in dataset.images for a in clickable(r) if a.clicks]
    places = np.array([c[:2] for _, a in clicked for c in a.clicks])
    if len(places) and places.max() <= 1 and (places % 1).any():
        record, annotation = clicked[0]
        raise DataError(
            f"{record.file.name}: the stored `points` {[list(c[:2]) for c in annotation.clicks[:2]]} look like "
            f"shares of the picture, as all others of {dataset.name}: they are x, y in pixels, here up to "
            f"{record.width - 1}, {record.height - 1}"
        )
    inner = [(r, c, is_in_box(c[0], c[1], a.bbox)) for r, a in clicked for c in a.clicks if c[2]]
    missed = [(record.file.name, list(click[:2])) for record, click, inside in inner if not inside]
    if len(missed) >= _SEVERAL and nearly_all(len(missed), len(inner)):
        raise DataError(
            f"{len(missed):,} of {len(inner):,} stored clicks with label 1 of {dataset.name} lie outside the box of "
            f"their object (for example {missed[0][0]}, {missed[0][1]}): they are x, y in pixels; is y before x, or "
            f"are they of other objects?"
        )
    return min(max((len(a.clicks) for _, a in clicked), default=0), MOST_STORED)


def _example(
    record: ImageRecord,
    annotations: tuple[Annotation, ...],
    transform: transforms.Transform,
    objects: int,
    change: Change | None = None,
    stored: int = 0,
    features: np.ndarray | None = None,
) -> Arrays:
    """One picture's arrays: the first `objects` of the annotations of which something is left.

    stored: room for the clicks that an annotation brings with it. features: in the place of pixels.
    """
    size_x, size_y = transform.canvas
    if features is None:
        features = transforms.move_picture(transform, record.open(), change)
    out: Arrays = {
        "images": features,
        "masks": np.zeros((objects, size_y, -(-size_x // 8)), np.uint8),
        "valid": np.zeros(objects, bool),
        "points": np.zeros((objects, stored, 2), np.float32),
        "labels": np.full((objects, stored), NO_POINT, np.int32),
    }
    place = 0
    for annotation in annotations:
        if place == objects:
            break
        moved = move_instance(annotation, record, transform, True)
        if moved is None or moved[1] is None:
            continue
        out["masks"][place], out["valid"][place] = transforms.pack_mask(moved[1]), True
        if stored and annotation.clicks:
            found = np.array(annotation.clicks[:stored])
            points, seen = transforms.move_points(transform, found[:, :2])
            out["points"][place, : len(found)] = points
            out["labels"][place, : len(found)] = np.where(seen, found[:, 2], NO_POINT)
        place += 1
    return out


def _train_batch(
    number: int,
    *,
    dataset: Dataset,
    rows: tuple[int, ...],
    order: Order,
    config: Config,
    objects: int,
    stored: int,
    features: FeatureStore | None,
    stride: int,
    offset: int,
    local: int,
    pixels: bool = False,
) -> Arrays:
    """pixels: pictures also where there are features."""
    out = []
    for position in range(number * stride + offset, number * stride + offset + local):
        turn, row = order(position)
        record = dataset.images[row]
        view = turn if features is None else turn % features.views
        transform, change = change_of(record, row, view, config)
        found = clickable(record)
        rng = np.random.default_rng((config.seed, turn, row, 3))
        luck = np.uint32(rng.integers(2**32))
        drawn = tuple(found[k] for k in rng.permutation(len(found)))
        known = None if features is None or pixels else features.read(row, view)
        arrays = _example(record, drawn, transform, objects, change, stored, known)
        out.append(
            {**arrays, "image_id": np.int32(rows[row]), "image_valid": np.True_, "luck": luck}
        )
    return stack(out)


def _eval_batch(
    number: int,
    *,
    dataset: Dataset,
    rows: tuple[tuple[int, tuple[Annotation, ...]], ...],
    size: int,
    objects: int,
    stride: int,
    offset: int,
    local: int,
) -> Arrays:
    out = []
    for position in range(number * stride + offset, number * stride + offset + local):
        row, annotations = rows[min(position, len(rows) - 1)]
        real = position < len(rows)
        record = dataset.images[row]
        transform = transforms.square(record.width, record.height, size)
        arrays = _example(record, annotations, transform, objects)
        place = {"image_id": np.int32(row), "image_valid": np.bool_(real), "luck": np.uint32(0)}
        out.append({**arrays, **place})
    return stack(out)
