"""The checkpoints of a run. The one file that touches orbax.

    checkpoints/STEP/weights          what was trained; averaged, where the run averages
                     state            what only training needs: optimizer, counters, unaveraged weights
                     about            JSON: the base's fingerprint, where the data stand
                     validation.json  metrics, thresholds and score, once the step was validated

Weights lie apart from state, so a run is read without an optimizer. Which checkpoint is best is asked of
the checkpoints themselves: there is no other record that could disagree.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sam3jax.config import ConfigError
from sam3jax.files import write_json
from sam3jax.weights.tree import Tree

CHECKPOINTS = "checkpoints"
VALIDATION = "validation.json"


def newest_about(run: Path) -> dict[str, Any] | None:
    """What `about` of a run's newest checkpoint says, None where nothing was saved yet.

    Read from the files: opening orbax's manager would wait for the other processes of a run.
    Raises ConfigError for a run of an earlier version.
    """
    folders = [p for p in (run / CHECKPOINTS).glob("*") if p.name.isdigit()]
    if any(not (folder / "about").is_dir() for folder in folders):
        raise ConfigError(
            f"{run} was written by sam3jax 0.1 and cannot be read by this version: export it with `python -m "
            "convert jax-to-torch` of version 0.1, or train again into another output"
        )
    if not folders:
        return None
    newest = max(folders, key=lambda folder: int(folder.name))
    return json.loads((newest / "about" / "metadata").read_text())


class Checkpoints:
    """The checkpoints of a run folder. With `keep`, for training: the newest `keep` and the best stay."""

    def __init__(self, run: Path, keep: int | None = None) -> None:
        # Opening to read makes orbax warn that it will not write.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._folder, self._keep = (run / CHECKPOINTS).absolute(), keep
        self._manager: ocp.CheckpointManager | None = None
        self._validations: dict[int, dict[str, Any]] = {}
        if keep is None and not self._folder.is_dir():
            return
        options = ocp.CheckpointManagerOptions(read_only=keep is None, create=keep is not None)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        for step in self._steps():
            file = self._folder / str(step) / VALIDATION
            if file.is_file():
                self._validations[step] = json.loads(file.read_text())

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return max(self._steps(), default=None)

    def best(self) -> int | None:
        """Step of the best validated checkpoint, else of the newest. Ties go to the later step."""
        scored = [(v["score"], step) for step, v in self._validations.items()]
        return max(scored)[1] if scored else self.latest()

    def about(self, step: int) -> dict[str, Any]:
        """The JSON that was saved with a step."""
        return self._restore(step, about=ocp.args.JsonRestore())["about"]

    def validation(self, step: int | None) -> dict[str, Any] | None:
        """{"metrics", "thresholds", "score"} of a step, None where it was not validated."""
        return None if step is None else self._validations.get(step)

    def weights(self, step: int, like: Tree) -> Tree:
        """The trained weights of a step as host arrays; `like` has their shapes."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like
        )
        return jax.device_get(self._restore(step, weights=_standard(abstract))["weights"])

    def restore(self, step: int, weights: Tree, state: Any) -> tuple[Tree, Any]:
        """(weights, state) of a step, in the shapes and on the devices of those given."""
        as_given = lambda tree: jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        found = self._restore(
            step, weights=_standard(as_given(weights)), state=_standard(as_given(state))
        )
        return found["weights"], found["state"]

    def save(self, step: int, weights: Tree, state: Any, about: dict[str, Any]) -> None:
        """Save in the background. A step that is there already is left alone."""
        if step in self._steps():
            return
        self.prune()
        items = dict(
            weights=ocp.args.StandardSave(weights),
            state=ocp.args.StandardSave(state),
            about=ocp.args.JsonSave(about),
        )
        self._writer.save(step, args=ocp.args.Composite(**items))

    def attach(self, step: int, validation: dict[str, Any]) -> None:
        """Put a validation into the checkpoint of its step, and drop checkpoints that need not stay."""
        self.wait()
        if jax.process_index() == 0:
            write_json(self._folder / str(step) / VALIDATION, validation)
        self._validations[step] = validation
        self.prune()

    def prune(self) -> None:
        """Drop all but the newest `keep` and the best, once they are written."""
        self.wait()
        steps = sorted(self._steps())
        for step in steps[: -(self._keep or len(steps))]:
            if step != self.best():
                self._writer.delete(step)
                self._validations.pop(step, None)

    def wait(self) -> None:
        """Wait for saves under way."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for saves under way and let go."""
        if self._manager is None:
            return
        self.wait()
        if self._keep is not None:
            self.prune()
        self._manager.close()
        self._manager = None

    @property
    def _writer(self) -> ocp.CheckpointManager:
        assert self._keep is not None, "opened to read"
        assert self._manager is not None
        return self._manager

    def _steps(self) -> list[int]:
        return [] if self._manager is None else list(self._manager.all_steps())

    def _restore(self, step: int, **items: Any) -> Any:
        assert self._manager is not None
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"the checkpoint at step {step} does not fit the run's configuration "
                f"({str(error).splitlines()[0]}): was config.yaml changed?"
            ) from error


def _standard(abstract: Any) -> Any:
    return ocp.args.StandardRestore(abstract)
