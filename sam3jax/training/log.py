"""What a run says: metrics.jsonl, TensorBoard, a progress bar, panels. Only the first process writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from sam3jax.files import write_text


class RunLog:
    """The log of a run that continues at `step`. Lines after `step` are removed; those steps run again.

    validated: whether the validation of `step` is done; if not, its line is removed too.
    Every line of metrics.jsonl is one object: step, split, and values by name; a value that is not
    finite is null.
    """

    def __init__(
        self, run: Path, step: int, total: int, *, validated: bool = True, write: bool = True
    ) -> None:
        self._write = write
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
            kept = [line for line in file.read_text().splitlines() if _is_kept(line, last)]
            write_text(file, "".join(f"{line}\n" for line in kept))
        self._file = file.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
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
        if not self._write:
            return
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.png")
        self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")

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
                self._board.add_scalar(f"{split}/{name}", value, step)


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
