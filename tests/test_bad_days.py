"""Runs that are stopped, started twice, fed with NaN or lose their folder: nothing is lost, all is said."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sam3jax import train
from sam3jax.config import ConfigError
from sam3jax.data.folders import read_dataset
from sam3jax.data.sampling import fingerprint
from sam3jax.training import signals
from sam3jax.training.board import Board
from sam3jax.training.skipped import NotFiniteError, SkippedSteps
from sam3jax.weights import lock
from sam3jax.weights.base import refuse_not_finite
from sam3jax.weights.checkpoints import Checkpoints
from sam3jax.weights.lock import LOCK, held
from sam3jax.weights.run_folder import read_run
from tests.coco_folders import write_small_shapes
from tests.trainings import Killed, before_step, kill, logged, words

STEPS = 4


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small_shapes(tmp_path_factory.mktemp("data"), train=10, valid=3)


def arguments(data, output, **changes):
    settings = {
        "output": output, "data.train": data, "steps": STEPS, "batch_size": 3, "eval_every": 0,
        "save_every": 100, "keep": 3, "optim.schedule": "constant", **changes,
    }  # fmt: skip
    return words(settings)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train.main(arguments(data, run)) == 0
    return run


def saved(run):
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def arrays(run, step):
    """Every array of a checkpoint, trained weights and optimizer alike."""
    manager = Checkpoints(run)._manager
    assert manager is not None
    found = manager.restore(step)
    manager.close()
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for item in ("weights", "state")
        for path, leaf in jax.tree.leaves_with_path({item: found[item]})
    }


def assert_equal_runs(run, other):
    assert logged(run) == logged(other)
    ours, theirs = arrays(run, STEPS), arrays(other, STEPS)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    metrics = lambda r: json.loads((r / "evaluation.json").read_text())["metrics"]
    assert metrics(run) == metrics(other)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_the_same_command_ends_as_if_nothing_was(
    number, status, data, undisturbed, tmp_path, monkeypatch, capsys
):
    def send():
        os.kill(os.getpid(), number)
        time.sleep(0.2)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        before_step(patch, 2, send)
        assert train.main(arguments(data, tmp_path / "run")) == status
    assert "stopped at step 2, the same command continues" in capsys.readouterr().err
    assert saved(tmp_path / "run") == [2]
    assert signal.getsignal(number) == handler
    assert train.main(arguments(data, tmp_path / "run")) == 0
    assert_equal_runs(tmp_path / "run", undisturbed)


def test_the_second_signal_ends_at_once():
    script = (
        "import os, signal, time\nfrom sam3jax.training.signals import Interruptions\n"
        "with Interruptions(1) as found:\n"
        " os.kill(os.getpid(), signal.SIGHUP); time.sleep(.3); assert found.after(1) == (signal.SIGHUP, False)\n"
        " print('once', flush=True)\n os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (143, "once\n")
    assert ended.stderr.startswith("SIGHUP: ")


def test_minutes_decide_as_well_as_steps(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    found = signals.Interruptions(save_minutes=2)
    assert found.after(1) == (0, False)
    clock[0] += 120
    assert found.after(2) == (0, True)
    found.saved()
    assert found.after(3) == (0, False)


def test_a_finished_run_started_again_stays_as_it_is(data, undisturbed, capsys):
    files = [f for f in undisturbed.rglob("*") if f.is_file() and f.name != LOCK]
    before = {f: f.read_bytes() for f in files}
    assert train.main(arguments(data, undisturbed)) == 0
    assert "is finished: 4 of 4 steps" in capsys.readouterr().out
    now = {f for f in undisturbed.rglob("*") if f.is_file() and f.name != LOCK}
    assert {f: f.read_bytes() for f in now} == before


def test_killed_behind_the_last_checkpoint_the_rest_is_made_up_for(data, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for name in ("summary.json", "report.html", "evaluation.json", "checkpoints/4/validation.json"):
        (run / name).unlink()
    assert train.main(arguments(data, run)) == 0
    assert_equal_runs(run, undisturbed)
    ours, theirs = (json.loads((r / "summary.json").read_text()) for r in (run, undisturbed))
    assert ours["final"] == theirs["final"]


def test_the_second_training_into_a_folder_is_told_who_holds_it(data, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    with held(run):
        assert train.main(arguments(data, run)) == 2
        line = capsys.readouterr().err
        assert f"is in use: process {os.getpid()} on " in line
        assert "since 20" in line
    assert [p.name for p in run.iterdir()] == [LOCK]


def test_a_lock_left_by_a_dead_process_is_taken_over(tmp_path):
    script = "import sys, pathlib\nfrom sam3jax.weights.lock import RunLock\nRunLock(pathlib.Path(sys.argv[1])).take()"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert json.loads((tmp_path / LOCK).read_text())["process"] != os.getpid()
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert (tmp_path / LOCK).read_text() == ""


@pytest.mark.parametrize("how", [shutil.rmtree, lambda run: run.rename(run.with_name("moved"))])
def test_a_folder_that_is_removed_while_it_is_trained_into_is_named(
    how, data, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    before_step(monkeypatch, 2, lambda: how(run))
    assert train.main(arguments(data, run)) == 2
    assert f"error: {run} was removed or replaced while" in capsys.readouterr().err
    assert not run.exists()


def test_too_many_skipped_steps_in_a_row_end_the_run():
    count = SkippedSteps(3, total=1)
    bad = {"loss": np.nan, "loss_bbox": 1.0, "loss_mask": np.nan, "grad_norm": np.nan}
    for step, total in ((1, 2), (2, 3), (3, 3), (4, 4), (5, 5)):
        count(step, {**bad, "skipped": total})
    with pytest.raises(NotFiniteError, match=r"step 6: 3 steps in a row .*loss is nan.*in loss_mask nan;"):  # fmt: skip
        count(6, {**bad, "skipped": 6})
    with pytest.raises(NotFiniteError, match=r"loss is finite .*backward"):
        SkippedSteps(1, 0)(1, {"loss": 2.0, "grad_norm": np.inf, "skipped": 1})


def test_a_run_that_learns_nothing_ends_with_the_step_and_its_terms(
    data, tmp_path, capsys, monkeypatch
):
    put = train.put_batch

    def poisoned(batch, *rest):
        boxes = np.full_like(batch.targets.boxes, np.nan)
        return put(batch.replace(targets=batch.targets.replace(boxes=boxes)), *rest)

    monkeypatch.setattr(train, "put_batch", poisoned)
    assert train.main(arguments(data, tmp_path / "run", max_skipped=2)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: step 2: 2 steps in a row were skipped, their loss is nan")
    assert "loss_bbox nan" in line
    assert "; the first NaN or infinity is in the batch: targets.boxes; lower" in line


def test_a_nan_in_the_base_is_named():
    tree = {"params": {"decoder": {"bias": np.float32([1, np.nan])}, "neck": np.zeros(3)}}
    with pytest.raises(ConfigError, match=r"models/x .*params\.decoder\.bias.*1 of 2"):
        refuse_not_finite(tree, "models/x")
    refuse_not_finite({"a": np.ones(3), "b": np.arange(3)}, "models/x")


def test_without_a_checkpoint_changed_settings_go_on(data, tmp_path, monkeypatch):
    run = tmp_path / "run"

    with monkeypatch.context() as patch:
        before_step(patch, 2, kill)
        with pytest.raises(Killed):
            train.main(arguments(data, run))
    assert not saved(run)
    assert train.main(arguments(data, run, **{"data.flip": True})) == 0
    assert saved(run) == [STEPS]


def test_what_changes_no_number_may_change(data, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    moved = tmp_path / "elsewhere"
    shutil.copytree(data, moved)
    changes = {"data.workers": 1, "data.train": moved, "save_minutes": 1, "max_skipped": 3}
    assert train.main(arguments(data, run, **changes)) == 0
    assert "is finished" in capsys.readouterr().out


def change_half(content):
    content["annotations"] = content["annotations"][::2]


def change_order(content):
    content["images"].reverse()


def change_names(content):
    for category in content["categories"]:
        category["name"] += " thing"


def change_a_mask(content):
    annotation = content["annotations"][0]
    left, top, width, height = annotation["bbox"]
    annotation["segmentation"] = [[left, top, left + width, top, left + width, top + height]]


def change_validation(content):
    content["annotations"].pop()


@pytest.mark.parametrize(
    ("change", "split"),
    [(change_half, "train"), (change_order, "train"), (change_names, "train"), (change_a_mask, "train"),
     (change_validation, "valid")],
)  # fmt: skip
def test_changed_data_are_refused_unless_forced(change, split, data, undisturbed, tmp_path, capsys):
    changed, run = tmp_path / "changed", tmp_path / "run"
    shutil.copytree(data, changed)
    shutil.copytree(undisturbed, run)
    file = changed / split / "_annotations.coco.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    again = {"data.train": changed, "steps": STEPS + 1}
    assert train.main(arguments(data, run, **again)) == 2
    line = capsys.readouterr().err
    assert "cannot resume: the data are not those of the checkpoint" in line
    assert "resume=force" in line
    if change is change_order:  # the same shapes: nothing is compiled anew
        assert train.main(arguments(data, run, **again, resume="force")) == 0
        assert saved(run)[-1] == STEPS + 1


def test_a_fingerprint_of_the_data_is_the_same_each_time(data):
    found = [fingerprint(read_dataset(data, "train")) for _ in range(2)]
    assert found[0] == found[1]


def test_a_board_that_cannot_be_written_never_stops_a_run(tmp_path):
    said = []
    (tmp_path / "file").write_text("")
    board = Board(tmp_path / "file" / "tensorboard", 0, said.append)
    board.scalar("loss", 1.0, 1)
    board.flush()
    board.close()
    assert len(said) == 1
    assert "TensorBoard is given up" in said[0]


def test_the_board_is_read_back_by_tensorboard(tmp_path):
    board = Board(tmp_path, 0, print)
    for step in (1, 2, 3):
        board.scalar("train/loss", step / 2, step)
    board.image("panel", np.zeros((5, 7, 3), np.uint8), 2)
    board.close()
    later = Board(tmp_path, 2, print)  # step 3 runs again
    later.scalar("train/loss", 9.0, 3)
    later.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]  # fmt: skip
    assert found.Images("panel")[0].width == 7


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


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on_after_making_room(
    data, undisturbed, tmp_path, monkeypatch, capsys
):
    """A limit on the size of files stands for the disk: writing past it fails as on a full one."""
    run, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with monkeypatch.context() as patch:
            before_step(patch, STEPS, lambda: limit(60_000))
            assert train.main(arguments(data, run, save_every=2)) == 2
    finally:
        limit(soft)
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("error: the disk is full")]
    assert "Traceback" not in said
    assert saved(run) == [2]
    assert read_run(run).step == 2
    assert train.main(arguments(data, run, save_every=2)) == 0
    assert_equal_runs(run, undisturbed)


def test_a_board_on_a_full_disk_is_given_up_and_the_run_goes_on(tmp_path):
    said, (soft, hard) = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    board = Board(tmp_path, 0, said.append)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        for step in range(100):
            board.scalar("loss", 1.0, step)
            board.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    board.close()
    assert len(said) == 1
