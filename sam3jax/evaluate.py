"""Evaluation: `python -m sam3jax.evaluate --run RUN`, and the same as a function for the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sam3jax.config import EvalConfig
from sam3jax.data.coco import Dataset
from sam3jax.data.loader import EvalBatch
from sam3jax.detector import BatchDetector, Detector, Variables
from sam3jax.metrics import Evaluation, Pair, measure
from sam3jax.postprocess import Candidates, full_size

__all__ = ["Detector", "Evaluation", "detections_to_keep", "evaluate_dataset", "predict_dataset"]


def evaluate_dataset(
    detector: Detector,
    variables: Variables,
    loader: Iterable[EvalBatch],
    dataset: Dataset,
    config: EvalConfig,
    *,
    batches: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Ask a model every question of the loader and measure its answers against the data set.

    detector: `Detector(model, config, limit=detections_to_keep(dataset, config))`, made once.
    batches: look at no more than these; only what was asked is counted. thresholds: score of each
    category from which a detection counts, instead of config.threshold. advance: called per batch.
    """
    predictions: list[dict[str, Any]] = []
    asked: set[Pair] = set()
    for pairs, found in predict_dataset(detector, variables, loader, dataset, config, batches):
        asked |= pairs
        predictions += found
        advance()
    return measure(
        dataset, predictions, threshold=config.threshold, thresholds=thresholds, asked=asked
    )


def predict_dataset(
    detector: Detector,
    variables: Variables,
    loader: Iterable[EvalBatch],
    dataset: Dataset,
    config: EvalConfig,
    batches: int | None = None,
) -> Iterator[tuple[set[Pair], list[dict[str, Any]]]]:
    """For each batch what was asked, and the COCO results at the pictures' own size.

    The device works on the next batch while this one's masks are enlarged.
    """
    run = BatchDetector(detector, variables)
    waiting: tuple[EvalBatch, Candidates] | None = None
    for number, batch in enumerate(loader):
        if batches is not None and number >= batches:
            break
        running = (batch, run(batch.batch))
        if waiting is not None:
            yield _results(*waiting, dataset, config)
        waiting = running
    if waiting is not None:
        yield _results(*waiting, dataset, config)


def detections_to_keep(dataset: Dataset, config: EvalConfig) -> int:
    """Detections per picture and phrase: config.max_detections, or more where the data have more."""
    most = 0
    for image in dataset.images:
        categories = [a.category_id for a in image.annotations if not a.iscrowd]
        most = max(most, *(categories.count(i) for i in set(categories)), 0)
    return max(most, config.max_detections)


def _results(
    batch: EvalBatch, candidates: Candidates, dataset: Dataset, config: EvalConfig
) -> tuple[set[Pair], list[dict[str, Any]]]:
    candidates = jax.device_get(candidates)
    prompts = batch.category_ids.shape[1]
    rows, columns = np.nonzero(batch.batch.prompts.valid & batch.batch.image_valid[:, None])
    asked, results = set(), []
    for row, column in zip(rows.tolist(), columns.tolist()):
        image = dataset.images[batch.batch.image_id[row]]
        category = int(batch.category_ids[row, column])
        found = full_size(
            candidates,
            row * prompts + column,
            image.height,
            image.width,
            floor=config.score_floor,
            mask_threshold=config.mask_threshold,
        )
        asked.add((image.id, category))
        results += found.to_coco(image.id, category)
    return asked, results
