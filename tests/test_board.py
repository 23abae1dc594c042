"""Trackers: read back by their own packages, and given up where they fail."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sam3jax.config import ConfigError
from sam3jax.training import trackers
from sam3jax.training.board import Board
from sam3jax.training.trackers import About, Trackers


def test_a_board_that_cannot_be_written_never_stops_a_run(tmp_path):
    said = []
    (tmp_path / "file").write_text("")
    board = Trackers(["tensorboard"], About(tmp_path / "file", "", 0, {}), said.append)
    board.scalar("loss", 1.0, 1)
    board.flush()
    board.close()
    assert len(said) == 1
    assert "tensorboard is given up" in said[0]


def test_the_board_is_read_back_by_tensorboard(tmp_path):
    board = Board(tmp_path, 0)
    for step in (1, 2, 3):
        board.scalar("train/loss", step / 2, step)
    board.image("panel", np.zeros((5, 7, 3), np.uint8), 2)
    board.close()
    later = Board(tmp_path, 2)  # step 3 runs again
    later.scalar("train/loss", 9.0, 3)
    later.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]  # fmt: skip
    assert found.Images("panel")[0].width == 7


def test_a_board_on_a_full_disk_is_given_up_and_the_run_goes_on(tmp_path):
    said, (soft, hard) = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    board = Trackers(["tensorboard"], About(tmp_path, "", 0, {}), said.append)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        for step in range(100):
            board.scalar("loss", 1.0, step)
            board.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    board.close()
    assert len(said) == 1


SETTINGS = {"steps": 5, "optim.learning_rate": 0.1, "data.train": "a/folder", "lora.targets": ["x"]}


def test_settings_and_what_the_run_came_to_lie_side_by_side(tmp_path):
    board = Board(tmp_path, 0, SETTINGS)
    board.finish({"segm/AP": 0.25})
    board.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert "settings/text_summary" in found.Tags()["tensors"]
    assert found.Scalars("final/segm/AP")[0].value == 0.25
    parameters = found.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert b"optim.learning_rate" in parameters.content
    assert parameters.plugin_name == "hparams"


class Brittle:
    """A tracker that breaks at its third call."""

    def __init__(self, about):
        self.calls = []

    def scalar(self, name, value, step):
        self.calls.append(step)
        if len(self.calls) > 2:
            raise OSError("the network is gone")


def test_one_tracker_that_breaks_leaves_the_others(tmp_path, monkeypatch):
    brittle = Brittle(None)
    monkeypatch.setitem(trackers.MAKERS, "wandb", lambda about: brittle)
    said = []
    both = Trackers(["wandb", "tensorboard"], About(tmp_path, "", 0, {}), said.append)
    for step in range(1, 6):
        both.scalar("loss", step, step)
    both.close()
    assert brittle.calls == [1, 2, 3]
    assert said == ["wandb is given up (the network is gone); metrics.jsonl goes on"]
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in found.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_a_tracker_whose_package_is_not_installed_is_said_before_anything_else(monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "no_such_package_here")
    with pytest.raises(ConfigError, match="pip install no_such_package_here"):
        trackers.check_trackers(["tensorboard", "wandb"])


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_run_is_logged_offline_and_goes_on(tmp_path, monkeypatch, name):
    pytest.importorskip(name, reason="the user's to install")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # no database in its small package
    monkeypatch.chdir(tmp_path)
    said = []
    for step in (0, 2):
        log = Trackers([name], About(tmp_path / "run", "abcdef12", step, SETTINGS), said.append)
        for k in (1, 2):
            log.scalar("train/loss", 1.0 / (step + k), step + k)
        log.image("panel", np.zeros((5, 7, 3), np.uint8), step + 2)
        log.finish({"video/J&F": 0.5})
        log.flush()
        log.close()
    assert said == []
    if name == "wandb":
        assert len(list(tmp_path.rglob("run-abcdef12.wandb"))) == 2
    else:
        import mlflow

        (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
        history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "train/loss")
        assert [m.step for m in history] == [1, 2, 3, 4]
        assert found.data.params["steps"] == "5"
