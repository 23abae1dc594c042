"""What a run says: metrics.jsonl, TensorBoard, a progress bar, panels. Only the first process writes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sam3jax.checksums import changed, forget
from sam3jax.config import Config
from sam3jax.files import write_text
from sam3jax.training.board import Board
from sam3jax.training.optim import learning_rate
from sam3jax.training.timing import Timer


class RunLog:
    """The log of a run that continues at `step`. Lines after `step` are removed; those steps run again.

    validated: whether the validation of `step` is done; if not, its line is removed too.
    Every line of metrics.jsonl is one object: step, split, and values by name; a value that is not
    finite is null.
    """

    def __init__(
        self, run: Path, step: int, total: int, *, validated: bool = True, write: bool = True
    ) -> None:
        self._run, self._write = run, write
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} · lr {task.fields[rate]} · {task.fields[speed]} images/s"),
            TimeRemainingColumn(),
        )  # fmt: skip
        quiet = not (write and sys.stderr.isatty())
        self._bar = Progress(*columns, console=self._console, disable=quiet)
        self._plain = write and quiet
        self._task = self._bar.add_task("train", total=total, completed=step, loss="-", rate="-", speed="-")  # fmt: skip
        if not write:
            return
        self._total = total
        file = run / "metrics.jsonl"
        kept = []
        if file.is_file():
            last = {"train": step, "valid": step if validated else step - 1}
            if damaged := changed(run, [file.name]):
                self.say(f"{', '.join(damaged)}: not as the run wrote it; its curves may be wrong")
            forget(run, file.name)
            kept = [
                line
                for line in file.read_text(errors="replace").splitlines()
                if _is_kept(line, last)
            ]
            write_text(file, "".join(f"{line}\n" for line in kept))
        elif step:
            self.say(f"note: {file} is gone: its curves begin again behind step {step}")
        self._file = file.open("a")
        self._board = Board(run / "tensorboard", step, self.say)
        self._bar.start()

    def say(self, line: str) -> None:
        """One line for people."""
        if self._write:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a training step; `loss`, `rate` and `images_per_second` go to the bar."""
        self._line(step, "train", values)
        if not self._write:
            return
        speed = values.get("images_per_second")
        fields: dict[str, Any] = dict(
            loss=f"{values['loss']:.4g}",
            rate=f"{values['rate']:.2e}",
            speed="-" if speed is None else f"{speed:.3g}",
        )
        self._bar.update(self._task, completed=step, **fields)
        if self._plain:
            left = "" if speed is None else f", {_duration(values['seconds_left'])} left"
            self.say(
                f"step {step}/{self._total} loss {fields['loss']} lr {fields['rate']} "
                f"{fields['speed']} images/s{left}"
            )

    def valid(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a validation."""
        self._line(step, "valid", values)
        self.say(f"step {step} validation: {summary_line(values)}")

    def picture(self, step: int, name: str, picture: Any, folder: Path) -> None:
        """A panel: PNG in the run folder and image in TensorBoard."""
        if (
            not self._write or not self._run.is_dir()
        ):  # a run that was removed is not begun again here
            return
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.png")
        self._board.image(name, np.asarray(picture), step)

    def flush(self) -> None:
        """Onto the disk, before a checkpoint: a run that continues behind it misses no line."""
        if self._write:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Flush everything."""
        self._bar.stop()
        if self._write:
            self._file.close()
            self._board.close()

    def _line(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if not self._write:
            return
        numbers = {k: float(v) for k, v in values.items()}
        clean = {k: v if np.isfinite(v) else None for k, v in numbers.items()}
        self._file.write(json.dumps({"step": step, "split": split, **clean}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            if np.isfinite(value):
                self._board.scalar(f"{split}/{name}", value, step)


class StepLog:
    """Logs every step once it is done: `add` after it was started, `flush` before a checkpoint.

    A step is read when the next one was started: waiting for step n - 1 while step n runs keeps the device
    busy. skipped: called with each step's metrics, and may end the run.
    """

    def __init__(
        self, log: RunLog, config: Config, skipped: Callable[[int, Mapping[str, float]], None]
    ) -> None:
        self.timer = Timer()
        self._log, self._config, self._skipped = log, config, skipped
        self._schedule: Callable[[int], Any] = learning_rate(config.optim, config.steps)
        self._pending: tuple[int, Any] | None = None

    def add(self, step: int, metrics: Any) -> None:
        """A step was started."""
        self._finish()
        self._pending = step, metrics

    def flush(self) -> None:
        """Everything onto the disk; what follows (validation, saving) is no part of a step."""
        self._finish()
        self._log.flush()
        self.timer.pause()

    def _finish(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        jax.block_until_ready(metrics)
        self.timer.step_done()
        config, values = self._config, _as_floats(metrics)
        try:
            self._skipped(step, values)
        finally:
            if not step % config.log_every or step in (1, config.steps):
                values["rate"] = np.asarray(self._schedule(step)).item()
                if (seconds := self.timer.median(recent=50)) is not None:
                    values["images_per_second"] = config.batch_size / seconds
                    values["seconds_left"] = (config.steps - step) * seconds
                self._log.train(step, values)


def _as_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    found: Any = jax.device_get(dict(metrics))
    return {name: np.asarray(value).item() for name, value in found.items()}


def _is_kept(line: str, last: Mapping[str, int]) -> bool:
    """Whether a line is whole and of a step that need not run again."""
    try:
        content = json.loads(line)
        return content["step"] <= last[content["split"]]
    except (ValueError, KeyError, TypeError):  # cut off by a crash
        return False


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def summary_line(metrics: Mapping[str, float]) -> str:
    """The few metrics that people look at first."""
    first = ("segm/AP", "segm/AP50", "bbox/AP", "cgF1", "false_alarms")
    shown = [k for k in first if k in metrics] or list(metrics)[:5]
    return ", ".join(f"{k} {metrics[k]:.3f}" for k in shown)
