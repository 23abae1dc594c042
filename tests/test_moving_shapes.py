"""Generated videos: the same bytes from the same seed, objects that move, hide, enter and leave."""

from __future__ import annotations

import numpy as np
import pytest

from sam3jax.data.coco import decode_mask
from sam3jax.data.moving_shapes import draw_video, write_moving_shapes
from sam3jax.data.pictures import DataError
from sam3jax.data.shapes import GROUPS
from sam3jax.data.video_folders import read_videos

GROUP = GROUPS["basic"]


def test_a_video_follows_from_its_seed_and_number():
    frames, _, visible = draw_video((3,), 5, GROUP, 4, 96)
    again, _, parts = draw_video((3,), 5, GROUP, 4, 96)
    np.testing.assert_array_equal(frames, again)
    np.testing.assert_array_equal(visible, parts)
    other, _, _ = draw_video((3,), 6, GROUP, 4, 96)
    assert other.shape != frames.shape or (other != frames).any()


def test_objects_move_hide_enter_and_leave_and_no_pixel_belongs_to_two():
    seen = []
    for number in range(8):
        frames, things, visible = draw_video((1,), number, GROUP, 8, 96)
        assert frames.shape[:1] + frames.shape[1:3] == (8, *visible.shape[2:])
        assert visible.shape[:2] == (8, len(things))
        assert visible.sum(1).max() <= 1
        assert (frames[1:] != frames[:-1]).any()
        seen += list(visible.any((2, 3)).T)  # one row an object, [F]
    assert any(row[0] and not row[-1] for row in seen)
    assert any(row[-1] and not row[0] for row in seen)
    assert any(row.all() for row in seen)


def test_what_is_written_reads_back_as_it_was_drawn(tmp_path):
    folder = tmp_path / "videos"
    write_moving_shapes(folder, seed=2, videos=2, frames=3, size=96)
    data = read_videos(folder)
    assert len(data.videos) == 2
    for number, video in enumerate(data.videos):
        frames, _, visible = draw_video((2,), number, GROUP, 3, 96)
        for k in range(3):
            np.testing.assert_array_equal(np.asarray(video.frames[k]), frames[k])
            masks = [decode_mask(a, video.height, video.width) for a in video.labels[k].annotations]
            # An object answers one phrase or several, and is annotated once for each.
            want = {mask.tobytes() for mask in visible[k] if mask.any()}
            assert {mask.tobytes() for mask in masks} == want


def test_a_place_that_cannot_be_written_to_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"cannot write generated data to .*SAM3JAX_CACHE"):
        write_moving_shapes(tmp_path / "file" / "videos", seed=0, videos=1, frames=2)
