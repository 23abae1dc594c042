"""How good predictions are: COCO's AP and AR, SA-Co's cgF1, false alarms, thresholds, all from lists.

Predictions are COCO results (dictionaries with image_id, category_id, bbox, score, segmentation);
the truth is a `Dataset`. AP is pycocotools', with its traps closed; cgF1, pmF1 and IL_MCC are those
of sam3/eval/cgf1_eval.py, where one picture asked for one category is what SA-Co calls an image.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

from sam3jax.data.coco import Annotation, Dataset, ImageRecord, decode_mask, used_categories

IouType = Literal["bbox", "segm"]
Results = Sequence[Mapping[str, Any]]
Pair = tuple[Any, int]  # image id, category id

IOUS = np.linspace(0.5, 0.95, 10)
_AREAS = ("", "_small", "_medium", "_large")  # pycocotools' area ranges: 32 and 96 pixels squared


@dataclass(frozen=True)
class Evaluation:
    """Everything that is said about predictions.

    metrics: name -> value; what the data leave undefined (AP of small objects where there are none,
    cgF1 where every concept is in every picture) is absent. per_category: one row per category.
    thresholds: category name -> score that gives its best F1 on these data. pictures: image id ->
    F1 of the picture over all its phrases, averaged over IoU thresholds; 1.0 for right silence.
    """

    metrics: dict[str, float]
    per_category: list[dict[str, Any]]
    predictions: list[dict[str, Any]]
    thresholds: dict[str, float] = field(default_factory=dict)
    pictures: dict[Any, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    """One asked pair at a score threshold. tp, fp, fn are counts per IoU threshold [10]."""

    pair: Pair
    truths: int
    found: int
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray


def measure(
    dataset: Dataset,
    predictions: Iterable[Mapping[str, Any]],
    *,
    threshold: float = 0.5,
    thresholds: Mapping[str, float] | None = None,
    asked: Collection[Pair] | None = None,
) -> Evaluation:
    """All metrics of predictions on a data set, or on the pairs in `asked` only.

    `threshold` is the score from which a detection counts in cgF1 and false alarms; `thresholds`
    (category name -> score) replaces it category by category. AP knows no threshold.
    """
    truth = Truth(dataset, asked)
    kept = [dict(p) for p in predictions if (p["image_id"], p["category_id"]) in truth.pairs]
    cuts = {i: (thresholds or {}).get(n, threshold) for i, n in dataset.categories.items()}
    metrics: dict[str, float] = {}
    rows = {i: {"category": dataset.categories[i]} for i in truth.categories}
    for kind in truth.kinds:
        overall, by_category = coco_metrics(truth, kept, kind)
        metrics |= {f"{kind}/{name}": value for name, value in overall.items()}
        for category, values in by_category.items():
            rows[category] |= {f"{kind}/{name}": value for name, value in values.items()}
    kind = truth.kinds[-1]
    found = match_pairs(truth, kept, kind, cuts)
    metrics |= concept_metrics(found) | _silence(truth, found)
    best = choose_thresholds(truth, kept, kind, default=threshold)
    for category, row in rows.items():
        row |= _category_row([f for f in found if f.pair[1] == category])
        row |= {"threshold": cuts[category], "best_threshold": best[category]}
    named = {dataset.categories[i]: value for i, value in best.items()}
    return Evaluation(metrics, list(rows.values()), kept, named, _picture_scores(found))


class Truth:
    """A data set as the metrics see it.

    pairs: pair -> annotations, for every (picture, category) that counts: those in `asked` (None:
    all), but not those a federated data set says nothing about. images: those of the pairs.
    kinds: "bbox", and "segm" last where there are masks.
    """

    def __init__(self, dataset: Dataset, asked: Collection[Pair] | None = None) -> None:
        chosen = None if asked is None else set(asked)
        pictures = None if chosen is None else {image_id for image_id, _ in chosen}
        self.images: dict[Any, ImageRecord] = {
            image.id: image for image in dataset.images if pictures is None or image.id in pictures
        }
        self.categories = [i for i in used_categories(dataset) if i in dataset.categories]
        self.pairs: dict[Pair, tuple[Annotation, ...]] = {}
        has_masks = False
        for image in self.images.values():
            by_category = defaultdict(list)
            for annotation in image.annotations:
                by_category[annotation.category_id].append(annotation)
                has_masks |= annotation.segmentation is not None
            for category in self.categories:
                here = tuple(by_category[category])
                federated = image.negative_ids is not None and category not in image.negative_ids
                skipped = chosen is not None and (image.id, category) not in chosen
                if not skipped and (here or not federated):
                    self.pairs[image.id, category] = here
        self.kinds: tuple[IouType, ...] = ("bbox", "segm") if has_masks else ("bbox",)
        self._regions: dict[tuple[Pair, IouType], tuple[list, list, list[float]]] = {}

    def regions(self, pair: Pair, kind: IouType) -> tuple[list, list, list[float]]:
        """Boxes or RLEs of the pair's instances; regions where nothing counts as wrong; areas.

        The lenient regions are crowds; for masks, also instances that have a box only; and the
        whole picture where it is not labelled exhaustively. Areas are the instances', in pixels.
        """
        if (pair, kind) not in self._regions:  # drawing polygons is most of the time
            self._regions[pair, kind] = self._find_regions(pair, kind)
        return self._regions[pair, kind]

    def _find_regions(self, pair: Pair, kind: IouType) -> tuple[list, list, list[float]]:
        image = self.images[pair[0]]
        instances, lenient, areas = [], [], []
        for annotation in self.pairs[pair]:
            region = self._region(annotation, image, kind)
            if region is not None and not annotation.iscrowd:
                instances.append(region)
                areas.append(annotation.area)
            else:
                lenient.append(region or _box_rle(annotation.bbox, image))
        if pair[1] in image.not_exhaustive_ids:
            whole = (0.0, 0.0, float(image.width), float(image.height))
            lenient.append(list(whole) if kind == "bbox" else _box_rle(whole, image))
        return instances, lenient, areas

    @staticmethod
    def _region(annotation: Annotation, image: ImageRecord, kind: IouType) -> Any:
        if kind == "bbox":
            return list(annotation.bbox)
        mask = decode_mask(annotation, image.height, image.width)
        return coco_mask.encode(np.asfortranarray(mask, np.uint8)) if mask.any() else None


def coco_metrics(
    truth: Truth, predictions: Results, kind: IouType
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """pycocotools' AP and AR: of all categories, and of each.

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
        region = _result_region(result, kind)
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
    return _summary(precision, recall), by_category


def match_pairs(
    truth: Truth, predictions: Results, kind: IouType, thresholds: Mapping[int, float]
) -> list[_Found]:
    """One-to-one matching of highest total IoU for each known pair, and its counts."""
    grouped = _by_pair(predictions)
    found = []
    for pair, here in truth.pairs.items():
        if here and all(a.iscrowd for a in here):
            continue  # neither "it is there" nor "it is not" can be right or wrong
        kept = [r for r in grouped[pair] if r["score"] >= thresholds[pair[1]]]
        regions = [_result_region(r, kind) for r in kept]
        instances, lenient, _ = truth.regions(pair, kind)
        iou = _iou(regions, instances, crowd=False)  # [detections, instances]
        row, column = linear_sum_assignment(-iou)
        matched = np.zeros(len(regions))
        matched[row] = iou[row, column]
        excused = _iou(regions, lenient, crowd=True).max(axis=1, initial=0.0)
        right = matched[None] >= IOUS[:, None]  # [10, detections]
        tp = right.sum(axis=1)
        fp = (~right & (excused[None] < IOUS[:, None])).sum(axis=1)
        counted = int((right[0] | (excused < IOUS[0])).sum())
        found.append(_Found(pair, len(instances), counted, tp, fp, len(instances) - tp))
    return found


def concept_metrics(found: Sequence[_Found]) -> dict[str, float]:
    """SA-Co's metrics, with the small constants of the published evaluator.

    pmF1: micro F1 over the pairs whose concept is there, averaged over IoU .5 to .95. IL_MCC:
    Matthews correlation of "is it there". cgF1 = pmF1 * IL_MCC. precision and recall are at IoU .5.
    cgF1 and IL_MCC are undefined without a pair of either sort.
    """
    if not found:
        return {}
    tp, fp, fn = (sum(getattr(f, name) for f in found) for name in ("tp", "fp", "fn"))
    fp_positive = sum((f.fp for f in found if f.truths), np.zeros(len(IOUS), int))
    recall = tp / (tp + fn + 1e-4)
    precision = tp / (tp + fp_positive + 1e-4)
    micro = 2 * precision * recall / (precision + recall + 1e-4)
    yes_yes = float(sum(f.truths > 0 and f.found > 0 for f in found))
    no_yes = float(sum(f.truths == 0 and f.found > 0 for f in found))
    no_no = float(sum(f.truths == 0 and f.found == 0 for f in found))
    yes_no = float(sum(f.truths > 0 and f.found == 0 for f in found))
    metrics = {}
    if yes_yes + yes_no:
        metrics |= {
            "pmF1": float(micro.mean()),
            "precision": float(tp[0] / max(1, tp[0] + fp[0])),
            "recall": float(tp[0] / max(1, tp[0] + fn[0])),
        }
    if no_yes + no_no and yes_yes + yes_no:
        product = (yes_yes + no_yes) * (yes_yes + yes_no) * (no_no + no_yes) * (no_no + yes_no)
        correlation = (yes_yes * no_no - no_yes * yes_no) / (product**0.5 + 1e-6)
        metrics |= {"IL_MCC": correlation, "cgF1": metrics["pmF1"] * correlation}
    return metrics


def choose_thresholds(
    truth: Truth, predictions: Results, kind: IouType, *, default: float = 0.5
) -> dict[int, float]:
    """The score threshold of each category that gives its best F1 at IoU .5 on these data.

    Half way between the weakest detection worth keeping and the next; `default` where no detection
    is right. Matching is greedy by score, so that it does not depend on the threshold.
    """
    ranked: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    totals: dict[int, int] = defaultdict(int)
    grouped = _by_pair(predictions)
    for pair in truth.pairs:
        instances, lenient, _ = truth.regions(pair, kind)
        totals[pair[1]] += len(instances)
        results = sorted(grouped[pair], key=lambda r: -r["score"])
        regions = [_result_region(r, kind) for r in results]
        iou = _iou(regions, instances, crowd=False)
        excused = _iou(regions, lenient, crowd=True).max(axis=1, initial=0.0)
        for result, overlaps, excuse in zip(results, iou, excused):
            right = bool(len(overlaps)) and overlaps.max() >= IOUS[0]
            if right:
                iou[:, overlaps.argmax()] = -1.0
            if right or excuse < IOUS[0]:
                ranked[pair[1]].append((result["score"], right))
    return {i: _best_cut(ranked[i], totals[i], default) for i in truth.categories}


def _best_cut(ranked: list[tuple[float, bool]], truths: int, default: float) -> float:
    if not any(right for _, right in ranked):
        return default
    score, right = (np.array(column) for column in zip(*sorted(ranked, reverse=True)))
    f1 = 2 * np.cumsum(right) / (np.arange(1, len(right) + 1) + truths)
    below = np.append(score[1:], 0.0)
    f1[score == below] = -1.0  # equal scores cannot be told apart
    best = int(f1.argmax())
    return float((score[best] + below[best]) / 2)


def _silence(truth: Truth, found: Sequence[_Found]) -> dict[str, float]:
    """How often something is found where nothing of the kind is.

    false_alarms: share of the absent (picture, category) pairs with a detection;
    false_alarms_empty: share of the pictures without any object that have one for some category.
    """
    absent = [f for f in found if not truth.pairs[f.pair]]
    metrics = {}
    if absent:
        metrics["false_alarms"] = float(np.mean([f.found > 0 for f in absent]))
    empty = {i: False for i, image in truth.images.items() if not image.annotations}
    for f in found:
        if f.pair[0] in empty:
            empty[f.pair[0]] |= f.found > 0
    if empty:
        metrics["false_alarms_empty"] = float(np.mean(list(empty.values())))
    return metrics


def _category_row(found: Sequence[_Found]) -> dict[str, Any]:
    tp, fp, fn = (int(sum(getattr(f, name)[0] for f in found)) for name in ("tp", "fp", "fn"))
    absent = [f for f in found if not f.truths]
    row: dict[str, Any] = {"instances": tp + fn, "pictures": len(found) - len(absent)}
    if tp + fn:
        row |= {
            "precision": tp / max(1, tp + fp),
            "recall": tp / (tp + fn),
            "F1": 2 * tp / (2 * tp + fp + fn),
        }
    if absent:
        row["false_alarms"] = float(np.mean([f.found > 0 for f in absent]))
    return row


def _picture_scores(found: Sequence[_Found]) -> dict[Any, float]:
    counts: dict[Any, np.ndarray] = defaultdict(lambda: np.zeros((2, len(IOUS))))
    for f in found:
        counts[f.pair[0]] += np.stack([2 * f.tp, 2 * f.tp + f.fp + f.fn])
    scores = {}
    for image_id, (right, everything) in counts.items():
        f1 = np.where(everything > 0, right / np.maximum(everything, 1), 1.0)
        scores[image_id] = float(f1.mean())
    return scores


def _summary(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    values = {"AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0]}
    for area, suffix in enumerate(_AREAS):
        values |= {f"AP{suffix}": precision[..., area], f"AR{suffix}": recall[..., area]}
    # -1 stands for "no such instances".
    known = {name: value[value > -1] for name, value in values.items()}
    return {name: float(value.mean()) for name, value in sorted(known.items()) if value.size}


def _by_pair(predictions: Results) -> dict[Pair, list[Mapping[str, Any]]]:
    grouped: dict[Pair, list[Mapping[str, Any]]] = defaultdict(list)
    for result in predictions:
        grouped[result["image_id"], result["category_id"]].append(result)
    return grouped


def _iou(regions: list, others: list, *, crowd: bool) -> np.ndarray:
    """[regions, others]; for crowds the intersection over the region's own area."""
    if not regions or not others:
        return np.zeros((len(regions), len(others)))
    return np.asarray(coco_mask.iou(regions, others, [int(crowd)] * len(others)))


def _result_region(result: Mapping[str, Any], kind: IouType) -> Any:
    if kind == "bbox":
        return list(result["bbox"])
    rle = result["segmentation"]
    counts = rle["counts"]
    return {"size": rle["size"], "counts": counts.encode() if isinstance(counts, str) else counts}


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


def _box_rle(box: Sequence[float], image: ImageRecord) -> Any:
    x, y, w, h = box
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return coco_mask.merge(coco_mask.frPyObjects(corners, image.height, image.width))
