"""TensorBoard's files: read back by TensorBoard, and given up where they cannot be written."""

from __future__ import annotations

import resource

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sam3jax.training.board import Board


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
