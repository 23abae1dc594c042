"""The truth as the metrics see it, and the regions of the picture that are compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from sam3jax.data.coco import Annotation, Dataset, ImageRecord, decode_mask, used_categories

IouType = Literal["bbox", "segm"]
Results = Sequence[Mapping[str, Any]]  # COCO results
Pair = tuple[Any, int]  # image id, category id


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
                lenient.append(region or box_rle(annotation.bbox, image))
        if pair[1] in image.not_exhaustive_ids:
            whole = (0.0, 0.0, float(image.width), float(image.height))
            lenient.append(list(whole) if kind == "bbox" else box_rle(whole, image))
        return instances, lenient, areas

    @staticmethod
    def _region(annotation: Annotation, image: ImageRecord, kind: IouType) -> Any:
        if kind == "bbox":
            return list(annotation.bbox)
        mask = decode_mask(annotation, image.height, image.width)
        return coco_mask.encode(np.asfortranarray(mask, np.uint8)) if mask.any() else None


def by_pair(predictions: Results) -> dict[Pair, list[Mapping[str, Any]]]:
    grouped: dict[Pair, list[Mapping[str, Any]]] = defaultdict(list)
    for result in predictions:
        grouped[result["image_id"], result["category_id"]].append(result)
    return grouped


def overlaps(regions: list, others: list, *, crowd: bool) -> np.ndarray:
    """[regions, others]; for crowds the intersection over the region's own area."""
    if not regions or not others:
        return np.zeros((len(regions), len(others)))
    return np.asarray(coco_mask.iou(regions, others, [int(crowd)] * len(others)))


def right_finds(iou: np.ndarray, least: float = 0.5) -> np.ndarray:
    """Which detections [n, m], strongest first, are right [n] bool: each takes its best instance, once."""
    iou, right = iou.copy(), np.zeros(len(iou), bool)
    for row in range(len(iou) if iou.shape[1] else 0):
        best = int(iou[row].argmax())
        if iou[row, best] >= least:
            iou[:, best] = -1.0
            right[row] = True
    return right


def result_region(result: Mapping[str, Any], kind: IouType) -> Any:
    if kind == "bbox":
        return list(result["bbox"])
    rle = result["segmentation"]
    counts = rle["counts"]
    return {"size": rle["size"], "counts": counts.encode() if isinstance(counts, str) else counts}


def box_rle(box: Sequence[float], image: ImageRecord) -> Any:
    x, y, w, h = box
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return coco_mask.merge(coco_mask.frPyObjects(corners, image.height, image.width))
