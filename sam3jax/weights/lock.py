"""The lock of a run folder: one training at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from sam3jax.config import ConfigError
from sam3jax.files import FileError

LOCK = ".lock"


class RunLock:
    """A run folder that this process trains into."""

    def __init__(self, run: Path) -> None:
        self._run, self._file = run, os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)

    def check(self) -> None:
        """Raises FileError where the folder was removed, moved or replaced."""
        try:
            there = os.stat(self._run / LOCK)
        except OSError:
            there = None
        if there is None or not os.path.samestat(there, os.fstat(self._file)):
            raise FileError(
                f"{self._run} was removed or replaced while its training ran; what it held is gone. Run the same "
                "command to begin again"
            )

    def take(self) -> None:
        """Raises ConfigError that names the holder. The system drops a lock when its process ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self._run} is in use: {_holder(self._run / LOCK)}") from None
        except OSError:  # a file system without locks
            return
        since = datetime.now().astimezone().isoformat(timespec="minutes")
        self._write(
            json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since})
        )

    def release(self) -> None:
        """The file stays, empty: removing it would let two processes lock two files of one name."""
        with contextlib.suppress(OSError):
            self._write("")
        os.close(self._file)

    def _write(self, text: str) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)


@contextlib.contextmanager
def held(run: Path) -> Iterator[RunLock]:
    """A folder for this process alone. Raises ConfigError where another one trains into it."""
    lock = RunLock(run)
    try:
        lock.take()
    except BaseException:
        os.close(lock._file)
        raise
    try:
        yield lock
    finally:
        lock.release()


def _holder(file: Path) -> str:
    try:
        said = json.loads(file.read_text())
        who = (
            f"process {int(said['process'])} on {said['host']} trains into it since {said['since']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process trains into it"
    return f"{who}; wait for it, stop it, or give another output"
