"""Where a run is logged beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow; one small seam.

A tracker can never stop a training: what fails is said once, and that tracker is given up. The packages of
wandb and mlflow are the user's to install; their own environment variables say where they log
(WANDB_MODE=offline, MLFLOW_TRACKING_URI).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from sam3jax.config import ConfigError
from sam3jax.training.board import Board

_PROJECT = "sam3jax"  # where the user's environment names none
_MOST = 400  # characters of a parameter, MLflow takes 500


class About(NamedTuple):
    """What a tracker is told of a run. id: its identity; step: it continues behind it; settings: by name."""

    path: Path
    id: str
    step: int
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """What a run tells a tracker. Pictures are uint8 [Y, X, 3]; steps never fall, but for a run that continues."""

    def scalar(self, name: str, value: float, step: int) -> None: ...
    def image(self, name: str, picture: np.ndarray, step: int) -> None: ...
    def finish(self, metrics: Mapping[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Wandb:
    """Weights & Biases. A run that continues, continues there too."""

    def __init__(self, about: About) -> None:
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=about.path.resolve().name,
            id=about.id,
            resume="allow",
            dir=str(about.path),
            config=dict(about.settings),
        )

    def scalar(self, name: str, value: float, step: int) -> None:
        self._run.log({name: value}, step=step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def finish(self, metrics: Mapping[str, float]) -> None:
        self._run.summary.update({f"final/{name}": value for name, value in metrics.items()})

    def flush(self) -> None:
        """It sends on its own."""

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow. A run that continues, continues there too."""

    def __init__(self, about: About) -> None:
        self._mlflow = importlib.import_module("mlflow")
        if not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            self._mlflow.set_experiment(_PROJECT)
        known = self._mlflow.search_runs(
            filter_string=f"tags.sam3jax_id = '{about.id}'", output_format="list"
        )
        if known:
            self._mlflow.start_run(run_id=known[0].info.run_id)
        else:
            self._mlflow.start_run(
                run_name=about.path.resolve().name, tags={"sam3jax_id": about.id}
            )
            self._mlflow.log_params({k: str(v)[:_MOST] for k, v in about.settings.items()})

    def scalar(self, name: str, value: float, step: int) -> None:
        self._mlflow.log_metric(_mlflow_name(name), value, step=step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self._mlflow.log_image(picture, artifact_file=f"{_mlflow_name(name)}/{step:07d}.png")

    def finish(self, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({_mlflow_name(f"final/{n}"): v for n, v in metrics.items()})

    def flush(self) -> None:
        """Every call is written at once."""

    def close(self) -> None:
        self._mlflow.end_run()


def _mlflow_name(name: str) -> str:
    """Letters, digits and / . - _ and blanks alone."""
    return "".join(c if c.isalnum() or c in "/.-_ " else "_" for c in name.replace("&", "and"))


MAKERS: dict[str, Callable[[About], Tracker]] = {
    "tensorboard": lambda about: Board(about.path / "tensorboard", about.step, about.settings),
    "wandb": Wandb,
    "mlflow": Mlflow,
}
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}  # of those that sam3jax does not bring


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker whose package is not installed."""
    for name in names:
        package = PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"trackers: {name} needs the package {package}, which is not installed: pip install {package}, "
                f"or take it out of the list"
            )


class Trackers:
    """All trackers of a run. say: for people, once for each tracker that is given up."""

    def __init__(self, names: Sequence[str], about: About, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            with _Given(self, name):
                self._open[name] = MAKERS[name](about)

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._each(lambda tracker: tracker.scalar(name, value, step))

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """A panel, uint8 [Y, X, 3]."""
        self._each(lambda tracker: tracker.image(name, picture, step))

    def finish(self, metrics: Mapping[str, float]) -> None:
        """What the run came to."""
        self._each(lambda tracker: tracker.finish(metrics))

    def flush(self) -> None:
        """Hand everything to the system."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Flush and close; nothing is written later."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def give_up(self, name: str, error: BaseException) -> None:
        """Go on without a tracker."""
        self._open.pop(name, None)
        self._say(f"{name} is given up ({error}); metrics.jsonl goes on")

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with _Given(self, name):
                tell(tracker)


class _Given:
    """A call of a tracker: whatever it raises, but for what is meant to end the program, gives it up."""

    def __init__(self, trackers: Trackers, name: str) -> None:
        self._trackers, self._name = trackers, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self._trackers.give_up(self._name, error)
        return True


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key`, value of every setting."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
