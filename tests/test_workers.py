"""Loader processes that are killed, halted or orphaned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing, os, signal, sys, time
from sam3jax.data import workers
from sam3jax.data.streams import run_ahead
from sam3jax.errors import exit_status
from tests.test_workers import Slow
workers.STOPPED_SECONDS = 3.0
def main():
    stream = run_ahead(Slow(), 0, 1000, 2)
    for number in range(200):
        assert next(stream)["x"] == number
        if number == 2:
            child = min(multiprocessing.active_children(), key=lambda p: p.pid)
            print(child.pid, flush=True)
            os.kill(child.pid, getattr(signal, sys.argv[1]))
if __name__ == "__main__":
    sys.exit(exit_status(main))
"""


class Slow:
    """A loader of small batches. Its repr is short: grain names transforms by it."""

    def __repr__(self) -> str:
        return "Slow"

    def __call__(self, number: int):
        return {"x": number}


@pytest.mark.parametrize(
    ("sign", "words"), [("SIGKILL", "was ended by SIGKILL"), ("SIGSTOP", "has been halted")]
)
def test_a_lost_loader_process_is_named_within_a_minute(sign, words, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, str(script), sign], capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    said = ended.stderr.strip().splitlines()[-1]
    assert said.startswith(f"error: loader process {ended.stdout.strip()} {words}")
    assert "fewer data.workers" in said
