"""The lock of a run folder: one training at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from sam3jax.config import ConfigError
from sam3jax.errors import remark
from sam3jax.files import FileError

LOCK = ".lock"
_SIGN_OF_LIFE = 3600  # seconds; a training saves, and so checks its lock, more often


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
        with contextlib.suppress(OSError):
            os.utime(self._file)  # the sign of life that other hosts see where there are no locks

    def take(self) -> None:
        """Raises ConfigError that names the holder. The system drops a lock when its process ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self._run} is in use: {_holder(self._run / LOCK)}") from None
        except OSError as error:  # a file system without locks
            self._take_weakly(error)
        since = datetime.now().astimezone().isoformat(timespec="minutes")
        self._write(
            json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since})
        )

    def _take_weakly(self, error: OSError) -> None:
        """By what the file says alone: two trainings that start in the same moment do not see each other."""
        if _may_be_alive(self._run / LOCK):
            raise ConfigError(f"{self._run} is in use: {_holder(self._run / LOCK)}") from None
        remark(
            f"{self._run} lies on a file system without locks ({error.strerror}): its training is known by the file "
            f"{LOCK} alone, so do not start a second one in the same moment"
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


def _may_be_alive(file: Path) -> bool:
    """Whether the process that a lock file names may still run."""
    try:
        said, age = json.loads(file.read_text()), time.time() - file.stat().st_mtime
        if said["host"] != socket.gethostname():
            return age < _SIGN_OF_LIFE
        os.kill(int(said["process"]), 0)
    except PermissionError:
        return True  # another user's
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return int(said["process"]) != os.getpid()


def _holder(file: Path) -> str:
    try:
        said = json.loads(file.read_text())
        who = (
            f"process {int(said['process'])} on {said['host']} trains into it since {said['since']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process trains into it"
    return f"{who}; wait for it, stop it, or give another output"
