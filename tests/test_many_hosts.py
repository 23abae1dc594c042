"""Training and evaluation in two processes of four devices, as on two hosts, against one process of eight."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.batches import DECODER, SMALL_MODEL
from tests.coco_folders import write_small_shapes
from tests.xla import flags

pytestmark = pytest.mark.slow

SETTINGS = {
    "batch_size": 8, "save_every": 2, "log_every": 1, "eval_every": 3, "lora.targets": list(DECODER),
    "optim.learning_rate": 1e-2, "optim.schedule": "constant", "optim.warmup_steps": 1,
    "evaluation.panels": 1, "evaluation.batch_size": 2, "lora.rank": 128,
    **{f"model.{k}": v for k, v in {**SMALL_MODEL, "decoder_layers": 1}.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small_shapes(tmp_path_factory.mktemp("data"), train=24, valid=5)


def run_processes(
    count: int, devices: int, cache: Path, arguments: list[str], stop: str = "", of: str = "train"
) -> list[str]:
    """What each of `count` processes of a command said; fails where one failed.

    stop: behind this line of the first process the last one alone is sent SIGTERM; then all are to end by it.
    """
    environment = {
        **os.environ, "XLA_FLAGS": flags(devices), "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    command = [sys.executable, "-m", f"sam3jax.{of}", *arguments]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = []
    for k in range(count):
        own = f"--coordinator {address} --num-processes {count} --process-id {k}".split()
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        joined = [*command, *own] if count > 1 else command
        running.append(subprocess.Popen(joined, env=environment, **pipes))
    for line in running[0].stdout if stop else ():
        if line.startswith(stop):
            running[-1].terminate()
            break
    said = [process.stdout.read() for process in running]
    ended = [process.wait(timeout=400) for process in running]
    assert ended == [143 if stop else 0] * count, "\n".join(said)
    return said


def lines(run: Path) -> list[dict]:
    """What metrics.jsonl says, without what a clock says."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = {"images_per_second", "seconds_left", "peak_memory_gb"}
    return [{k: v for k, v in line.items() if k not in clock} for line in found]


def test_two_processes_train_resume_and_evaluate_as_one_with_as_many_devices(data, tmp_path):
    def train(
        name: str, count: int, devices: int, *, stop: str = "", shard: bool = False
    ) -> list[str]:
        settings = {
            "output": tmp_path / name, "data.train": data, "steps": 6, "shard": shard, **SETTINGS,
        }  # fmt: skip
        arguments = [f"{k}={v}" for k, v in settings.items()]
        return run_processes(count, devices, tmp_path / "cache", arguments, stop)

    train("one", count=1, devices=8)
    # First each host holds all weights; then base and adapters are split over both. It is the same run.
    first = train("two", count=2, devices=4, stop="step 1/6")
    then = train("two", count=2, devices=4, shard=True)
    assert "SIGTERM: " not in first[0]
    assert "SIGTERM: " in first[1]
    # They compare notes every fifth step.
    assert all("stopped at step 5, the same command continues" in said for said in first)
    assert "continues at step 5" in then[0]
    assert "at step" not in then[1]  # the first process speaks for all
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in one] == [1, 2, 3, 3, 4, 5, 6, 6]
    for a, b in zip(one, two, strict=True):
        assert a.pop("split") == b.pop("split")
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    assert (tmp_path / "two" / "report.html").is_file()

    for count, devices in ((1, 8), (2, 4)):
        words = ["--run", str(tmp_path / "two"), "--output", str(tmp_path / f"by_{count}")]
        said = run_processes(count, devices, tmp_path / "cache", words, of="evaluate")
        assert ["segm/AP" in text for text in said] == [True, False][:count]
    one, two = (
        json.loads((tmp_path / f"by_{n}" / "evaluation.json").read_text())["metrics"]
        for n in (1, 2)
    )
    assert one == pytest.approx(two, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("part", [["--coordinator", "localhost:1"], ["--num-processes", "2"]])
def test_processes_that_cannot_meet_are_one_sentence(part):
    command = [sys.executable, "-m", "sam3jax.train", *part, "data.train=shapes"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: cannot join other processes")
    assert "--num-processes" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
