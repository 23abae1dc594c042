"""Box exemplars drawn from errors: how much a model gains from a user who corrects it.

After each answer every question that was answered wrongly gets one more box: around an instance that
was missed, as "like this", or around a detection that is none, as "not like this". Boxes add up, and
the picture is encoded once. Answers to num_interactive_steps_val of sam3.model.sam3_image; the sampler
itself is not part of the published code, the rule is that of the paper (interactive exemplars).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from sam3jax.config import EvalConfig
from sam3jax.data.coco import Dataset
from sam3jax.data.loader import EvalBatch
from sam3jax.evaluation.ground_truth import Pair, Results, Truth, by_pair, overlaps, result_region
from sam3jax.types import Prompts

_RIGHT = 0.5  # IoU from which a detection is an instance
_SAME = 0.9  # IoU of boxes from which one says nothing that the other does not


class Exemplar(NamedTuple):
    """box: x, y, width, height in pixels of the picture; positive: like this, or not like this."""

    box: tuple[float, float, float, float]
    positive: bool


class Corrections:
    """The exemplars of every question so far. Draws follow from the question and the step alone."""

    def __init__(self, dataset: Dataset, config: EvalConfig) -> None:
        self._dataset, self._config = dataset, config
        self._given: dict[Pair, list[Exemplar]] = defaultdict(list)

    def correct(self, asked: Iterable[Pair], results: Results, step: int) -> int:
        """One more exemplar for each question of `asked` that `results` answer wrongly; how many."""
        asked = set(asked)
        truth, grouped, added = Truth(self._dataset, asked), by_pair(results), 0
        rows = {record.id: row for row, record in enumerate(self._dataset.images)}
        for pair in truth.pairs:
            found = [r for r in grouped[pair] if r["score"] >= self._config.threshold]
            given = self._given[pair]
            new = [e for e in errors(truth, pair, found) if not _known(e, given)]
            if new:
                draw = np.random.default_rng((rows[pair[0]], pair[1], step)).integers(len(new))
                given.append(new[int(draw)])
                added += 1
        return added

    def prompts(self, batch: EvalBatch, room: int) -> Prompts:
        """The batch's prompts with the exemplars so far; `room`: G of the legend in `types`."""
        prompts, rows = batch.batch.prompts, np.asarray(batch.batch.image_id)
        shape = (*np.shape(prompts.valid), room)
        boxes = np.zeros((*shape, 4), np.float32)
        labels, valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, column in np.argwhere(prompts.valid & batch.batch.image_valid[:, None]).tolist():
            record = self._dataset.images[rows[row]]
            given = self._given.get((record.id, int(batch.category_ids[row, column])), [])
            for k, exemplar in enumerate(given[:room]):
                x, y, w, h = exemplar.box
                size = np.array([record.width, record.height] * 2)
                boxes[row, column, k] = np.array([x + w / 2, y + h / 2, w, h]) / size
                labels[row, column, k] = exemplar.positive
                valid[row, column, k] = True
        return prompts.replace(boxes=boxes, box_labels=labels, box_valid=valid)


def errors(truth: Truth, pair: Pair, found: Results) -> list[Exemplar]:
    """Instances that no detection of `found` is, and detections that are none.

    One-to-one matching of highest total IoU. What lies on a crowd, or where a picture may hold more
    than is annotated, is no error. Boxes of masks are theirs.
    """
    kind = truth.kinds[-1]
    regions = [result_region(r, kind) for r in found]
    instances, lenient, _ = truth.regions(pair, kind)
    iou = overlaps(regions, instances, crowd=False)
    row, column = linear_sum_assignment(-iou)
    right = iou[row, column] >= _RIGHT
    excused = overlaps(regions, lenient, crowd=True).max(axis=1, initial=0.0) >= _RIGHT
    missed = set(range(len(instances))) - set(column[right].tolist())
    false = set(range(len(regions))) - set(row[right].tolist()) - set(np.flatnonzero(excused))
    return [
        *(Exemplar(_box(instances[k]), True) for k in sorted(missed)),
        *(Exemplar(tuple(found[k]["bbox"]), False) for k in sorted(false)),
    ]


def answer_and_correct(
    ask: Any,
    results: Any,
    loader: Iterable[EvalBatch],
    dataset: Dataset,
    config: EvalConfig,
) -> Iterator[tuple[set[Pair], list[list[dict[str, Any]]]]]:
    """For each batch what was asked, and the COCO results before and after each correction.

    ask: batch -> candidates; results: (EvalBatch, candidates) -> (asked, COCO results).
    """
    for batch in loader:
        corrections = Corrections(dataset, config)  # of this batch: memory does not grow
        asked, found = results(batch, ask(batch.batch))
        rounds = [found]
        for step in range(1, config.interactive_steps + 1):
            if corrections.correct(asked, rounds[-1], step):
                prompts = corrections.prompts(batch, config.interactive_steps)
                _, found = results(batch, ask(batch.batch.replace(prompts=prompts)))
            rounds.append(found)
        yield asked, rounds


def _box(region: Any) -> tuple[float, float, float, float]:
    box: Sequence[float] = region if isinstance(region, list) else coco_mask.toBbox(region).tolist()
    return (box[0], box[1], box[2], box[3])


def _known(exemplar: Exemplar, given: Sequence[Exemplar]) -> bool:
    same = [e.box for e in given if e.positive == exemplar.positive]
    if not same:
        return False
    boxes = np.array([exemplar.box, *same], float)
    return bool((np.asarray(coco_mask.iou(boxes[:1], boxes[1:], [0] * len(same))) > _SAME).any())
