"""Large pictures in tiles: they cover the picture, nothing is moved, nothing is found twice."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3jax.inference.full_size import Detections
from sam3jax.inference.tiles import OVERLAP, Tile, merged, put_back, tiles_of


def rle(mask):
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def find(mask, score, tile=None):
    """One detection of a mask, as if the whole picture had been looked at."""
    height, width = mask.shape
    y, x = np.nonzero(mask)
    box = np.float32([[x.min(), y.min(), x.max() + 1, y.max() + 1]])
    whole = tile or Tile(0, 0, width, height)
    return Detections(np.float32([score]), box, [rle(mask)], height, width), whole


def rectangle(left, top, right, bottom, size=(60, 90)):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(("width", "height"), [(1, 1), (42, 42), (43, 41), (97, 301), (1000, 77)])
def test_tiles_cover_the_picture_and_share_their_edges(width, height):
    tiles = tiles_of(width, height, 42)
    seen = np.zeros((height, width), int)
    for left, top, right, bottom in (t.box for t in tiles):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        seen[top:bottom, left:right] += 1
    assert seen.min() == 1
    for length, starts in ((width, {t.left for t in tiles}), (height, {t.top for t in tiles})):
        steps = np.diff(sorted(starts))
        assert (steps <= 42 * (1 - OVERLAP) + 1).all()
        assert len(steps) == 0 if length <= 42 else len(steps) > 0


@pytest.mark.parametrize("tile", [Tile(0, 0, 90, 60), Tile(11, 7, 31, 23), Tile(59, 0, 31, 60), Tile(0, 37, 31, 23)])  # fmt: skip
@pytest.mark.parametrize("kind", ["noise", "full", "empty"])
def test_masks_and_boxes_are_put_where_the_tile_lies(tile, kind):
    rng = np.random.default_rng(0)
    part = {"noise": rng.random((tile.height, tile.width)) < 0.4, "full": 1, "empty": 0}[kind]
    part = np.broadcast_to(part, (tile.height, tile.width)).astype(bool)
    found = Detections(np.float32([0.5]), np.float32([[1, 2, 3, 4]]), [rle(part)], *part.shape)
    moved = put_back(found, tile, 90, 60)
    expected = np.zeros((60, 90), bool)
    expected[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] = part
    np.testing.assert_array_equal(moved.decode_masks()[0], expected)
    assert moved.masks[0]["counts"] == rle(expected)["counts"]
    left, top = tile.left, tile.top
    np.testing.assert_array_equal(moved.boxes_xyxy, [[1 + left, 2 + top, 3 + left, 4 + top]])


def test_the_stronger_of_two_overlapping_masks_stays_whatever_their_boxes():
    a, b = rectangle(10, 10, 40, 40), rectangle(12, 10, 42, 40)
    corner = np.zeros_like(a)
    corner[10:40, 10:40] = np.tri(30, dtype=bool)  # half of a's box, the same box
    far = rectangle(60, 40, 80, 50)
    found = merged([find(a, 0.6), find(b, 0.8), find(corner, 0.5), find(far, 0.3)], 90, 60)
    np.testing.assert_allclose(found.scores, [0.8, 0.5, 0.3])
    np.testing.assert_array_equal(found.decode_masks()[0], b)
    assert merged([], 90, 60).boxes_xyxy.shape == (0, 4)


def test_a_part_that_a_tile_cut_off_goes_and_a_small_whole_thing_inside_stays():
    whole, inside = rectangle(10, 10, 70, 40), rectangle(20, 15, 26, 21)
    cut = find(rectangle(10, 10, 30, 40), 0.9, Tile(0, 0, 30, 60))
    found = merged([cut, find(inside, 0.4), find(whole, 0.5)], 90, 60)
    np.testing.assert_allclose(found.scores, [0.5, 0.4])
    alone = merged([cut], 90, 60)  # nothing else knows the rest of it
    np.testing.assert_allclose(alone.scores, [0.9])
