"""A run folder: opened to be asked, or to be continued. It holds what was trained, not its base."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam3jax.checksums import is_whole_text, record_files, sealed_text
from sam3jax.config import Config, ConfigError, dump_config, load_config
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.errors import remark
from sam3jax.files import make_folder, write_text
from sam3jax.model import Sam3
from sam3jax.weights.base import Base, open_base, same_base
from sam3jax.weights.checkpoints import Checkpoints, newest_about, refuse_old
from sam3jax.weights.frozen import in_eight_bits
from sam3jax.weights.lock import LOCK, RunLock, held
from sam3jax.weights.model_folder import is_model_folder
from sam3jax.weights.trainable import merge, start
from sam3jax.weights.tree import Tree, dotted

CONFIG = "config.yaml"
# What a run may change when it continues; anything else would make it another run. The base and the data may
# lie elsewhere: fingerprints tell whether they are the same.
MAY_CHANGE = {
    "steps", "epochs", "patience", "min_improvement", "trackers", "eval_every", "save_every", "save_minutes", "log_every", "keep", "max_skipped", "evaluation", "output",
    "draw_batches", "resume", "id", "init", "data.train", "data.valid", "data.workers", "data.max_megapixels",
    "data.allow_outside", "shard",
}  # fmt: skip


class RunFolder(NamedTuple):
    """A run folder that is being trained into. The first process alone has the run's id, and the lock."""

    path: Path
    id: str | None
    lock: RunLock | None

    def check(self) -> None:
        """Raises FileError where the folder is no longer there."""
        if self.lock is not None:
            self.lock.check()


@dataclass(frozen=True)
class Run:
    """A run folder in memory, with the weights of one checkpoint.

    variables: tuned; base_variables: where it began; step: of `variables`. thresholds: phrase -> score
    chosen when they were validated. trained: what the checkpoint holds of `variables`;
    base_fingerprint: of the weights below. metrics: of that validation.
    """

    path: Path
    config: Config
    model: Sam3
    variables: Tree
    base_variables: Tree
    tokenizer: Tokenizer
    step: int
    thresholds: dict[str, float]
    trained: Tree
    base_fingerprint: str
    metrics: dict[str, float] = field(default_factory=dict)

    def asked(self, base: bool = False) -> Tree:
        """The tuned (or base) variables as the run computes with them; exports take those above."""
        variables = self.base_variables if base else self.variables
        if self.config.base_dtype == "float":
            return variables
        return {**variables, "params": in_eight_bits(variables["params"], self.config)}


def open_run_base(path: str | Path) -> Base:
    """Sizes and vocabulary of a run, nothing big read. Raises ConfigError where the folder is no run."""
    path = Path(path).expanduser()
    file = path / CONFIG
    if is_model_folder(path) or path.is_file():
        raise ConfigError(
            f"{path} holds weights, it is no run folder: predict takes it as --model, training as init="
        )
    if not file.is_file():
        raise ConfigError(
            f"{path} is no run folder: expected {CONFIG}, written by python -m sam3jax.train"
        )
    refuse_old(path)  # a run of version 0.1 is refused for what it is, not for its settings
    return open_base(_read_config(file))


def _read_config(file: Path) -> Config:
    """Says so where somebody edited it: a run that lies elsewhere needs it, and damage looks the same."""
    config = load_config(file)
    if not is_whole_text(file.read_text()):
        remark(f"{file} is not as training wrote it: if nobody edited it, put it back")
    return config


def read_run(path: str | Path, *, step: int | None = None) -> Run:
    """A run with the weights of its best checkpoint (the newest where none was validated), on the host.

    Raises ConfigError where the folder is no run, has no checkpoint, or its base is gone.
    """
    path = Path(path).expanduser()
    base = open_run_base(path)
    config = base.config
    checkpoints = Checkpoints(path)
    try:
        step = step if step is not None else checkpoints.best()
        remark_missing(path, checkpoints.steps())
        if step is None:
            raise ConfigError(f"{path} has no checkpoint yet: train it, or give another run")
        about = checkpoints.about(step, config.id or "none")
        weights = base.load()
        check_base(path, config, about["base"], weights.fingerprint)
        trainable, frozen = start(weights.params, config)
        trained = checkpoints.weights(step, trainable)
        validation = checkpoints.validation(step) or {}
    finally:
        checkpoints.close()
    own = {"params": trainable.get("params", {})}
    return Run(
        path=path, config=config, model=Sam3(config.model), variables=merge(trained, frozen),
        base_variables={"params": merge(own, frozen)["params"]}, tokenizer=base.tokenizer, step=step,
        thresholds=validation.get("thresholds", {}), trained=trained, base_fingerprint=weights.fingerprint,
        metrics=validation.get("metrics", {}),
    )  # fmt: skip


def remark_missing(path: Path, steps: Sequence[int]) -> None:
    """Say which checkpoint is gone, where other files of a run speak of it. steps: of those that are there."""
    for name, key in (("evaluation.json", "step"), ("summary.json", "steps")):
        try:
            told = json.loads((path / name).read_text())[key]
        except (OSError, ValueError, KeyError, TypeError):  # the report says so
            continue
        # Training drops checkpoints; the best one, which evaluation.json is of, and the last one stay.
        if (
            steps
            and isinstance(told, int)
            and told not in steps
            and (key == "step" or told > max(steps))
        ):
            others = ", ".join(map(str, sorted(steps)))
            remark(
                f"{path / name} speaks of step {told}, whose checkpoint is gone; there are {others}"
            )
            return


def check_base(path: Path, config: Config, began: str, found: str) -> None:
    """Raises ConfigError where `init` no longer holds the weights that the run started from."""
    if not same_base(began, found):
        raise ConfigError(
            f"{path} was trained from other weights or another vocabulary than {config.init} holds now (fingerprint "
            f"{began} in its checkpoints, found {found}): put those back, or train again into another output"
        )


@contextlib.contextmanager
def open_run_folder(config: Config, fingerprint: str) -> Iterator[RunFolder]:
    """Make the run folder, or check that the one there may be continued with these base weights.

    The first process does, and holds the folder's lock; the others wait for its word. Raises ConfigError
    where the folder is in use or holds a run that `config` does not continue, FileError where it cannot be
    written to.
    """
    path, wrong, identity = Path(config.output), None, None
    with contextlib.ExitStack() as ending:
        lock = None
        if jax.process_index() == 0:
            try:
                _refuse_foreign(path)
                lock = ending.enter_context(held(make_folder(path)))
                identity = _open_run_folder(path, config, fingerprint)
            except (ValueError, OSError) as error:
                wrong = error
        if jax.process_count() > 1:
            failed = multihost_utils.broadcast_one_to_all(np.array(wrong is not None))
            if failed and wrong is None:
                wrong = ConfigError(f"{path} cannot be used; the first process says why")
        if wrong is not None:
            raise wrong
        yield RunFolder(path, identity, lock)


def _refuse_foreign(path: Path) -> None:
    if (path / CONFIG).is_file() or not path.is_dir():
        return
    if any(entry.name != LOCK for entry in path.iterdir()):
        raise ConfigError(f"{path} is not empty and no run folder: give another output")


def _open_run_folder(path: Path, config: Config, fingerprint: str) -> str:
    """Write config.yaml; returns the run's identity."""
    file, identity = path / CONFIG, None
    if file.is_file() and config.resume == "false":
        raise ConfigError(
            f"{path} holds a run already and resume is false: give another output, or remove the folder"
        )
    if file.is_file() and (saved := newest_about(path)) is not None:
        before = _read_config(file)
        if changed := _changes(before, config):
            raise ConfigError(
                f"{path} holds a run with other settings ({'; '.join(changed)}): give another output, or "
                "take the settings back to continue it"
            )
        check_base(path, config, saved["base"], fingerprint)
        identity = before.id
    identity = identity or secrets.token_hex(8)
    write_text(file, sealed_text(dump_config(config.model_copy(update={"id": identity}))))
    record_files(path, CONFIG)  # its own checksum does not tell it from another run's
    return identity


def _changes(before: Config, now: Config) -> list[str]:
    """Settings that differ and would make it another run, as `key old -> new`."""
    old, new = (dotted(c.model_dump(mode="json")) for c in (before, now))
    return [
        f"{key} {old.get(key)} -> {value}"
        for key, value in new.items()
        if old.get(key) != value and not {key, key.split(".")[0]} & MAY_CHANGE
    ]
