"""Simulated clicks: the deepest ones equal scipy's, the random ones are fair, boxes stay in bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sam3jax import clicks

keys = lambda n, seed=0: jax.random.split(jax.random.key(seed), n)


def blobs(rng, count: int, shape=(23, 31)) -> np.ndarray:
    field = ndimage.gaussian_filter(rng.normal(size=(count, *shape)), (0, 2, 2))
    return field > np.quantile(field, rng.uniform(0.2, 0.9))


def centre_click(target: np.ndarray, predicted: np.ndarray) -> tuple[list[int], int]:
    """The published rule, by scipy."""
    missed, made_up = (
        ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
        for region in (target & ~predicted, predicted & ~target)
    )
    label = int(missed.max() > made_up.max())
    y, x = np.unravel_index((missed if label else made_up).argmax(), target.shape)
    return [x, y], label


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_deepest_clicks_equal_scipy(seed):
    rng = np.random.default_rng(seed)
    target, predicted = blobs(rng, 7), blobs(rng, 7)
    predicted[0] = target[0]  # nothing is wrong
    target[1] = False
    predicted[2] = False
    target[3] = True  # the border alone is an edge
    predicted[3] = False
    target[4], predicted[4] = False, False
    target[4, 3:8, 3:8], predicted[4, 3:8, 13:18] = True, True  # equally deep: counts as made up
    found = jax.jit(clicks.deepest_click)(target, predicted)
    for row, (t, p) in enumerate(zip(target, predicted)):
        place, label = centre_click(t, p)
        assert found.place[row].tolist() == place
        assert int(found.label[row]) == label


def test_depth_is_the_exact_distance():
    rng = np.random.default_rng(0)
    for region in blobs(rng, 9):
        want = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
        np.testing.assert_allclose(np.sqrt(clicks.squared_depth(region)), want, rtol=1e-6)


def test_uniform_clicks_hit_every_wrong_pixel_equally_often():
    rng = np.random.default_rng(1)
    target, predicted = blobs(rng, 1, (9, 11)), blobs(rng, 1, (9, 11))
    error = (target != predicted)[0]
    n = 40 * error.sum()
    found = jax.jit(clicks.uniform_click)(
        keys(n), np.repeat(target, n, 0), np.repeat(predicted, n, 0)
    )
    x, y = np.asarray(found.place).T
    assert error[y, x].all()
    np.testing.assert_array_equal(found.label, target[0][y, x])
    counts = np.bincount(y * 11 + x, minlength=99).reshape(9, 11)[error]
    # Chi-squared with as many degrees of freedom as wrong pixels, five deviations wide.
    chi = ((counts - 40) ** 2 / 40).sum()
    freedom = error.sum() - 1
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_uniform_clicks_where_nothing_is_wrong():
    rng = np.random.default_rng(2)
    target = blobs(rng, 5)
    target[3] = True
    found = clicks.uniform_click(keys(5), target, target)
    assert not found.label.any()
    for row, (x, y) in enumerate(found.place.tolist()):
        assert (x, y) == (0, 0) if row == 3 else not target[row, y, x]


def test_a_first_point_lies_on_the_object():
    rng = np.random.default_rng(3)
    target = blobs(rng, 7)
    target[6] = False
    found = clicks.point_on(keys(7), target)
    on = [bool(target[row, y, x]) for row, (x, y) in enumerate(found.place.tolist())]
    assert on == [True] * 6 + [False]
    assert found.label.tolist() == [1] * 6 + [0]


def test_a_click_depends_on_its_own_row_and_key_alone():
    rng = np.random.default_rng(4)
    target, predicted, own = blobs(rng, 5), blobs(rng, 5), keys(5, 7)
    together = clicks.uniform_click(own, target, predicted)
    for row in range(5):
        one = slice(row, row + 1)
        alone = clicks.uniform_click(own[one], target[one], predicted[one])
        assert alone.place[0].tolist() == together.place[row].tolist()


def test_boxes_are_those_of_the_masks():
    target = np.zeros((3, 20, 30), bool)
    target[0, 4:9, 7:20] = True
    target[1, 19, 0] = True
    np.testing.assert_array_equal(
        clicks.box_of(target), [[[7, 4], [19, 8]], [[0, 19], [0, 19]], [[0, 0], [0, 0]]]
    )


@pytest.mark.parametrize(("noise", "most"), [(0.1, 20.0), (0.1, 3.0), (0.0, 20.0), (0.5, 1e3)])
def test_box_noise_is_bounded(noise, most):
    box = jnp.array([[[40.0, 10.0], [140.0, 60.0]]]).repeat(200, 0)
    moved = clicks.noisy_box(keys(200), box, noise=noise, most=most, size=168)
    assert moved.min() >= 0
    assert moved.max() <= 167
    step = np.abs(np.asarray(moved - box))
    reach = np.minimum(noise * np.array([100, 50]), most)
    assert (step <= reach + 1e-4).all()
    if noise and most < 100:
        assert (step.max((0, 1)) > 0.9 * reach).all()


def test_a_rough_mask_is_near_the_object_and_differs_from_it():
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:96, :96]
    centre, radius = rng.uniform(35, 60, (9, 2)), rng.uniform(15, 30, 9)
    target = (
        np.hypot(y - centre[:, 0, None, None], x - centre[:, 1, None, None]) < radius[:, None, None]
    )
    rough = np.asarray(clicks.damaged_mask(keys(9), target, 12)) > 0
    small = target[:, 1::2, 1::2]
    overlap = (rough & small).sum((1, 2)) / (rough | small).sum((1, 2))
    assert rough.shape == (9, 48, 48)
    assert (overlap > 0.4).all()
    assert overlap.mean() < 0.95
    assert not (np.asarray(clicks.damaged_mask(keys(1), target[:1] & False, 12)) > 0).any()
    dot = np.zeros((5, 96, 96), bool)
    dot[:, 50, 50] = True
    assert (np.asarray(clicks.damaged_mask(keys(5), dot, 12)) > 0).any((1, 2)).all()


def test_places_on_any_grid_are_pixel_centres():
    place = jnp.array([[0, 0], [5, 2]])
    np.testing.assert_allclose(clicks.pixels(place, (168, 168), 168), place)
    # A cell of 3.5 pixels: the first one's centre lies 1.25 pixels right of the first pixel's.
    np.testing.assert_allclose(clicks.pixels(place, (48, 48), 168), [[1.25, 1.25], [18.75, 8.25]])
