"""Metrics of clicks on cases whose answer can be told by hand."""

import numpy as np
import pytest

from sam3jax.evaluation.click_metrics import (
    ClickScores,
    boundary_f,
    calibration,
    clicks_needed,
)


def test_clicks_needed_count_the_budget_where_never_reached():
    ious = np.array([[0.9, 0.1, 0.9], [0.2, 0.84, 0.85], [0.0, 0.1, 0.849]])
    assert clicks_needed(ious, 0.85).tolist() == [1, 3, 3]


def test_metrics_of_two_batches():
    scores = ClickScores()
    scores.add(np.array([[0.2, 0.9], [0.6, 0.95]]), np.array([[0.4, 0.9], [0.6, 0.9]]), [0.5, 1.0])
    scores.add(np.array([[0.1], [0.86]]), np.array([[0.1], [0.86]]), [0.0])
    found = scores.metrics()
    assert found["clicks/objects"] == 3
    assert found["clicks/mIoU@1"] == pytest.approx(0.4)
    assert found["clicks/mIoU@2"] == pytest.approx((0.6 + 0.95 + 0.86) / 3)
    assert "clicks/mIoU@3" not in found
    assert found["clicks/NoC@85"] == pytest.approx((2 + 1 + 2) / 3)
    assert found["clicks/NoC@90"] == pytest.approx((2 + 1 + 2) / 3)
    assert found["clicks/reached@85"] == pytest.approx(2 / 3)
    assert found["clicks/reached@90"] == pytest.approx(1 / 3)
    assert found["clicks/boundary_F"] == pytest.approx(0.5)
    assert found["clicks/predicted_IoU_error"] == pytest.approx((0.2 + 0.05) / 6)
    assert scores.curve() == pytest.approx([0.4, (0.6 + 0.95 + 0.86) / 3])
    assert ClickScores().metrics() == {}


def test_calibration_groups_by_what_was_predicted():
    predicted, true = np.array([0.05, 0.08, 0.5, 1.0]), np.array([0.1, 0.0, 0.7, 0.9])
    assert calibration(predicted, true) == [
        (pytest.approx(0.065), pytest.approx(0.05), 2),
        (0.5, 0.7, 1),
        (1.0, 0.9, 1),
    ]


def test_boundary_f_forgives_a_pixel_and_no_more():
    target = np.zeros((60, 60), bool)  # the diagonal forgives one pixel
    target[20:40, 20:40] = True
    assert boundary_f(target, target) == 1
    assert boundary_f(np.roll(target, 1, 1), target) == 1
    assert boundary_f(np.roll(target, 5, 1), target) < 0.7
    nothing = np.zeros_like(target)
    assert boundary_f(nothing, target) == 0
    assert boundary_f(nothing, nothing) == 1
    half = target.copy()
    half[30:] = False
    assert 0.6 < boundary_f(half, target) < 0.9
