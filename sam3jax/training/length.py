"""How long a run is: steps counted from epochs, and the end when validation no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sam3jax.config import Config, ConfigError


def in_steps(config: Config, pictures: int, validated: bool = True) -> Config:
    """The same run with `steps` counted from `epochs`, where they are set; pictures: of an epoch.

    validated: whether there are validation data. Raises ConfigError for what needs them.
    """
    judging = [name for name in ("patience", "best_metric") if getattr(config, name)]
    if judging and not validated:
        raise ConfigError(
            f"{judging[0]} is about validations, and there are no validation data: give data.valid (or a split "
            f"{config.data.valid_split} beside the training pictures), or leave {judging[0]} out"
        )
    if config.epochs is None:
        return config
    steps = max(1, math.ceil(config.epochs * pictures / config.batch_size))
    return config.model_copy(update={"steps": steps})


def is_validated(config: Config, step: int) -> bool:
    """Whether a step is validated: every `eval_every`th, and the last one."""
    return step == config.steps or (config.eval_every > 0 and step % config.eval_every == 0)


class Patience:
    """Counts validations that are no better than the best one before, and says when they are too many.

    patience: how many may pass; 0: any number. least: by how much a score must be better. The state is a
    part of each checkpoint, so that a run that was stopped counts on.
    """

    def __init__(
        self, patience: int, least: float = 0.0, state: Mapping[str, Any] | None = None
    ) -> None:
        self._patience, self._least = patience, least
        self._best: float | None = (state or {}).get("best")
        self._waited: int = (state or {}).get("waited", 0)

    def add(self, score: float) -> None:
        """A validation; more is better."""
        if self._best is None or score > self._best + self._least:
            self._best, self._waited = score, 0
        else:
            self._waited += 1

    @property
    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint; fits into JSON."""
        return {"best": self._best, "waited": self._waited}

    @property
    def is_over(self) -> bool:
        """Whether nothing has improved for too long."""
        return 0 < self._patience <= self._waited
