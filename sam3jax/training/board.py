"""Curves and panels for TensorBoard. It can never stop a training: what fails is said once and given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

# Made by protobuf when it is imported, where no type checker sees it.
Event, SessionLog = (getattr(event_pb2, name) for name in ("Event", "SessionLog"))


class Board:
    """Writes event files at once, in the caller's thread.

    tensorboardX's SummaryWriter hands events to a thread through a short queue; when the thread dies of a
    full disk, the training waits for it for ever.
    step: the run continues behind it; later points of an earlier process are hidden.
    """

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]) -> None:
        self._say, self._writer = say, None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=_now(), step=step + 1, session_log=start))
        except Exception as error:
            self._give_up(error)

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._write(step, lambda: summary.scalar(name, value))

    def image(self, name: str, picture: Any, step: int) -> None:
        """A panel, uint8 [Y, X, 3]."""
        self._write(step, lambda: summary.image(name, picture, dataformats="HWC"))

    def flush(self) -> None:
        """Hand everything to the system."""
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        """Flush and close; nothing is written later."""
        self._try(lambda writer: writer.close())
        self._writer = None

    def _write(self, step: int, content: Callable[[], Any]) -> None:
        def write(writer: EventsWriter) -> None:
            writer.write_event(Event(wall_time=_now(), step=step, summary=content()))

        self._try(write)

    def _try(self, action: Callable[[EventsWriter], Any]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        self._say(f"TensorBoard is given up ({error}); metrics.jsonl goes on")


def _now() -> float:
    return time.time()
