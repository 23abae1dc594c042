"""The geometric transform moves pixels, masks and boxes to the same place."""

from __future__ import annotations

import numpy as np
import pytest

from sam3jax.config import DataConfig
from sam3jax.data.transforms import (
    Transform,
    box_of_mask,
    draw_transform,
    move_boxes,
    move_mask,
    move_picture,
    pack_mask,
    square,
    unpack_mask,
)

SETTINGS = [
    {},
    {"flip": True},
    {"turn": True},
    {"min_size": 64},
    {"crop": 0.5},
    {"flip": True, "turn": True, "min_size": 70, "crop": 0.4},
]


def blob(rng, width, height):
    """An ellipse somewhere, bool [Y, X], and its box x, y, w, h."""
    w, h = rng.uniform(12, width / 2), rng.uniform(12, height / 2)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    v, u = np.mgrid[0:height, 0:width] + 0.5
    mask = ((u - x - w / 2) / (w / 2)) ** 2 + ((v - y - h / 2) / (h / 2)) ** 2 <= 1
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return mask, (xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0])


@pytest.mark.parametrize("settings", SETTINGS)
def test_box_of_the_moved_mask_is_the_moved_box_within_a_pixel(settings):
    rng = np.random.default_rng(1)
    config = DataConfig(**settings)
    compared = 0
    for trial in range(60):
        width, height = rng.integers(80, 300, 2)
        mask, box = blob(rng, width, height)
        t = draw_transform(np.random.default_rng(trial), width, height, 160, config)
        moved = move_mask(t, mask)
        found, want = box_of_mask(moved), move_boxes(t, np.array(box))
        left, top, w, h = t.crop
        inside = box[0] >= left and box[1] >= top
        inside &= box[0] + box[2] <= left + w and box[1] + box[3] <= top + h
        if inside:  # a cut ellipse fills less than its cut box
            edges = [(b[:2] - b[2:] / 2, b[:2] + b[2:] / 2) for b in (found, want)]
            # One canvas pixel, or one source pixel where that is larger: the mask's own grain.
            grain = max(1, t.size[0] / w, t.size[1] / h) / 160
            assert np.abs(np.array(edges[0]) - edges[1]).max() <= grain
            compared += 1
        elif moved.any():
            outer = np.concatenate([want[:2] - want[2:] / 2, want[:2] + want[2:] / 2])
            inner = np.concatenate([found[:2] - found[2:] / 2, found[:2] + found[2:] / 2])
            grain = max(1, t.size[0] / w, t.size[1] / h) / 160
            assert (inner[:2] >= outer[:2] - grain).all()
            assert (inner[2:] <= outer[2:] + grain).all()
    assert compared >= 10


@pytest.mark.parametrize("settings", SETTINGS)
def test_masks_move_as_pixels_do(settings):
    """A mask painted into a picture and moved with it is the moved mask."""
    rng = np.random.default_rng(2)
    for trial in range(30):
        width, height = rng.integers(80, 300, 2)
        mask, _ = blob(rng, width, height)
        painted = np.repeat(mask[..., None], 3, -1).astype(np.uint8) * np.uint8(255)
        config = DataConfig(**settings)
        t = draw_transform(np.random.default_rng(trial), width, height, 160, config)
        as_pixels = move_picture(t, painted)[..., 0] >= 128
        assert (as_pixels != move_mask(t, mask)).sum() <= 2  # rounding at exactly one half


def test_the_square_is_the_published_resize():
    """torchvision's v2.Resize on bytes, which sam3's image processor uses."""
    torch = pytest.importorskip("torch")
    v2 = pytest.importorskip("torchvision.transforms.v2")
    rng = np.random.default_rng(3)
    for width, height in ((300, 200), (97, 161), (640, 480), (90, 70)):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        want = v2.Resize((168, 168))(torch.from_numpy(pixels).permute(2, 0, 1))
        found = move_picture(square(width, height, 168), pixels)
        difference = np.abs(found.astype(int) - want.permute(1, 2, 0).numpy())
        assert difference.max() <= 1, (width, height)


def test_masks_are_resized_as_the_torch_trainer_does():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchvision.transforms.functional")
    rng = np.random.default_rng(4)
    for width, height in ((300, 200), (97, 161), (640, 480)):
        mask, _ = blob(rng, width, height)
        bytes_ = torch.from_numpy(mask.astype(np.uint8))[None, None]
        want = functional.resize(bytes_, (168, 168)).squeeze().numpy().astype(bool)
        found = move_mask(square(width, height, 168), mask)
        # Its bytes are rounded to 0 or 1 between the two passes, ours to 1/255.
        assert (found != want).sum() <= 0.15 * np.sqrt(want.sum())


def test_random_edges_are_steps_of_32_anywhere_on_the_canvas():
    edges, places = set(), []
    for trial in range(300):
        rng = np.random.default_rng(trial)
        t = draw_transform(rng, 90, 70, 168, DataConfig(min_size=90))
        edges.add(t.size)
        assert min(t.place) >= 0
        assert max(t.place) + t.size[0] <= 168
        places.append(np.array(t.place) / max(1, 168 - t.size[0]))
    assert edges == {(96, 96), (128, 128), (160, 160)}
    assert np.abs(np.mean(places, 0) - 0.5).max() < 0.06
    published = {
        draw_transform(np.random.default_rng(k), 9, 9, 1008, DataConfig(min_size=480)).size[0]
        for k in range(500)
    }
    assert published == set(range(480, 993, 32))


def test_padding_is_black_and_holds_no_mask():
    t = Transform((0, 0, 50, 40), (64, 64), False, 0, (16, 8), (96, 96))
    picture = move_picture(t, np.full((40, 50, 3), 200, np.uint8))
    mask = move_mask(t, np.ones((40, 50), bool))
    inside = np.zeros((96, 96), bool)
    inside[8:72, 16:80] = True
    np.testing.assert_array_equal(mask, inside)
    np.testing.assert_array_equal(picture, np.repeat(inside[..., None], 3, -1) * 200)
    np.testing.assert_allclose(
        move_boxes(t, np.array([0, 0, 50, 40])), [48 / 96, 40 / 96, 64 / 96, 64 / 96]
    )


def test_nothing_random_means_the_square():
    for trial in range(5):
        t = draw_transform(np.random.default_rng(trial), 90, 70, 168, DataConfig())
        assert t == square(90, 70, 168)


def test_a_box_outside_the_crop_has_no_area():
    t = Transform((20, 20, 30, 30), (64, 64), True, 1, (0, 0), (64, 64))
    boxes = move_boxes(t, np.array([[0, 0, 10, 10], [0, 25, 15, 5], [25, 25, 5, 5]]))
    areas = boxes[:, 2] * boxes[:, 3]
    assert areas[0] == areas[1] == 0
    np.testing.assert_allclose(areas[2], 25 / 900, rtol=1e-5)


def test_odd_widths_survive_packing():
    mask = np.random.default_rng(0).random((3, 5, 13)) < 0.5
    packed = pack_mask(mask)
    assert packed.shape == (3, 5, 2)
    np.testing.assert_array_equal(unpack_mask(packed, 13), mask)
