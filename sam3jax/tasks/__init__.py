"""Tasks: what a training is of. The loop and the step know a task only by the names in `Task`.

`TASKS[config.task](config, backend)` makes one. A new task is one file and one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
from PIL import Image

from sam3jax.config import Config
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.tasks.clicks import Clicks
from sam3jax.tasks.clips import Clips
from sam3jax.tasks.detection import Detection
from sam3jax.tasks.validated import Ask, Validated
from sam3jax.weights.tree import Tree


class Task(Protocol):
    """What the training loop and the training step ask of a task.

    parts: the parts of the table of names (`weights.names`) that the model consists of.
    batch_spec: PartitionSpecs of a batch, a prefix of its tree: P(AXIS) for what is split over pictures,
    P() for what every device holds.
    best_by: metrics by which checkpoints are judged where the user names none; the first that is measured.
    together: pictures that come together, so that batch_size is a multiple: the frames of a clip, else 1.
    """

    parts: tuple[str, ...]
    batch_spec: Any
    best_by: tuple[str, ...]

    @property
    def together(self) -> int: ...

    def open(self, tokenizer: Tokenizer) -> Any:
        """The training and validation data. Raises DataError."""
        ...

    def describe(self, data: Any) -> Iterable[str]:
        """Lines for people about the data and what is asked of them."""
        ...

    def loader(self, data: Any, **process: Any) -> Any:
        """Endless numpy batches of static shapes: `data.loader.TrainLoader`, with a state to resume from."""
        ...

    def draw(self, data: Any, batch: Any) -> Image.Image:
        """A training batch as the loader gives it, with everything that is asked, for people to look at."""
        ...

    def prepare(self, trainable: Tree, frozen: Tree, data: Any) -> tuple[Any, Tree]:
        """(what a run computes once, frozen without the weights that are then not needed)."""
        ...

    def keep(self, frozen: Tree, data: Any, mesh: Mesh) -> None:
        """Compute what the run keeps on disk of its frozen weights, before the first step; mostly nothing."""
        ...

    def count(self, batch: Any) -> Any:
        """The totals that losses are divided by, as sums over one micro-batch of one device."""
        ...

    def loss(
        self, variables: Tree, prepared: Any, batch: Any, totals: Any, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(share of the loss, terms): sums over micro-batches and devices are those of the batch."""
        ...

    def metrics(self, terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What is logged of a step, from the summed terms; `loss` among it."""
        ...

    def validation(self, data: Any, mesh: Mesh, **process: Any) -> Ask | None:
        """validate(variables, prepared, advance) -> Validated; None without validation data.

        mesh: the devices of this process.
        """
        ...


TASKS: dict[str, Callable[[Config, str | None], Task]] = {
    "detect": Detection,
    "clips": Clips,
    "clicks": Clicks,
}

__all__ = ["TASKS", "Ask", "Task", "Validated"]
