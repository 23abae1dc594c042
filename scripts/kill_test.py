"""Kill a training again and again, then compare it with one left alone: `python -m scripts.kill_test FOLDER`.

Kills (SIGKILL) fall at start-up, in a save, in validation and at the end, in turn. After each the run
must open: a checkpoint that is there is read whole. At the end every file must be equal to that of the other
run, but for clocks, the place and the identity of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sam3jax.config import load_config
from sam3jax.errors import UserError
from sam3jax.weights.run_folder import read_run

STEPS = 12
SETTINGS = (
    "model.preset=tiny model.image_size=42 model.pretrain_image_size=42 model.window_size=3 model.patch_size=14 "
    "model.vit_dim=32 model.vit_stages=1 model.vit_stage_blocks=2 model.vit_heads=2 model.text_dim=32 "
    "model.text_layers=1 model.text_heads=2 model.dim=32 model.ffn=32 model.heads=4 model.fusion_layers=1 "
    "model.decoder_layers=1 model.geometry_layers=1 model.queries=7 train=all data.train=shapes "
    "data.shapes_size=64 data.shapes_train=12 data.shapes_valid=4 batch_size=2 eval_every=3 save_every=2 "
    f"log_every=1 keep=3 evaluation.panels=1 optim.ema=0.9 steps={STEPS}"
)


def main() -> int:
    """Returns 1 where a kill lost something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="new folder for the two runs")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    alone, killed = options.folder / "alone", options.folder / "killed"
    if start(alone).wait():
        return 1
    lost = 0
    for number in range(options.kills):
        name = list(MOMENTS)[number % len(MOMENTS)]
        process = start(killed)
        reached = wait_for(process, lambda: MOMENTS[name](killed, number))  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        problem = opens(killed)
        lost += bool(problem)
        steps = saved(killed)
        print(
            f"kill {number + 1}: {name}{'' if reached else ' (run was over)'}, steps {steps}, {problem or 'opens'}",
            flush=True,
        )
        if max(steps, default=0) == STEPS and name == "at the end":
            compare(alone, finished(killed))
            killed = killed.with_name(f"killed_{number}")
    differences = compare(alone, finished(killed))
    print(
        f"{options.kills - lost} of {options.kills} kills lost nothing; {differences} differences"
    )
    return int(bool(lost or differences))


def start(run: Path) -> subprocess.Popen:
    """The training command, quiet."""
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_suffix(".log").open("a")
    command = [sys.executable, "-m", "sam3jax.train", *SETTINGS.split(), f"output={run}"]
    # A tiny model: compiling is the time, so the optimizer's level is 0.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "XLA_FLAGS": flags})


def saved(run: Path) -> list[int]:
    """Steps of the checkpoints."""
    return sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit())


def _starting(run: Path, number: int) -> bool:
    time.sleep(2 + number % 7)
    return True


def _saving(run: Path, number: int) -> bool:
    """A temporary folder of orbax, of a step behind those that were there."""
    return any((run / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def _validating(run: Path, number: int) -> bool:
    steps = [s for s in saved(run) if s % 3 == 0]
    return any(not (run / "checkpoints" / str(s) / "validation.json").is_file() for s in steps)


def _ending(run: Path, number: int) -> bool:
    return (run / "checkpoints" / str(STEPS)).is_dir()


MOMENTS: dict[str, Callable[[Path, int], bool]] = {
    "at start-up": _starting, "in a save": _saving, "in validation": _validating, "at the end": _ending,
}  # fmt: skip


def wait_for(process: subprocess.Popen, moment: Callable[[], bool]) -> bool:
    """Whether the moment came before the process ended."""
    while process.poll() is None:
        if moment():
            return True
        time.sleep(0.002)
    return False


def opens(run: Path) -> str:
    """What is wrong with a run folder, "" for nothing."""
    if not saved(run):
        return ""
    try:
        read_run(run)
    except UserError as error:
        return f"does not open: {error}"
    return ""


def finished(run: Path) -> Path:
    """The same command, left alone now."""
    if status := start(run).wait():
        print(f"the last start ended with {status}: see {run.with_suffix('.log')}")
    return run


def compare(one: Path, other: Path) -> int:
    """How many files, arrays, points and lines differ, each named."""
    ours, theirs = ({**arrays(r), **files(r), **lines(r), **points(r)} for r in (one, other))
    differences = 0
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if a is None or b is None or not _equal(a, b):
            differences += 1
            print(f"different: {key}")
    print(f"{other.name}: {len(ours)} files, arrays and numbers compared, {differences} differences", flush=True)  # fmt: skip
    return differences


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray | np.generic):
        return bool(np.array_equal(a, b, equal_nan=True))
    return a == b


def files(run: Path) -> dict[str, Any]:
    """{file: content} of all but arrays and event files, without place, identity, checksums and clocks."""
    identity = load_config(run / "config.yaml").id or ""
    found: dict[str, Any] = {}
    for file in sorted(f for f in run.rglob("*") if f.is_file()):
        name = str(file.relative_to(run))
        if "/weights/" in name or "/state/" in name or name.startswith("tensorboard"):
            continue
        text = (
            file.read_bytes().replace(str(run).encode(), b"RUN").replace(identity.encode(), b"ID")
        )
        if name == "summary.json":
            found[name] = {k: v for k, v in json.loads(text).items() if k not in CLOCKS}
        elif file.name in ("validation.json", "metadata"):
            found[name] = {k: v for k, v in json.loads(text).items() if k != "crc32"}
        elif name == "config.yaml":
            found[name] = text.partition(b"\n")[2]  # a checksum comes first
        elif name == ".checksums.json":
            found[name] = sorted(json.loads(text))
        elif file.name in TIMED:
            found[name] = "there"
        else:
            found[name] = text
    return found


CLOCKS = ("step_seconds_median", "peak_memory_gb")  # of summary.json
TOLD_BY_CLOCKS = ("images_per_second", "seconds_left", "peak_memory_gb")  # of a step
# Files with clocks in them: lines and points are compared one by one.
TIMED = ("metrics.jsonl", "report.html", "_CHECKPOINT_METADATA", "commit_success.txt")


def points(run: Path) -> dict[str, Any]:
    """Every point of TensorBoard's curves, but those of clocks."""
    board = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    return {
        f"tensorboard {name} {event.step}": np.float64(event.value)
        for name in board.Tags()["scalars"]
        if not name.endswith(TOLD_BY_CLOCKS)
        for event in board.Scalars(name)
    }


def lines(run: Path) -> dict[str, Any]:
    """{step, split, name: value} of metrics.jsonl, without what a clock says."""
    found = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        place = f"{line.pop('step')} {line.pop('split')}"
        for name, value in line.items():
            if not name.endswith(TOLD_BY_CLOCKS):
                assert f"{place} {name}" not in found, "a line twice"
                found[f"{place} {name}"] = np.float64(np.nan if value is None else value)
    return found


def arrays(run: Path) -> dict[str, Any]:
    """Every array of the last checkpoint."""
    folder = (run / "checkpoints" / str(STEPS)).absolute()
    trees = {item: ocp.StandardCheckpointer().restore(folder / item) for item in ("weights", "state")}  # fmt: skip
    return {
        jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in jax.tree.leaves_with_path(trees)
    }


if __name__ == "__main__":
    sys.exit(main())
