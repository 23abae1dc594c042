"""Why a score is what it is: curves, calibration, confusions and labels, counted by hand and against AP."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sam3jax.evaluation.diagnosis import diagnose
from sam3jax.evaluation.ground_truth import Truth
from sam3jax.evaluation.metrics import measure
from sam3jax.viewing.diagnosis import certainty, interval
from tests.test_metrics import random_case, read

BOX, BESIDE, FAR = [10.0, 10.0, 40.0, 40.0], [200.0, 10.0, 40.0, 40.0], [300.0, 300.0, 40.0, 40.0]


def case(annotations, results):
    """annotations: (picture, category, box); results: with a score."""
    raw = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 640, "height": 480} for i in range(3)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": box, "area": 1600, "iscrowd": 0}
            for k, (i, c, box) in enumerate(annotations)
        ],
    }  # fmt: skip
    found = [{"image_id": i, "category_id": c, "bbox": box, "score": s} for i, c, box, s in results]
    return read(raw), found


def diagnosed(dataset, found, thresholds=None, asked=None):
    return diagnose(Truth(dataset, asked), dataset.categories, found, thresholds or {})


def test_labels_worth_a_look_are_the_worst_first():
    dataset, found = case(
        [(0, 1, BOX), (0, 1, BESIDE), (1, 2, BOX)],
        [(0, 1, BOX, 0.9), (0, 1, FAR, 0.8), (1, 1, FAR, 0.95), (2, 2, BOX, 0.4), (0, 1, BESIDE, 0.3)],
    )  # fmt: skip
    said = diagnosed(dataset, found, {"cat": 0.5, "dog": 0.5})
    assert [(u["image_id"], u["score"]) for u in said["unlabelled"]] == [(1, 0.95), (0, 0.8)]
    assert [(m["image_id"], m["category"], m["score"]) for m in said["missed"]] == [(1, "dog", 0.0), (0, "cat", 0.3)]  # fmt: skip
    assert said["missed"][0]["bbox"] == BOX
    json.dumps(said)
    # Pictures that nobody looked at are not there.
    assert diagnosed(dataset, found, asked={(2, 1), (2, 2)})["missed"] == []


def test_what_is_taken_for_what():
    dataset, found = case(
        [(0, 1, BOX), (0, 2, BESIDE), (1, 2, BOX)],
        # A cat found on the dog, twice over two pictures; a dog on itself; a cat on itself.
        [(0, 1, BESIDE, 0.9), (1, 1, BOX, 0.8), (0, 2, BESIDE, 0.9), (0, 1, BOX, 0.7), (1, 1, FAR, 0.9)],
    )  # fmt: skip
    said = diagnosed(dataset, found)
    assert said["confusion"] == [{"asked": "cat", "is": "dog", "count": 2, "images": [0, 1]}]


def test_calibration_counts_every_find_once():
    results = [(0, 1, BOX, 0.95), (0, 1, FAR, 0.91), (1, 1, FAR, 0.15), (2, 1, FAR, 1.0)]
    dataset, found = case([(0, 1, BOX)], results)
    bins = diagnosed(dataset, found)["calibration"]
    assert sum(b["n"] for b in bins) == 4
    last = bins[-1]
    assert (last["n"], last["right"]) == (3, pytest.approx(1 / 3, abs=1e-4))


@pytest.mark.parametrize("seed", [3, 11])
def test_curves_agree_with_the_metrics_at_their_thresholds(seed):
    raw, results = random_case(seed)
    dataset = read(raw)
    said = diagnosed(dataset, results)
    for name, curve in said["curves"].items():
        assert all(np.diff(curve["score"]) < 0)
        assert all(np.diff(curve["recall"]) >= 0)
        k = len(curve["score"]) // 2
        (row,) = [
            r
            for r in measure(
                dataset, results, thresholds={name: curve["score"][k] - 1e-5}
            ).per_category
            if r["category"] == name
        ]
        # Greedy and optimal matching may differ by an instance.
        assert row["recall"] == pytest.approx(curve["recall"][k], abs=0.03)
        assert row["F1"] == pytest.approx(curve["F1"][k], abs=0.03)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = interval(rng.normal(0.3, 1.0, 40).tolist(), draws=300)
        inside += low < 0.3 < high
    assert 180 <= inside <= 200
    many = rng.normal(0.3, 1.0, 6000).tolist()
    assert interval(many)[0] < 0.3 + 0.1
    assert np.diff(interval(many))[0] == pytest.approx(2 * 1.96 / 6000**0.5, rel=0.05)


def test_what_may_be_chance_is_said():
    pictures = lambda scores: [{"id": k, "F1": s} for k, s in enumerate(scores)]
    better = {"pictures": pictures([0.9, 0.8, 0.95, 0.85] * 5)}
    same = {**better, "base": {"pictures": pictures([0.8, 0.9, 0.85, 0.95] * 5)}}
    sure = {**better, "base": {"pictures": pictures([0.1, 0.2, 0.1, 0.2] * 5)}}
    assert "chance" in certainty(same)
    assert "chance" not in certainty(sure)
    assert "+0.725" in certainty(sure)
    assert certainty({"pictures": pictures([0.5])}) == ""
