"""Validation while a run trains: metrics, panels, thresholds, and which step was best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sam3jax.config import Config
from sam3jax.data.coco import Dataset
from sam3jax.data.loader import make_eval_loader
from sam3jax.data.pictures import DataError
from sam3jax.evaluate import detections_to_keep, evaluate_dataset
from sam3jax.evaluation.comparison import write_evaluation
from sam3jax.evaluation.metrics import Evaluation
from sam3jax.files import write_json
from sam3jax.inference.detector import Detector, write_thresholds
from sam3jax.model import Sam3
from sam3jax.training.log import RunLog
from sam3jax.viewing.draw import dataset_panel
from sam3jax.weights.checkpoints import Base, best_step
from sam3jax.weights.trainable import Tree, merge


class Validation:
    """Validates the run's weights; remembers the last and the best metrics, writes their results."""

    def __init__(
        self, config: Config, dataset: Dataset | None, phrases: tuple[str, ...], tokens: np.ndarray,
        frozen: Tree, run: Path, log: RunLog, process: dict[str, int],
    ) -> None:  # fmt: skip
        self._config, self._dataset, self._frozen = config, dataset, frozen
        self._run, self._log = run, log
        self.last: dict[str, float] | None = None
        self.best: dict[str, float] | None = None
        self._before: Evaluation | None = None
        if dataset is None:
            return
        if best_step(run) is not None:
            self.best = json.loads((run / "best.json").read_text())["metrics"]
        e = config.evaluation
        self._detector = Detector(Sam3(config.model), e, limit=detections_to_keep(dataset, e))
        self._loader = make_eval_loader(dataset, phrases, tokens, config, targets=False, **process)

    def base(self, base: Base) -> dict[str, float]:
        """Metrics of the model that the run starts from."""
        self._before = self._evaluate({"params": base.params})
        self._log.say(f"base: {_line(self._before.metrics)}")
        return self._before.metrics

    def __call__(self, state: Any, number: int) -> dict[str, float]:
        weights = state.trainable if state.ema is None else state.ema
        found = self._evaluate(merge(jax.device_get(weights), self._frozen))
        self.last = found.metrics
        self._log.valid(number, found.metrics)
        self._draw(found, number)
        name = self._config.best_metric
        if name not in found.metrics:
            raise DataError(
                f"best_metric {name!r} is not measured here; there are {', '.join(found.metrics)}"
            )
        # Of equals the later one, as the checkpoints have it.
        if self.best is None or found.metrics[name] >= self.best[name]:
            self.best = found.metrics
            if jax.process_index() == 0:
                about = {"run": str(self._run), "step": number, "weights": "tuned", "threshold": self._config.evaluation.threshold}  # fmt: skip
                write_evaluation(self._run, self._dataset, found, self._before, about=about)
                write_thresholds(self._run, found.thresholds)
                write_json(self._run / "best.json", {"step": number, "metrics": found.metrics})
        return found.metrics

    def _evaluate(self, variables: Tree) -> Evaluation:
        e = self._config.evaluation
        return evaluate_dataset(
            self._detector, variables, self._loader, self._dataset, e, batches=e.batches
        )

    def _draw(self, found: Evaluation, number: int) -> None:
        data, e = self._dataset, self._config.evaluation
        seen = {p["image_id"] for p in found.predictions}
        records = [r for r in data.images if r.id in seen or e.batches is None][: e.panels]
        for row, record in enumerate(records):
            panel = dataset_panel(record, found.predictions, data.categories, threshold=e.threshold)
            self._log.picture(number, f"{row}", panel, self._run / "predictions" / f"{number:07d}")


def _line(metrics: dict[str, float]) -> str:
    shown = [k for k in ("segm/AP", "segm/AP50", "bbox/AP", "cgF1") if k in metrics]
    return ", ".join(f"{k} {metrics[k]:.3f}" for k in shown)
