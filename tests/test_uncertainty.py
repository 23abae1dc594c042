"""Drawn sets of pictures: metrics without a new matching equal those of a data set made of the drawn pictures."""

from __future__ import annotations

import numpy as np
import pytest

from sam3jax.evaluation.metrics import measure
from sam3jax.evaluation.uncertainty import changes, draws_of, intervals, means
from tests.test_metrics import random_case, read


def drawn(raw: dict, results: list[dict], times: np.ndarray) -> tuple[dict, list[dict]]:
    """The case with picture n as often as times[n] says, each time under a new id."""
    images, annotations, found = [], [], []
    for n, image in enumerate(raw["images"]):
        for _ in range(times[n]):
            new = len(images) + 1
            own = lambda rows, n=image["id"], new=new: [
                {**r, "image_id": new} for r in rows if r["image_id"] == n
            ]
            images.append({**image, "id": new, "file_name": f"{new}.png"})
            annotations += own(raw["annotations"])
            found += own(results)
    annotations = [{**a, "id": k} for k, a in enumerate(annotations, 1)]
    return {**raw, "images": images, "annotations": annotations}, found


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_drawn_sets_equal_those_of_the_data_made_of_them(seed):
    raw, results = random_case(seed, crowds=(2, 5))
    for k, result in enumerate(results):  # equal scores have no order
        result["score"] = (result["score"] + 1e-6 * k) / 2
    values = measure(read(raw), results).resample()
    weights = draws_of(len(raw["images"]), 1)
    checked = 0
    for draw in range(8):
        again = measure(*(f(x) for f, x in zip((read, list), drawn(raw, results, weights[draw]))))
        for name, per_draw in values.items():
            if name in again.metrics:
                assert per_draw[draw] == pytest.approx(again.metrics[name], abs=1e-12), (name, draw)
                checked += 1
            else:
                assert not np.isfinite(per_draw[draw]), (name, draw)
    assert checked > 60
    assert {"segm/AP", "segm/AP50", "bbox/AP75", "recall", "false_alarms", "cgF1"} <= set(values)
    assert {f"{kind}/{name}{size}" for kind in ("segm", "bbox") for name in ("AP", "AR") for size in ("", "_small", "_medium")} <= set(values)  # fmt: skip


def test_intervals_hold_the_metric_and_shrink_with_the_pictures():
    raw, results = random_case(3)
    found = measure(read(raw), results)
    few = intervals(found.resample())
    for name, (low, high) in few.items():
        assert low - 0.05 <= found.metrics[name] <= high + 0.05, name
    raw, results = drawn(raw, results, np.full(len(raw["images"]), 9))
    many = intervals(measure(read(raw), results).resample())
    width = lambda limits: limits[1] - limits[0]
    assert width(many["segm/AP50"]) < 0.6 * width(few["segm/AP50"])


def test_a_model_does_not_differ_from_itself_and_one_picture_says_nothing():
    raw, results = random_case(1)
    found = measure(read(raw), results)
    same = changes(found.resample(), found.resample())
    assert set(same.values()) == {(0.0, 0.0)}
    alone = {**raw, "images": raw["images"][:1]}
    own = lambda rows: [r for r in rows if r["image_id"] == raw["images"][0]["id"]]
    alone["annotations"] = own(raw["annotations"])
    assert intervals(measure(read(alone), own(results)).resample()) == {}


def test_very_many_detections_are_drawn_less_often_but_alike():
    few, many = draws_of(7, 10), draws_of(7, 10**9)
    assert (len(few), len(many)) == (200, 40)
    np.testing.assert_array_equal(few[:40], many)
    assert set(few.sum(1)) == {7}


def test_instances_of_one_picture_alone_have_no_interval():
    raw, results = random_case(3)
    medium = lambda a: a["area"] > 950
    assert "segm/AP_medium" in measure(read(raw), results).resample()
    first = next(a["image_id"] for a in raw["annotations"] if a["area"] > 1100)
    raw["annotations"] = [a for a in raw["annotations"] if not medium(a) or a["image_id"] == first]
    found = measure(read(raw), results)
    assert found.metrics["segm/AP_medium"] >= 0
    assert "segm/AP_medium" not in found.resample()
    assert "segm/AP_small" in found.resample()


def test_pictures_without_objects_are_drawn_too():
    raw, results = random_case(1)
    bare = {i["id"] for i in raw["images"][:3]}
    raw["annotations"] = [a for a in raw["annotations"] if a["image_id"] not in bare]
    results = [r for r in results if r["image_id"] != raw["images"][0]["id"]]
    found = measure(read(raw), results)
    assert found.metrics["false_alarms_empty"] == pytest.approx(2 / 3)
    low, high = intervals(found.resample())["false_alarms_empty"]
    assert low == 0
    assert high == 1


def test_means_of_objects_are_those_of_drawn_pictures():
    rng = np.random.default_rng(0)
    picture, values = rng.integers(0, 7, 30), rng.random(30)
    names = np.unique(picture)
    found = means({"IoU": values}, picture)["IoU"]
    for w, times in enumerate(draws_of(len(names))):
        each = [np.tile(values[picture == p], n) for p, n in zip(names, times, strict=True)]
        assert found[w] == pytest.approx(np.concatenate(each).mean())
