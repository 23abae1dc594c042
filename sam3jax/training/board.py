"""TensorBoard's files, written without TensorFlow and in the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

# Made by protobuf when it is imported, where no type checker sees it.
Event, SessionLog = (getattr(event_pb2, name) for name in ("Event", "SessionLog"))


class Board:
    """A tracker (see `trackers`) that writes event files at once.

    tensorboardX's SummaryWriter hands events to a thread through a short queue; when the thread dies of a
    full disk, the training waits for it for ever.
    step: the run continues behind it; later points of an earlier process are hidden. settings: shown as text,
    and as hyperparameters beside what the run came to.
    """

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._settings = dict(settings or {})
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        if self._settings and step == 0:
            lines = "".join(f"    {name}: {value}\n" for name, value in self._settings.items())
            self._write(0, summary.text("settings", lines))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._write(step, summary.scalar(name, value))

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """A panel, uint8 [Y, X, 3]."""
        self._write(step, summary.image(name, picture, dataformats="HWC"))

    def finish(self, metrics: Mapping[str, float]) -> None:
        """The settings as hyperparameters, with the metrics that the run came to."""
        plain = {
            n: v if isinstance(v, bool | int | float | str) else str(v)
            for n, v in self._settings.items()
        }
        named = {f"final/{name}": float(value) for name, value in metrics.items()}
        for part in summary.hparams(plain, named):
            self._write(0, part)
        for name, value in named.items():
            self._write(0, summary.scalar(name, value))

    def flush(self) -> None:
        """Hand everything to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close; nothing is written later."""
        self._writer.close()

    def _write(self, step: int, content: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=content))
