"""pycocotools' average precision and recall, with its traps closed."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3jax.evaluation.ground_truth import IouType, Results, Truth, result_region
from sam3jax.evaluation.uncertainty import Judged, judged

AREAS = ("", "_small", "_medium", "_large")  # pycocotools' area ranges: 32 and 96 pixels squared


def coco_metrics(
    truth: Truth, predictions: Results, kind: IouType
) -> tuple[dict[str, float], dict[int, dict[str, float]], list[list[Judged]]]:
    """pycocotools' AP and AR: of all categories, and of each; and for each range of AREAS each category's matches.

    AP, AP50, AP75, AR, each also _small, _medium, _large (but AP50 and AP75). Against pycocotools'
    traps: annotations are numbered from 1 (0 reads as "no match"), as many detections count as there
    are (100 would cap a picture with 300 objects), and the area of a
    detection is that of its mask for masks and of its box for boxes.
    """
    rows = {image_id: row for row, image_id in enumerate(truth.images, start=1)}
    true = []
    for pair in truth.pairs:
        instances, lenient, areas = truth.regions(pair, kind)
        place = (rows[pair[0]], pair[1], kind)
        true += [_entry(*place, region, area) for region, area in zip(instances, areas)]
        true += [_entry(*place, region, 0.0, iscrowd=1) for region in lenient]
    guessed, counts = [], defaultdict(int)
    for result in predictions:
        region = result_region(result, kind)
        area = region[2] * region[3] if kind == "bbox" else float(coco_mask.area(region))
        entry = _entry(rows[result["image_id"]], result["category_id"], kind, region, area)
        guessed.append(entry | {"score": result["score"]})
        counts[result["image_id"], result["category_id"]] += 1
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(
            _coco(true, rows, truth), _coco(guessed, rows, truth), kind
        )  # fmt: skip
        evaluator.params.maxDets = [max([100, *counts.values()])]
        evaluator.params.catIds = list(truth.categories)
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"][..., 0]  # [IoU, recall, category, area]
    recall = evaluator.eval["recall"][..., 0]  # [IoU, category, area]
    by_category = {
        category: _summary(precision[:, :, [k]], recall[:, [k]])
        for k, category in enumerate(truth.categories)
    }
    return _summary(precision, recall), by_category, judged(evaluator)


def _summary(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    values = {"AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0]}
    for area, suffix in enumerate(AREAS):
        values |= {f"AP{suffix}": precision[..., area], f"AR{suffix}": recall[..., area]}
    # -1 stands for "no such instances".
    known = {name: value[value > -1] for name, value in values.items()}
    return {name: float(value.mean()) for name, value in sorted(known.items()) if value.size}


def _entry(
    image: int, category: int, kind: IouType, region: Any, area: float, iscrowd: int = 0
) -> dict[str, Any]:
    entry = {"image_id": image, "category_id": category, "area": area, "iscrowd": iscrowd}
    return entry | {"bbox" if kind == "bbox" else "segmentation": region}


def _coco(entries: list[dict[str, Any]], rows: Mapping[Any, int], truth: Truth) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": rows[i], "height": image.height, "width": image.width}
            for i, image in truth.images.items()
        ],
        "categories": [{"id": i} for i in truth.categories],
        "annotations": [entry | {"id": k} for k, entry in enumerate(entries, start=1)],
    }
    coco.createIndex()
    return coco
