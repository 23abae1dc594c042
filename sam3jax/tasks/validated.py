"""What a validation returns, whatever the task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from sam3jax.evaluation.progress import Advance
from sam3jax.weights.tree import Tree


@dataclass(frozen=True)
class Validated:
    """Metrics of a model on the validation data, and how its results are drawn and written.

    metrics: name -> value. thresholds: phrase -> score from which a detection counts, where the task
    chooses one. panels(): (name, picture) pairs, drawn when asked for. write(folder, base, about): puts
    the results into a run folder, beside those of the base model where there are some.
    """

    metrics: dict[str, float]
    panels: Callable[[], Iterator[tuple[str, Image.Image]]]
    write: Callable[[Path, Validated | None, Mapping[str, Any]], None]
    thresholds: dict[str, float] = field(default_factory=dict)
    found: Any = None


class Ask(Protocol):
    """Validate these weights. prepared: what `task.prepare` returned. advance: told per batch."""

    def __call__(self, variables: Tree, prepared: Any, advance: Advance = ...) -> Validated: ...
