"""A run folder as training and evaluation leave it, made without training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from sam3jax.config import Config, dump_config
from sam3jax.data.coco import Dataset, decode_mask
from sam3jax.evaluation.comparison import write_evaluation
from sam3jax.evaluation.metrics import measure
from sam3jax.viewing.shown import Shown


def guesses(dataset: Dataset, seed: int, noise: float, miss: float) -> list[dict]:
    """The truth, shifted, with some missing and some in the wrong place."""
    rng = np.random.default_rng(seed)
    results = []
    for image in dataset.images:
        for a in image.annotations:
            if rng.uniform() < miss:
                continue
            mask = decode_mask(a, image.height, image.width)
            dx, dy = (int(v) for v in rng.normal(0, noise, 2))
            mask = np.roll(mask, (dy, dx), (0, 1))
            rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            x, y, w, h = a.bbox
            category = a.category_id if rng.uniform() > miss / 2 else max(dataset.categories)
            results.append(
                {"image_id": image.id, "category_id": category, "bbox": [x + dx, y + dy, w, h],
                 "score": float(rng.uniform(0.3, 1)),
                 "segmentation": {**rle, "counts": rle["counts"].decode()}}
            )  # fmt: skip
    return results


def write_run(folder: Path, data: Path, dataset: Dataset) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(Config(data={"train": str(data)})))
    rng = np.random.default_rng(0)
    lines = []
    for step in range(10, 2001, 10):
        fall = 40 * np.exp(-step / 500) + 5
        entry = {"step": step, "split": "train", "rate": 1e-4 * (1 - step / 2000), "loss": fall * 6}
        for part, weight in (("bbox", 0.4), ("giou", 0.9), ("ce", 2), ("mask", 1.5), ("dice", 3)):
            for group in ("final", "auxiliary", "o2m"):
                entry[f"loss/{group}/{part}"] = weight * fall * rng.uniform(0.8, 1.2) / 10
            for layer in ("", "_aux_0", "_aux_1", "_o2m", "_aux_0_o2m", "_aux_1_o2m"):
                entry[f"loss_{part}{layer}"] = fall * rng.uniform(0.8, 1.2)
        lines.append(json.dumps(entry))
        if step % 200 == 0:
            ap = 1 - np.exp(-step / 700)
            values = {"segm/AP": 0.7 * ap, "segm/AP50": ap, "bbox/AP": 0.8 * ap, "cgF1": 0.6 * ap,
                      "pmF1": 0.8 * ap, "IL_MCC": 0.75, "false_alarms": 0.3 * (1 - ap)}  # fmt: skip
            lines.append(json.dumps({"step": step, "split": "valid", **values}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 20')
    summary = {"steps": 2000, "trained": 1_234_567, "step_seconds": 0.231, "peak_memory_gib": 3.4}
    (folder / "summary.json").write_text(json.dumps(summary))
    base, tuned = (measure(dataset, guesses(dataset, 1, *n)) for n in ((25, 0.5), (4, 0.08)))
    about = {"run": folder.name, "step": 2000, "weights": "tuned"}
    write_evaluation(folder, dataset, tuned, base, about=about, shown=Shown(nms=0.5))
