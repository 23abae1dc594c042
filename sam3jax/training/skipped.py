"""Steps that were skipped because their loss or gradient was not finite: how many are too many."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from sam3jax.errors import UserError


class NotFiniteError(UserError):
    """Nothing is learned any more. The message names the step and the terms that are not finite."""


class SkippedSteps:
    """Counts skipped steps in a row. Raises NotFiniteError behind `most` of them.

    where(): a sentence about the first NaN, asked for only then.
    """

    def __init__(self, most: int, total: int, where: Callable[[], str] = lambda: "") -> None:
        self._most, self._total, self._row, self._where = most, total, 0, where

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """metrics: of the step; `skipped` counts all skipped steps of the run."""
        skipped = int(metrics["skipped"])
        self._row = self._row + 1 if skipped > self._total else 0
        self._total = skipped
        if self._row >= self._most:
            place = f"; {self._where()}".removesuffix("; ")
            raise NotFiniteError(
                f"step {step}: {self._row} steps in a row were skipped, {not_finite(metrics)}{place}; lower "
                "optim.learning_rate, set model.compute_dtype=float32, or look at the pictures of these steps "
                "with sam3jax doctor --decode (max_skipped allows more)"
            )


def not_finite(metrics: Mapping[str, float]) -> str:
    """Which terms of a step are not finite, the first one first: losses are computed before gradients."""
    names = [n for n, v in metrics.items() if not np.isfinite(v) and n not in ("loss", "grad_norm")]
    loss = float(metrics["loss"])
    if np.isfinite(loss):
        return f"their loss is finite ({loss:.4g}) and their gradient is not: the NaN is in the backward pass"
    if not names:
        return f"their loss is {loss}"
    values = ", ".join(f"{name} {float(metrics[name])}" for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"their loss is {loss}, first of all in {values}{more}"
