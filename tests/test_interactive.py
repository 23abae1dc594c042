"""Corrections by boxes in evaluation: which errors they show, and that answers follow them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sam3jax.config import EvalConfig
from sam3jax.data.coco import parse_coco
from sam3jax.data.loader import EvalBatch
from sam3jax.evaluation.ground_truth import Truth
from sam3jax.evaluation.interactive import Corrections, Exemplar, answer_and_correct, errors
from sam3jax.evaluation.metrics import measure
from sam3jax.types import Batch, Prompts

BOXES = [(10.0, 10.0, 30.0, 20.0), (60.0, 10.0, 30.0, 20.0), (10.0, 60.0, 30.0, 30.0)]
CROWD = (100.0, 50.0, 80.0, 40.0)
NAMES = {1: "cat", 2: "dog"}


@pytest.fixture
def dataset():
    """One picture of 200 x 100: three cats, a crowd of cats, no dog."""
    annotations = [
        {"id": k, "image_id": 7, "category_id": 1, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
        for k, box in enumerate(BOXES)
    ]  # fmt: skip
    annotations.append({"id": 9, "image_id": 7, "category_id": 1, "bbox": list(CROWD), "area": 3200, "iscrowd": 1})  # fmt: skip
    annotations.append({"id": 10, "image_id": 8, "category_id": 2, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0})  # fmt: skip
    images = [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 100} for i in (7, 8)]
    categories = [{"id": i, "name": n} for i, n in NAMES.items()]
    raw = {"images": images, "annotations": annotations, "categories": categories}
    return parse_coco(raw, "made", "made", Path)


def result(box, score=0.9, category=1, image=7) -> dict:
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def test_errors_are_what_was_missed_and_what_is_none(dataset):
    truth = Truth(dataset, {(7, 1), (7, 2)})
    nearly = (12.0, 10.0, 30.0, 20.0)
    false = (150.0, 5.0, 20.0, 20.0)
    in_crowd = (110.0, 55.0, 20.0, 20.0)
    found = [result(nearly), result(false), result(in_crowd)]
    wrong = errors(truth, (7, 1), found)
    assert {e.box for e in wrong if e.positive} == set(BOXES[1:])
    assert [e.box for e in wrong if not e.positive] == [false]
    assert errors(truth, (7, 2), []) == []
    assert errors(truth, (7, 2), [result(false, category=2)]) == [Exemplar(false, False)]
    # Two detections of one instance: one of them is none.
    twice = errors(truth, (7, 1), [result(b) for b in (*BOXES, nearly)])
    assert len(twice) == 1
    assert not twice[0].positive


def batch(dataset) -> EvalBatch:
    """Both phrases of the first picture, and a row that fills up."""
    prompts = Prompts(
        text_id=np.array([[0, 1], [0, 0]]),
        valid=np.array([[True, True], [True, False]]),
        boxes=np.zeros((2, 2, 0, 4), np.float32),
        box_labels=np.zeros((2, 2, 0), np.int32),
        box_valid=np.zeros((2, 2, 0), bool),
    )
    fields = dict.fromkeys(Batch.__dataclass_fields__)
    fields |= {"prompts": prompts, "image_id": np.array([0, 0]), "image_valid": np.array([1, 0], bool)}  # fmt: skip
    return EvalBatch(Batch(**fields), np.array([[1, 2], [1, -1]]))


def test_exemplars_lie_in_their_prompt_as_shares_of_the_picture(dataset):
    corrections = Corrections(dataset, EvalConfig())
    assert corrections.correct({(7, 1)}, [result(b) for b in BOXES[:2]], 1) == 1
    assert corrections.correct({(7, 2)}, [result((150, 5, 20, 20), category=2)], 1) == 1
    prompts = corrections.prompts(batch(dataset), 3)
    assert prompts.boxes.shape == (2, 2, 3, 4)
    assert prompts.box_valid.tolist() == [[[True, False, False]] * 2, [[False] * 3] * 2]
    np.testing.assert_allclose(prompts.boxes[0, 0, 0], [25 / 200, 75 / 100, 30 / 200, 30 / 100])
    np.testing.assert_allclose(prompts.boxes[0, 1, 0], [160 / 200, 15 / 100, 20 / 200, 20 / 100])
    assert prompts.box_labels[0, :, 0].tolist() == [1, 0]


def test_weak_detections_and_known_boxes_are_no_new_errors(dataset):
    corrections = Corrections(dataset, EvalConfig(threshold=0.5))
    weak = [result(b) for b in BOXES] + [result((150, 5, 20, 20), score=0.4)]
    assert corrections.correct({(7, 1)}, weak, 1) == 0
    assert corrections.correct({(7, 1)}, [], 1) == 1
    missed = [corrections.correct({(7, 1)}, [], step) for step in (2, 3, 4)]
    assert missed == [1, 1, 0]  # each of the three was shown once


class Pupil:
    """Finds what it was shown, and one false thing until it is told."""

    FALSE = (150.0, 5.0, 20.0, 20.0)

    def ask(self, batch: Batch):
        return batch.prompts

    def results(self, batch: EvalBatch, prompts: Prompts):
        asked, found = set(), []
        for column, category in enumerate(batch.category_ids[0].tolist()):
            asked.add((7, category))
            told = []
            for k in range(prompts.boxes.shape[2]):
                if prompts.box_valid[0, column, k]:
                    x, y, w, h = prompts.boxes[0, column, k] * [200, 100, 200, 100]
                    box = (x - w / 2, y - h / 2, w, h)
                    told.append((box, bool(prompts.box_labels[0, column, k])))
            found += [result(box, category=category) for box, positive in told if positive]
            if category == 1 and all(positive for _, positive in told):
                found.append(result(self.FALSE))
        return asked, found


def test_answers_follow_the_corrections_until_they_are_right(dataset):
    pupil, config = Pupil(), EvalConfig(interactive_steps=4)
    answers = answer_and_correct(pupil.ask, pupil.results, [batch(dataset)], dataset, config)
    ((asked, rounds),) = list(answers)
    assert asked == {(7, 1), (7, 2)}
    assert len(rounds) == 5
    scores = [measure(dataset, found, asked=asked).metrics for found in rounds]
    assert scores[0]["recall"] == 0
    assert scores[-1]["recall"] == scores[-1]["precision"] == 1
    again = answer_and_correct(pupil.ask, pupil.results, [batch(dataset)], dataset, config)
    assert list(again) == [(asked, rounds)]
