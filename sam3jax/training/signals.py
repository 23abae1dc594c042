"""What asks a training to stop or to save out of turn: signals, and the clock."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam3jax.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# Many processes compare notes only every so many steps: it waits for the device, and for the slowest.
AGREE_EVERY = 5


class Interruptions:
    """Inside `with`: the first signal is noted, for `after` to return; the second ends the process.

    A thread reads the signals, so that the second one works while a step compiles. Outside the main thread
    signals keep their meaning, since only the main thread may change it.
    """

    def __init__(self, save_minutes: float) -> None:
        self.received = 0
        self._seconds, self._saved = 60 * save_minutes, time.monotonic()
        self._kept: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._kept = {s: signal.signal(s, _noted_elsewhere) for s in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._kept.items():
            signal.signal(number, handler)
        self._writer.close()  # ends the thread
        self._kept = {}

    def after(self, step: int) -> tuple[int, bool]:
        """(the signal that asks to stop or 0, whether it is time to save): the same on every process."""
        late = time.monotonic() - self._saved >= self._seconds
        found = np.array([self.received, late], np.int32)
        if jax.process_count() > 1:
            if step % AGREE_EVERY:
                return 0, False
            found = np.asarray(multihost_utils.process_allgather(found)).max(0)
        return int(found[0]), bool(found[1])

    def saved(self) -> None:
        """A checkpoint was made: the clock starts again."""
        self._saved = time.monotonic()

    def _read(self) -> None:
        with self._reader, contextlib.suppress(OSError):
            while byte := self._reader.recv(1):
                if byte[0] not in SIGNALS:
                    continue
                if self.received:
                    os._exit(128 + byte[0])
                self.received = byte[0]
                name = signal.Signals(byte[0]).name
                print(
                    f"{name}: the step under way is finished and saved; a second signal ends at once",
                    file=sys.stderr, flush=True,
                )  # fmt: skip


def stopped(step: int, number: int) -> Stopped:
    """What a training raises that a signal ended behind a saved step."""
    return Stopped(f"stopped at step {step}, the same command continues", 128 + number)


def _noted_elsewhere(number: int, frame: object) -> None:
    """Python writes the signal to the wakeup socket only where a function of its own handles it."""
