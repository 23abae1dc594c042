"""Ask a model every question of a data set, on all devices of all processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np

from sam3jax.config import EvalConfig
from sam3jax.data.coco import Dataset
from sam3jax.data.loader import EvalBatch, EvalLoader, make_eval_loader
from sam3jax.data.prompts import tokenize, vocabulary
from sam3jax.evaluation.ground_truth import Pair
from sam3jax.evaluation.interactive import answer_and_correct
from sam3jax.evaluation.metrics import Evaluation, measure
from sam3jax.evaluation.processes import of_all_processes
from sam3jax.evaluation.progress import Advance, length, progress, untold
from sam3jax.inference.candidates import Candidates
from sam3jax.inference.detector import BatchDetector, Detector, Variables
from sam3jax.inference.full_size import fetch, full_size
from sam3jax.types import TextFeatures
from sam3jax.weights.run_folder import Run


def evaluate_dataset(
    detector: Detector,
    variables: Variables,
    loader: EvalLoader,
    dataset: Dataset,
    config: EvalConfig,
    *,
    batches: int | None = None,
    text: TextFeatures | None = None,
    thresholds: Mapping[str, float] | None = None,
    advance: Advance = untold,
) -> Evaluation:
    """Ask a model every question of the loader and measure its answers against the data set.

    detector: `Detector(model, config, limit=detections_to_keep(dataset, config))`, made once.
    batches: look at no more than these; only what was asked is counted. text: the encoded phrases of the
    loader's batches, where they are known. thresholds: score of each category from which a detection
    counts, instead of config.threshold. advance: told per batch.
    """
    rounds: list[list[dict[str, Any]]] = [[] for _ in range(config.interactive_steps + 1)]
    asked: set[Pair] = set()
    answers = _rounds if config.interactive_steps else _answers
    total = length(loader, batches)
    answered = answers(detector, variables, loader, dataset, config, batches, text)
    for done, (pairs, found) in enumerate(answered, 1):
        asked |= pairs
        for known, new in zip(rounds, found, strict=True):
            known += new
        advance(done, total)
    asked, rounds = _of_all_processes(asked, rounds)
    count = partial(
        measure, dataset, threshold=config.threshold, thresholds=thresholds, asked=asked
    )
    first = count(rounds[0])
    metrics = dict(first.metrics)
    for step, found in enumerate(rounds[1:], 1):
        corrected = count(found).metrics
        metrics |= {f"exemplars_{step}/{n.replace('/', '_')}": v for n, v in corrected.items()}
    return replace(first, metrics=metrics)


def predict_dataset(
    detector: Detector,
    variables: Variables,
    loader: Iterable[EvalBatch],
    dataset: Dataset,
    config: EvalConfig,
    batches: int | None = None,
    text: TextFeatures | None = None,
) -> Iterator[tuple[set[Pair], list[dict[str, Any]]]]:
    """For each batch what was asked, and the COCO results at the pictures' own size.

    The device works on the next batch while this one's masks are enlarged.
    """
    run = BatchDetector(detector, variables, text)
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


def _answers(*arguments: Any) -> Iterator[tuple[set[Pair], list[list[dict[str, Any]]]]]:
    """`predict_dataset` as one round."""
    for asked, results in predict_dataset(*arguments):
        yield asked, [results]


def _rounds(
    detector: Detector,
    variables: Variables,
    loader: Iterable[EvalBatch],
    dataset: Dataset,
    config: EvalConfig,
    batches: int | None,
    text: TextFeatures | None,
) -> Iterator[tuple[set[Pair], list[list[dict[str, Any]]]]]:
    """`predict_dataset`, and again after each correction."""
    run = BatchDetector(detector, variables, text)
    results = lambda batch, candidates: _results(batch, candidates, dataset, config)
    yield from answer_and_correct(run, results, islice(loader, batches), dataset, config)


def detections_to_keep(dataset: Dataset, config: EvalConfig) -> int:
    """Detections per picture and phrase: config.max_detections, or more where the data have more."""
    most = config.max_detections
    for image in dataset.images:
        instances = Counter(a.category_id for a in image.annotations if not a.iscrowd)
        most = max(most, *instances.values(), 0)
    return most


def _results(
    batch: EvalBatch, candidates: Candidates, dataset: Dataset, config: EvalConfig
) -> tuple[set[Pair], list[dict[str, Any]]]:
    candidates = fetch(candidates, config.score_floor)
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


def _of_all_processes(
    asked: set[Pair], rounds: list[list[dict[str, Any]]]
) -> tuple[set[Pair], list[list[dict[str, Any]]]]:
    """Every process asks about its own pictures; afterwards each knows all answers."""
    everything = of_all_processes([sorted(asked, key=str), rounds])
    asked = {(image, category) for pairs, _ in everything for image, category in pairs}
    return asked, [[r for _, own in everything for r in own[k]] for k in range(len(rounds))]


def evaluate_run(
    run: Run, detector: Detector, dataset: Dataset, *, base: bool = False
) -> Evaluation:
    """A run's tuned weights, or those it started from, on a data set. Raises DataError.

    detector: of the run's model, with room for `detections_to_keep`; shared between calls, so that the
    model is compiled once.
    """
    config = run.config
    phrases = vocabulary(config.data, dataset)
    tokens = tokenize(phrases, run.tokenizer)
    process: dict[str, Any] = dict(
        process_index=jax.process_index(), process_count=jax.process_count()
    )
    size = config.evaluation.batch_size * detector.mesh.size * process["process_count"]
    loader = make_eval_loader(
        dataset, phrases, tokens, config, targets=False, batch_size=size, **process
    )
    variables = run.asked(base)
    with progress(f"{'base' if base else 'tuned'} on {dataset.name}") as advance:
        return evaluate_dataset(
            detector, variables, loader, dataset, config.evaluation, advance=advance
        )
