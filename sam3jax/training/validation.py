"""Validation while a run trains: metrics, panels, and which step was best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax

from sam3jax.config import Config, ConfigError
from sam3jax.tasks import Ask, Validated
from sam3jax.training.length import Patience
from sam3jax.training.log import Hook, RunLog, nothing
from sam3jax.training.sharding import whole
from sam3jax.training.state import TrainState
from sam3jax.viewing.meanings import less_is_better
from sam3jax.weights.checkpoints import Checkpoints
from sam3jax.weights.trainable import merge
from sam3jax.weights.tree import Tree

_WORST = -1e30  # the score of a metric that is not finite


class Validation:
    """Validates the run's weights where they lie, and puts what it finds into their checkpoint.

    Weights that are split over devices are gathered for the time of a validation.

    ask: what `task.validation` returned. best_by: the task's own metrics to judge by.
    """

    def __init__(
        self,
        ask: Ask,
        config: Config,
        best_by: tuple[str, ...],
        run: Path,
        log: RunLog,
        checkpoints: Checkpoints,
        patience: Patience,
        told: Hook = nothing,
    ) -> None:
        """told: called with the step and the metrics of each validation."""
        self._ask, self._config, self._best_by = ask, config, best_by
        self._run, self._log, self._checkpoints = run, log, checkpoints
        self.patience, self._told = patience, told
        self._before: Validated | None = None

    def base(self, trainable: Tree, frozen: Tree, prepared: Any) -> dict[str, float]:
        """Metrics of the model that the run starts from, `trainable` as before the first step. Raises ConfigError for an unknown best_metric."""
        with self._log.busy("validating the model that the run starts from") as advance:
            self._before = self._ask(whole(merge(trainable, frozen)), prepared, advance)
        self._log.base(self._before.metrics)
        self._judged(self._before.metrics)
        return self._before.metrics

    def __call__(self, state: TrainState, frozen: Tree, prepared: Any, step: int) -> None:
        """Validate the checkpoint of this step, which is being saved or was saved."""
        weights = state.trainable if state.ema is None else state.ema
        with self._log.busy("validating") as advance:
            found = self._ask(whole(merge(weights, frozen)), prepared, advance)
        self._log.valid(step, found.metrics)
        for name, panel in found.panels():
            self._log.picture(step, name, panel, self._run / "predictions" / f"{step:07d}")
        name = self._judged(found.metrics)
        score = found.metrics[name] * (-1 if less_is_better(name) else 1)
        score = score if math.isfinite(score) else _WORST
        # Before the checkpoint counts as validated: a run that is killed between the two writes them again.
        if self._checkpoints.would_be_best(step, score) and jax.process_index() == 0:
            about = {"run": str(self._run), "step": step, "weights": "tuned"}
            found.write(self._run, self._before, about)
        validation = {"metrics": found.metrics, "thresholds": found.thresholds, "score": score}
        self._checkpoints.attach(step, validation)
        self.patience.add(score)
        self._told(step, found.metrics)

    def _judged(self, metrics: dict[str, float]) -> str:
        """The metric that decides which checkpoint is best."""
        wanted = self._config.best_metric
        names = [wanted] if wanted else [*self._best_by, *metrics]
        for name in names:
            if name in metrics:
                return name
        raise ConfigError(
            f"best_metric {wanted!r} is not measured on the validation data; there are {', '.join(metrics)}"
        )
