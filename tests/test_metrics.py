"""Metrics against pycocotools and the torch package, and on data made to trip them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3jax.data.coco import decode_mask, parse_coco
from sam3jax.evaluation import metrics

BOTTLES = Path(__file__).parents[1] / ".." / "shared" / "data" / "bottles"


def read(raw: dict, name: str = "raw"):
    return parse_coco(raw, name, name, Path)


def square(x: float, y: float, size: float) -> list[list[float]]:
    return [[x, y, x + size, y, x + size, y + size, x, y + size]]


def awkward() -> dict:
    """COCO that trips evaluators: ids from 0, 300 objects in a picture, crowds, empty pictures,
    an unused category, a category that is only a crowd, an instance with a box only, and a lone
    two-point polygon."""
    images = [
        {"id": i, "file_name": f"{i}.png", "width": 640, "height": 480} for i in (0, 3, 5, 9, 11)
    ]
    annotations = []

    def add(image: int, category: int, box: list[float], **more) -> None:
        annotations.append(
            {"id": len(annotations), "image_id": image, "category_id": category, "bbox": box,
             "iscrowd": 0, "segmentation": square(*box[:3]), "area": box[2] * box[3], **more}
        )  # fmt: skip

    for k in range(300):
        add(0, 1, [20 * (k % 30) + 3, 20 * (k // 30) + 5, 12, 12])
    add(0, 2, [100, 250, 120, 120])
    add(3, 0, [10, 10, 50, 50])
    crowd = np.zeros((480, 640), np.uint8, order="F")
    crowd[100:300, 200:500] = 1
    counts = {"size": [480, 640], "counts": coco_mask.encode(crowd)["counts"].decode()}
    add(3, 0, [200, 100, 300, 200], iscrowd=1, segmentation=counts, area=60000)
    add(3, 4, [200, 100, 300, 200], iscrowd=1, segmentation=counts, area=60000)
    add(5, 2, [30, 40, 20, 20], segmentation=[[30, 40, 50, 60]])
    add(5, 2, [300, 40, 90, 90])
    add(5, 0, [0, 0, 60, 60], segmentation=[])
    names = ["nought", "many", "large", "unused", "crowds"]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def feed_back(dataset, score=1.0) -> list[dict]:
    """The truth as predictions, crowds left out; the box where an instance has no mask."""
    results = []
    for image in dataset.images:
        for a in image.annotations:
            if a.iscrowd:
                continue
            mask = decode_mask(a, image.height, image.width)
            if not mask.any():
                x, y, w, h = (int(v) for v in a.bbox)
                mask[y : y + h, x : x + w] = True
            rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            results.append(
                {"image_id": image.id, "category_id": a.category_id, "bbox": list(a.bbox), "score": score,
                 "segmentation": {**rle, "counts": rle["counts"].decode()}}
            )  # fmt: skip
    return results


def assert_perfect(found: metrics.Evaluation) -> None:
    for name, value in found.metrics.items():
        if name.startswith("false_alarms"):
            assert value == 0, name
        else:
            # SA-Co's formula adds 1e-4 to denominators, so its perfect score is just below 1.
            tolerance = 2e-4 if name in ("pmF1", "cgF1", "IL_MCC") else 1e-12
            assert value == pytest.approx(1, abs=tolerance), name
    assert set(found.pictures.values()) == {1.0}


def test_truth_fed_back_is_perfect_on_awkward_data():
    dataset = read(awkward())
    found = metrics.measure(dataset, feed_back(dataset))
    assert_perfect(found)
    needed = {"bbox/AP", "segm/AP", "segm/AP_small", "segm/AR_large", "cgF1", "IL_MCC"}
    assert needed <= set(found.metrics)
    assert found.metrics["false_alarms_empty"] == 0
    rows = {row["category"]: row for row in found.per_category}
    assert rows["many"]["segm/AP"] == pytest.approx(1)
    assert rows["many"]["instances"] == 300
    assert "segm/AP" not in rows["crowds"]
    assert "unused" not in rows


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_truth_fed_back_is_perfect_on_bottles(split):
    file = BOTTLES / split / "_annotations.coco.json"
    if not file.is_file():
        pytest.skip(f"{BOTTLES} is not on this machine")
    dataset = read(json.loads(file.read_text()))
    assert_perfect(metrics.measure(dataset, feed_back(dataset)))


def test_nothing_found_is_the_worst_but_silent():
    dataset = read(awkward())
    found = metrics.measure(dataset, [])
    assert found.metrics["segm/AP"] == found.metrics["bbox/AP"] == found.metrics["pmF1"] == 0
    assert found.metrics["false_alarms"] == 0
    assert found.pictures[9] == 1.0  # rightly silent
    assert found.pictures[0] == 0.0


def test_a_detection_in_a_crowd_is_neither_right_nor_wrong():
    dataset = read(awkward())
    results = feed_back(dataset)
    mask = np.zeros((480, 640), np.uint8, order="F")
    mask[120:200, 220:300] = 1
    rle = coco_mask.encode(mask)
    extra = {"image_id": 3, "category_id": 0, "bbox": [220, 120, 80, 80], "score": 1.0}
    extra["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    alone = {**extra, "category_id": 4}
    assert_perfect(metrics.measure(dataset, [*results, extra, alone]))
    elsewhere = {**extra, "image_id": 9}
    spoiled = metrics.measure(dataset, [*results, elsewhere]).metrics
    assert spoiled["false_alarms"] > 0
    assert spoiled["false_alarms_empty"] == 0.5
    assert spoiled["IL_MCC"] < 0.99


def random_case(seed: int, crowds: tuple[int, ...] = ()) -> tuple[dict, list[dict]]:
    """Truth and 200 predictions around and beside it, of 3 categories in 7 pictures."""
    rng = np.random.default_rng(seed)
    images = [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 150} for i in range(7)]
    annotations, results = [], []
    while len(results) < 200:
        image, category = int(rng.integers(7)), int(rng.integers(1, 4))
        if (image + category) % 3 == 0 and rng.uniform() < 0.97:
            continue
        box = [*rng.uniform(0, 100, 2), *rng.uniform(10, 45, 2)]
        if rng.uniform() < 0.4 and (image + category) % 3 != 0:
            annotations.append({"image_id": image, "category_id": category, "bbox": box})
        near = np.array(box) + rng.normal(size=4) * rng.choice([0, 1, 4])
        results.append(
            {"image_id": image, "category_id": category, "bbox": near.tolist(),
             "score": float(rng.choice([rng.uniform(), 0.6]))}
        )  # fmt: skip

    def masked(item: dict) -> dict:
        x, y, w, h = item["bbox"]
        corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        rle = coco_mask.merge(coco_mask.frPyObjects(corners, 150, 200))
        rle["counts"] = rle["counts"].decode()
        return {**item, "segmentation": rle}

    annotations = [
        masked({**a, "id": i, "iscrowd": int(i in crowds), "area": a["bbox"][2] * a["bbox"][3]})
        for i, a in enumerate(annotations, start=1)
    ]
    categories = [{"id": i, "name": f"thing {i}"} for i in (1, 2, 3)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    return truth, [masked(r) for r in results]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ap_equals_pycocotools_called_directly(seed, kind):
    raw, results = random_case(seed, crowds=(2, 3, 7, 20))
    key = "bbox" if kind == "bbox" else "segmentation"
    bare = [{k: r[k] for k in ("image_id", "category_id", "score", key)} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(raw))
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(bare), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    found = metrics.measure(read(raw), results).metrics
    names = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", None, None,
             "AR", "AR_small", "AR_medium", "AR_large"]  # fmt: skip
    compared = 0
    for name, expected in zip(names, evaluator.stats, strict=True):
        if name and expected > -1:
            assert found[f"{kind}/{name}"] == pytest.approx(expected, abs=1e-12), name
            compared += 1
    assert compared >= 7


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_concept_metrics_equal_the_torch_package(seed, kind, tmp_path):
    reference = pytest.importorskip("sam3.eval.cgf1_eval")
    raw, results = random_case(seed)
    dataset = read(raw)
    # What SA-Co calls an image is a picture asked for one phrase.
    pair = lambda item: 10 * item["image_id"] + item["category_id"]
    images = [
        {"id": 10 * i + c, "width": 200, "height": 150, "is_instance_exhaustive": True}
        for i in range(7)
        for c in (1, 2, 3)
    ]
    truth = {"images": images, "categories": raw["categories"]}
    truth["annotations"] = [{**a, "image_id": pair(a)} for a in raw["annotations"]]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    guesses = [{**r, "image_id": pair(r)} for r in results]
    if kind == "segm":
        guesses = [{k: v for k, v in r.items() if k != "bbox"} for r in guesses]
    (tmp_path / "guesses.json").write_text(json.dumps(guesses))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = reference.CGF1Evaluator(str(tmp_path / "truth.json"), iou_type=kind)
        expected = evaluator.evaluate(str(tmp_path / "guesses.json"))
    prepared = metrics.Truth(dataset)
    cuts = dict.fromkeys(prepared.categories, 0.5)
    found = metrics.concept_metrics(
        metrics.tally(metrics.match_pairs(prepared, results, kind, cuts))
    )
    for ours, theirs in (("cgF1", "cgF1"), ("pmF1", "positive_micro_F1"), ("IL_MCC", "IL_MCC")):
        assert found[ours] == pytest.approx(expected[f"cgF1_eval_{kind}_{theirs}"], abs=1e-6)
    assert 0 < found["IL_MCC"] < 1


def one_category(raw: dict, category: int, results: list[dict]) -> tuple[dict, list[dict]]:
    """The same pictures with nothing but one category."""
    own = lambda entries: [e for e in entries if e["category_id"] == category]
    chosen = [c for c in raw["categories"] if c["id"] == category]
    return {**raw, "categories": chosen, "annotations": own(raw["annotations"])}, own(results)


@pytest.mark.parametrize("category", [1, 2, 3])
def test_the_chosen_threshold_of_one_category_gives_the_best_f1_of_all(category):
    raw, results = one_category(*(lambda r: (r[0], category, r[1]))(random_case(11)))
    dataset = read(raw)
    (name,) = (c["name"] for c in raw["categories"])
    chosen = metrics.measure(dataset, results).thresholds
    assert set(chosen) == {name}

    def f1(threshold):
        (row,) = metrics.measure(dataset, results, thresholds={name: threshold}).per_category
        return row["F1"]

    at_best = f1(chosen[name])
    # Greedy and optimal matching may differ by an instance.
    assert all(at_best >= f1(float(t)) - 0.02 for t in np.linspace(0.01, 0.99, 25))
    assert metrics.measure(dataset, []).thresholds == {name: 0.5}


def test_a_category_of_few_instances_leans_on_the_others():
    """A hundred cats, all found at .6 beside false ones at .4; of one dog the only word is at .05."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 640, "height": 480} for i in range(100)]
    box, elsewhere = [10.0, 10.0, 50.0, 50.0], [300.0, 300.0, 50.0, 50.0]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": box, "iscrowd": 0, "area": 2500.0}
        for i in range(100)
    ]
    annotations.append({**annotations[0], "id": 100, "category_id": 2})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    dataset = read({"images": images, "annotations": annotations, "categories": categories})
    of = lambda i, category, box, score: {
        "image_id": i, "category_id": category, "bbox": box, "score": score
    }  # fmt: skip
    results = [of(i, 1, box, 0.6) for i in range(100)] + [
        of(i, 1, elsewhere, 0.4) for i in range(100)
    ]
    results += [of(0, 2, box, 0.05)]
    chosen = metrics.measure(dataset, results).thresholds
    assert chosen["cat"] == pytest.approx(0.5)
    assert chosen["dog"] == pytest.approx(0.5)  # alone it would be .025


def test_what_federated_data_does_not_say_is_not_counted():
    raw, results = random_case(2)
    raw["images"][0]["neg_category_ids"] = []
    raw["images"][1]["not_exhaustive_category_ids"] = [1, 2, 3]
    dataset = read(raw)
    truth = metrics.Truth(dataset)
    here = {a.category_id for a in dataset.images[0].annotations}
    assert {c for i, c in truth.pairs if i == 0} == here
    cuts = dict.fromkeys(truth.categories, 0.0)
    found = metrics.match_pairs(truth, results, "segm", cuts)
    assert all((f.fp == 0).all() for f in found if f.pair[0] == 1)
    assert any((f.fp > 0).any() for f in found if f.pair[0] == 2)


def test_box_only_data_is_measured_by_boxes():
    raw, results = random_case(5)
    for annotation in raw["annotations"]:
        annotation["segmentation"] = []
    found = metrics.measure(read(raw), results).metrics
    assert found["bbox/AP"] > 0
    assert found["cgF1"] > 0
    assert not any(name.startswith("segm") for name in found)
