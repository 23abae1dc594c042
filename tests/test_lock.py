"""The lock of a run folder: who holds it is known, also where the file system has no locks."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from sam3jax.config import ConfigError
from sam3jax.weights import lock
from sam3jax.weights.lock import LOCK, held


def test_a_lock_left_by_a_dead_process_is_taken_over(tmp_path):
    script = "import sys, pathlib\nfrom sam3jax.weights.lock import RunLock\nRunLock(pathlib.Path(sys.argv[1])).take()"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert json.loads((tmp_path / LOCK).read_text())["process"] != os.getpid()
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert (tmp_path / LOCK).read_text() == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_file_alone_says_who_trains(number, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    def written(host, process, age=0.0):
        (tmp_path / LOCK).write_text(
            json.dumps({"host": host, "process": process, "since": "2026"})
        )
        os.utime(tmp_path / LOCK, (time.time() - age,) * 2)

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    here = socket.gethostname()
    for free in (
        lambda: None,
        lambda: written(here, int(dead.stdout)),
        lambda: written("other", 1, 4000),
    ):
        free()
        with held(tmp_path):
            assert "file system without locks" in capsys.readouterr().err
    for taken in (lambda: written(here, os.getppid()), lambda: written("other", 1, 1000)):
        taken()
        with pytest.raises(ConfigError, match="is in use: process"), held(tmp_path):
            pass
