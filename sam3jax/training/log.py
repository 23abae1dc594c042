"""What a run says: metrics.jsonl, TensorBoard, a progress bar, panels. Only the first process writes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from sam3jax.checksums import changed, forget
from sam3jax.config import Config
from sam3jax.evaluation.progress import Advance, untold
from sam3jax.files import write_text
from sam3jax.training.optim import learning_rate
from sam3jax.training.timing import Timer, peak_memory
from sam3jax.training.trackers import About, Trackers, flat

Hook = Callable[[int, Mapping[str, float]], Any]  # called with a step and its metrics


def nothing(step: int, metrics: Mapping[str, float]) -> None:
    """The hook that does nothing."""


class RunLog:
    """The log of a run that continues at `step`. Lines after `step` are removed; those steps run again.

    id: the run's identity, for trackers. validated: whether the validation of `step` is done; if not, its line is removed too.
    Every line of metrics.jsonl is one object: step, split, and values by name; a value that is not
    finite is null.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        config: Config,
        *,
        id: str = "",
        validated: bool = True,
        write: bool = True,
    ) -> None:
        self._run, self._write = run, write
        self._console = Console(stderr=True)
        wide = Column(no_wrap=True, min_width=len(f"step {config.steps}/{config.steps}"))
        count = TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=wide)
        columns = count, BarColumn(16), _Now(Column(no_wrap=True))
        quiet = not (write and sys.stderr.isatty())
        self._bar = Progress(*columns, console=self._console, disable=quiet)
        self._plain = write and quiet
        self._task = self._bar.add_task("train", total=config.steps, completed=step, busy=None, values=None)  # fmt: skip
        if not write:
            return
        self._total = config.steps
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
        about = About(run, id, step, dict(flat(config.model_dump(mode="json"))))
        self._trackers = Trackers(config.trackers, about, self.say)
        self._bar.start()

    def say(self, *lines: str | None) -> None:
        """Lines for people; None is no line."""
        for line in filter(None, lines if self._write else ()):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def busy(self, what: str, when: bool = True) -> Iterator[Advance]:
        """Something that takes long and is no step: the bar names it, its clock goes on.

        Yields what may be told how much of it is done.
        """
        if not when:
            yield untold
            return
        start = time.perf_counter()
        if self._plain:
            self.say(f"{what} ...")
        self._bar.update(self._task, busy=(what, start))
        yield lambda done, total: self._bar.update(
            self._task, busy=(f"{what} {done}/{total}", start)
        )
        self._bar.update(self._task, busy=None)
        if self._plain:
            self.say(f"{what}: {_duration(time.perf_counter() - start)}")

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """A step is done: the bar moves. values: `loss`, `rate`, and where they are known
        `images_per_second` and `seconds_left`."""
        self._bar.update(self._task, completed=step, values=dict(values))

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a training step."""
        self._line(step, "train", values)
        if self._plain:
            f = _fields(values)
            epoch = f" epoch {values['epoch']:.2f}" if "epoch" in values else ""
            self.say(
                f"step {step}/{self._total}{epoch} loss {f['loss']} lr {f['rate']} "
                f"{f['speed']} images/s{f['left'] and ', ' + f['left']}"
            )

    def base(self, values: Mapping[str, float]) -> None:
        """Metrics of the model that the run starts from: step 0 of the curves of trackers."""
        self.say(f"base: {summary_line(values)}")
        if self._write:
            for name, value in values.items():
                self._trackers.scalar(f"valid/{name}", float(value), 0)

    def valid(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a validation."""
        self._line(step, "valid", values)
        self.say(f"step {step} validation: {summary_line(values)}")

    def finish(self, values: Mapping[str, float]) -> None:
        """The metrics of the run's last validation, for trackers that compare runs."""
        if self._write:
            self._trackers.finish(values)

    def picture(self, step: int, name: str, picture: Any, folder: Path) -> None:
        """A panel: PNG in the run folder and image in TensorBoard."""
        if (
            not self._write or not self._run.is_dir()
        ):  # a run that was removed is not begun again here
            return
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.png")
        group = folder.parent.name if folder.name.isdigit() else folder.name
        self._trackers.image(f"{group}/{name}", np.asarray(picture), step)

    def flush(self) -> None:
        """Onto the disk, before a checkpoint: a run that continues behind it misses no line."""
        if self._write:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._trackers.flush()

    def close(self) -> None:
        """Flush everything."""
        self._bar.stop()
        if self._write:
            self._file.close()
            self._trackers.close()

    def _line(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if not self._write:
            return
        numbers = {k: float(v) for k, v in values.items()}
        clean = {k: v if np.isfinite(v) else None for k, v in numbers.items()}
        self._file.write(json.dumps({"step": step, "split": split, **clean}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            if np.isfinite(value):
                self._trackers.scalar(f"{split}/{name}", value, step)


class _Now(ProgressColumn):
    """What a run is at: what it waits for and since when, else the values of the newest step."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        elapsed = _duration(task.elapsed or 0)
        if task.fields["busy"]:
            what, start = task.fields["busy"]
            return Text(
                f"{what}: {_duration(time.perf_counter() - start)} · {elapsed} since the start"
            )
        if (values := task.fields["values"]) is None:
            return Text(f"getting ready · {elapsed}")
        f = _fields(values)
        parts = [f"loss {f['loss']}", f"lr {f['rate']}"]
        parts += [f"{f['speed']} images/s"] if f["speed"] != "-" else []
        parts += [f"epoch {values['epoch']:.2f}"] if "epoch" in values else []
        parts += [f["left"]] if f["left"] else []
        return Text(" · ".join([*parts, elapsed]))


def _fields(values: Mapping[str, float]) -> dict[str, Any]:
    """What the bar and the log show of a step."""
    speed, left = values.get("images_per_second"), values.get("seconds_left")
    return {
        "loss": f"{values['loss']:.4g}",
        "rate": f"{values['rate']:.2e}",
        "speed": "-" if speed is None else f"{speed:.3g}",
        "left": f"{_duration(left)} left" if left else "",
    }


class StepLog:
    """Logs every step once it is done: `add` after it was started, `flush` before a checkpoint.

    A step is read when the next one was started: waiting for step n - 1 while step n runs keeps the device
    busy. pictures: of an epoch. hooks: called with each step and its metrics; they may end the run.
    """

    def __init__(self, log: RunLog, config: Config, pictures: int, *hooks: Hook) -> None:
        self.timer = Timer()
        self._log, self._config, self._hooks = log, config, hooks
        self._epochs = config.batch_size / pictures  # of a step
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
            for hook in self._hooks:
                hook(step, values)
        finally:
            values["rate"] = np.asarray(self._schedule(step)).item()
            values["epoch"] = step * self._epochs
            if (seconds := self.timer.median(recent=50)) is not None:
                values["images_per_second"] = config.batch_size / seconds
                values["seconds_left"] = (config.steps - step) * seconds
            self._log.progress(step, values)
            if not step % config.log_every or step in (1, config.steps):
                values["peak_memory_gb"] = peak_memory()
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
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def summary_line(metrics: Mapping[str, float]) -> str:
    """The few metrics that people look at first."""
    first = ("segm/AP", "segm/AP50", "bbox/AP", "cgF1", "false_alarms")
    shown = [k for k in first if k in metrics] or list(metrics)[:5]
    return ", ".join(f"{k} {metrics[k]:.3f}" for k in shown)
