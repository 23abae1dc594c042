"""The checkpoints of a run. The one file that touches orbax.

    checkpoints/STEP/weights          what was trained; averaged, where the run averages
                     state            what only training needs: optimizer, counters, unaveraged weights
                     about            JSON: the run's identity, the step, the base's fingerprint, where the data
                                      stand, whether a validation follows, and a checksum of every array
                     validation.json  metrics, thresholds and score, once the step was validated

Weights lie apart from state, so a run is read without an optimizer. Which checkpoint is best is asked of
the checkpoints themselves: there is no other record that could disagree.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sam3jax.checksums import differences, is_whole, of_arrays, sealed
from sam3jax.config import ConfigError
from sam3jax.errors import remark
from sam3jax.files import FileError, disk_full
from sam3jax.weights.tree import Tree
from sam3jax.weights.validations import read_validation, write_validation

CHECKPOINTS = "checkpoints"
SUMS = "checksums"
_FULL = ("No space left", "quota exceeded", "File too large", "RESOURCE_EXHAUSTED")


def refuse_old(run: Path) -> None:
    """Raises ConfigError for a run of an earlier version."""
    if any(not (p / "about").is_dir() and (p / "state").is_dir() for p in _folders(run)):
        raise ConfigError(
            f"{run} was written by sam3jax 0.1 and cannot be read by this version: export it with `python -m "
            "convert jax-to-torch` of version 0.1, or train again into another output"
        )


def newest_about(run: Path) -> dict[str, Any] | None:
    """What `about` of a run's newest checkpoint says, None where nothing was saved yet. Raises ConfigError."""
    refuse_old(run)
    newest = max((int(p.name) for p in _folders(run)), default=None)
    return None if newest is None else _read_about(run, newest)


def _folders(run: Path) -> list[Path]:
    return [p for p in (run / CHECKPOINTS).glob("*") if p.name.isdigit()]


def _read_about(run: Path, step: int) -> dict[str, Any]:
    """Read from the file: opening orbax's manager would wait for the other processes of a run."""
    file = run / CHECKPOINTS / str(step) / "about" / "metadata"
    try:
        about = json.loads(file.read_text())
        good = isinstance(about["base"], str) and isinstance(about["data"], dict)
        if good and is_whole(about) is not False:
            return about
        why = "its checksum differs" if good else "it holds something else"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", None) or f"{error or type(error).__name__}"
    raise _damaged(run, step, f"{file} cannot be read ({why})")


def _damaged(run: Path, step: int, what: str) -> ConfigError:
    """The sentence for a checkpoint that cannot be used; it offers the one before."""
    before = max((n for n in (int(p.name) for p in _folders(run)) if n < step), default=None)
    remedy = "the run begins again" if before is None else f"step {before} takes its place"
    return ConfigError(
        f"the checkpoint of step {step} is damaged: {what}. Put it back; or remove {run / CHECKPOINTS / str(step)}, "
        f"then {remedy}"
    )


class Checkpoints:
    """The checkpoints of a run folder. With `keep`, for training: the newest `keep` and the best stay."""

    def __init__(self, run: Path, keep: int | None = None) -> None:
        _quieten()
        self._run, self._folder, self._keep = run, (run / CHECKPOINTS).absolute(), keep
        self._manager: ocp.CheckpointManager | None = None
        self._validations: dict[int, dict[str, Any]] = {}
        if keep is None and not self._folder.is_dir():
            return
        options = ocp.CheckpointManagerOptions(read_only=keep is None, create=keep is not None)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        for step in self.steps():
            place, about = run / CHECKPOINTS / str(step), _read_about(run, step)
            if (found := read_validation(place, about.get("run"))) is not None:
                self._validations[step] = found
            elif about.get("validates") and keep is None:
                remark(
                    f"{place} is not validated, though its training meant to: the training still runs, was stopped, or "
                    "a file was removed; its command validates the newest step again"
                )

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Of all checkpoints."""
        return [] if self._manager is None else list(self._manager.all_steps())

    def best(self) -> int | None:
        """Step of the best validated checkpoint, else of the newest. Ties go to the later step."""
        scored = self._scored()
        return max(scored)[1] if scored else self.latest()

    def would_be_best(self, step: int, score: float) -> bool:
        """Whether a step with such a score is the best one."""
        return (score, step) >= max(self._scored(), default=(score, step))

    def about(self, step: int, run_id: str | None) -> dict[str, Any]:
        """The JSON that was saved with a step. Raises ConfigError for another run's or step's checkpoint.

        run_id: of the run, from its config.yaml; None where that has none.
        """
        about = _read_about(self._run, step)
        place = self._run / CHECKPOINTS / str(step)
        if run_id is not None and about.get("run") != run_id:
            raise ConfigError(
                f"{place} belongs to another run ({about.get('run')}; this one is {run_id} by its config.yaml): put "
                "this run's own checkpoints back"
            )
        if about.get("step", step) != step:
            raise ConfigError(
                f"{place} is the checkpoint of step {about['step']} under another name: rename the folder back"
            )
        return about

    def validation(self, step: int | None) -> dict[str, Any] | None:
        """{"metrics", "thresholds", "score"} of a step, None where it was not validated."""
        return None if step is None else self._validations.get(step)

    def weights(self, step: int, like: Tree) -> Tree:
        """The trained weights of a step as host arrays; `like` has their shapes."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like
        )
        found = jax.device_get(self._restore(step, weights=_standard(abstract))["weights"])
        self._check(step, weights=found)
        return found

    def restore(self, step: int, weights: Tree, state: Any) -> tuple[Tree, Any]:
        """(weights, state) of a step, in the shapes and on the devices of those given."""
        as_given = lambda tree: jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        found = self._restore(
            step, weights=_standard(as_given(weights)), state=_standard(as_given(state))
        )
        self._check(step, weights=found["weights"], state=found["state"])
        return found["weights"], found["state"]

    def save(self, step: int, weights: Tree, state: Any, about: dict[str, Any]) -> None:
        """Save in the background. A step that is there already is left alone."""
        if step in self.steps():
            return
        self.prune()
        sums = {SUMS: {"weights": of_arrays(weights), "state": of_arrays(state)}}
        if jax.process_index() == 0:  # the one that writes JSON
            about = sealed({**about, **sums})
        items = dict(
            weights=ocp.args.StandardSave(weights),
            state=ocp.args.StandardSave(state),
            about=ocp.args.JsonSave(about),
        )
        with self._full_disks():
            self._writer.save(step, args=ocp.args.Composite(**items))

    def attach(self, step: int, validation: dict[str, Any]) -> None:
        """Put a validation into the checkpoint of its step, and drop checkpoints that need not stay."""
        self.wait()
        if jax.process_index() == 0:
            whose = _read_about(self._run, step).get("run")
            write_validation(self._folder / str(step), whose, validation)
        self._validations[step] = validation
        self.prune()

    def prune(self) -> None:
        """Drop all but the newest `keep` and the best, once they are written."""
        self.wait()
        steps = sorted(self.steps())
        for step in steps[: -(self._keep or len(steps))]:
            if step != self.best():
                self._writer.delete(step)
                self._validations.pop(step, None)

    def wait(self) -> None:
        """Wait for saves under way."""
        if self._manager is not None:
            with self._full_disks():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for saves under way and let go."""
        if self._manager is None:
            return
        try:
            self.wait()
            if self._keep is not None:
                self.prune()
        finally:
            manager, self._manager = self._manager, None
            with contextlib.suppress(Exception):  # a failed save, told once already
                manager.close()

    @property
    def _writer(self) -> ocp.CheckpointManager:
        assert self._keep is not None, "opened to read"
        assert self._manager is not None
        return self._manager

    def _scored(self) -> list[tuple[float, int]]:
        return [(v["score"], step) for step, v in self._validations.items()]

    def _check(self, step: int, **items: Any) -> None:
        """Raises ConfigError where arrays are not those that were saved."""
        sums = _read_about(self._run, step).get(SUMS)
        if sums is None:
            place = self._run / CHECKPOINTS / str(step)
            return remark(f"{place} has no checksums (an earlier version wrote it): not checked")
        for item, found in items.items():
            if wrong := differences(of_arrays(found), sums[item]):
                more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                what = f"the checksum of {wrong[0]}{more} in {item} differs"
                raise _damaged(self._run, step, what)

    def _restore(self, step: int, **items: Any) -> Any:
        assert self._manager is not None
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore have many kinds of them
            why = (str(error).splitlines() or [type(error).__name__])[0]
            what = f"it does not fit config.yaml, or a file of it was changed ({why})"
            raise _damaged(self._run, step, what) from error

    @contextlib.contextmanager
    def _full_disks(self) -> Iterator[None]:
        """Says what a failed save means. The save runs in threads of orbax, with errors of many kinds."""
        try:
            yield
        except Exception as error:
            if not self._run.is_dir():
                raise FileError(f"{self._run} was removed while its training ran") from error
            if any(word in str(error) for word in _FULL):
                raise disk_full(self._folder) from error
            raise


@functools.cache
def _quieten() -> None:
    """Keep orbax from printing, hundreds of lines long, what Checkpoints says in one.

    It logs each failure and warns that a reader will not write. Of several arrays that fail it awaits one:
    the others are logged when they are collected, or find its loop closed, which Python prints.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
    before = sys.unraisablehook

    def hook(trouble: sys.UnraisableHookArgs) -> None:
        if "Event loop is closed" in str(trouble.exc_value) or inspect.iscoroutine(trouble.object):
            return
        before(trouble)

    sys.unraisablehook = hook


def _standard(abstract: Any) -> Any:
    return ocp.args.StandardRestore(abstract)
