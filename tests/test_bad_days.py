"""Runs that are stopped, started twice, fed with NaN or lose their folder: nothing is lost, all is said."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sam3jax import train
from sam3jax.config import ConfigError
from sam3jax.data.folders import read_dataset
from sam3jax.data.sampling import fingerprint
from sam3jax.training import signals
from sam3jax.training.skipped import NotFiniteError, SkippedSteps
from sam3jax.weights.base import refuse_not_finite
from sam3jax.weights.checkpoints import Checkpoints
from sam3jax.weights.lock import LOCK, held
from sam3jax.weights.run_folder import read_run
from scripts.damage_test import damages, judged, opened
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


DAMAGED = ("byte in the middle flipped", "cut", "emptied", "deleted")
REPORTED = (".checksums.json", "evaluation.json")
READ = ("config.yaml", "about/metadata", "validation.json", "weights/manifest.ocdbt", "process_0/manifest.ocdbt", "weights/_METADATA")  # fmt: skip


@pytest.mark.parametrize(("name", "file"), [("report", f) for f in REPORTED] + [("read", f) for f in READ])  # fmt: skip
def test_a_damaged_file_is_refused_or_said_or_changes_nothing(name, file, undisturbed, tmp_path):
    """Some of what scripts/damage_test.py tries."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    ask = lambda: opened(name, run, tmp_path, [], tmp_path / "none.png")
    whole = ask()
    assert whole.status == 0
    kinds = [d for d in damages(undisturbed) if d.file.endswith(file)]
    if name == "report":  # it takes a second each
        kinds = [d for d in kinds if d.name.startswith(DAMAGED)]
    assert len(kinds) >= len(DAMAGED)
    for damage in kinds:
        shutil.rmtree(run)
        shutil.copytree(undisturbed, run)
        damage.act(run)
        found = ask()
        assert judged(found, whole, damage.file) in ("same", "refused", "said"), (damage.name, found)  # fmt: skip
