"""Where the heads that answer clicks come from: a model's own, or those of what a run started from."""

from __future__ import annotations

from typing import Any

import numpy as np

from sam3jax.config import Config, ConfigError
from sam3jax.weights.base import is_run_folder, open_base
from sam3jax.weights.model_folder import load_params
from sam3jax.weights.names import INTERACTIVE_PART, SECOND_NECK_PART, roots
from sam3jax.weights.start import open_start

PARTS = (SECOND_NECK_PART, INTERACTIVE_PART)
HEADS = frozenset({root for part in PARTS for root in roots(part)})  # roots of the parameter tree


def has_heads(variables: Any) -> bool:
    """Whether variables hold all of the interactive path but the trunk."""
    return variables["params"].keys() >= HEADS


def heads_below(config: Config) -> dict[str, Any]:
    """The interactive heads of what a run started from, float32.

    A run of another task does not hold them. Raises FileError where the weights below have none.
    """
    if config.init is None:
        raise ConfigError(
            "this run began from random weights and trained no interactive heads, which answer clicks: train "
            "them with task=clicks, or begin from weights that have them"
        )
    if not is_run_folder(config.init):
        return load_params(open_start(config.init), np.float32, PARTS)
    below = open_base(config.model_copy(update={"task": "clicks"})).load().params
    return {root: below[root] for root in HEADS}
