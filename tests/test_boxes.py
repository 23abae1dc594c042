"""Box formulas against torchvision, and their behaviour where torch has none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3jax.boxes import area, cxcywh_to_xyxy, giou, iou, xyxy_to_cxcywh


def random_boxes(rng, *shape):
    low = rng.uniform(0, 0.6, (*shape, 2))
    return np.concatenate([low, low + rng.uniform(0.01, 0.4, (*shape, 2))], -1).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_overlaps_equal_torchvision(seed):
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision").ops
    rng = np.random.default_rng(seed)
    a, b = random_boxes(rng, 17), random_boxes(rng, 23)
    table = jnp.asarray(a)[:, None], jnp.asarray(b)[None]
    both = torch.from_numpy(a), torch.from_numpy(b)
    np.testing.assert_allclose(iou(*table), ops.box_iou(*both).numpy(), atol=1e-6)
    np.testing.assert_allclose(giou(*table), ops.generalized_box_iou(*both).numpy(), atol=1e-6)
    np.testing.assert_allclose(area(jnp.asarray(a)), ops.box_area(both[0]).numpy(), atol=1e-6)
    centre = ops.box_convert(both[0], "xyxy", "cxcywh").numpy()
    np.testing.assert_allclose(xyxy_to_cxcywh(jnp.asarray(a)), centre, atol=1e-6)
    np.testing.assert_allclose(cxcywh_to_xyxy(jnp.asarray(centre)), a, atol=1e-6)


def test_boxes_without_area_have_finite_overlaps_and_gradients():
    points = jnp.array(
        [[0.2, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.9], [0.5, 0.6, 0.5, 0.6], [0.1, 0.1, 0.4, 0.4]]
    )
    for overlap in (iou, giou):
        value, grad = jax.vmap(jax.value_and_grad(overlap), (0, None))(points, points[0])
        assert np.isfinite(value).all()
        assert np.isfinite(grad).all()


def test_overlaps_without_area_have_the_documented_values():
    here, there = jnp.array([0.2, 0.2, 0.2, 0.2]), jnp.array([0.5, 0.6, 0.5, 0.6])
    assert iou(here, here) == 0
    assert giou(here, here) == 0
    assert giou(here, there) == -1


def test_overlaps_are_symmetric_and_one_for_a_box_with_itself():
    a, b = (jnp.asarray(random_boxes(np.random.default_rng(3), 50)) for _ in range(2))
    np.testing.assert_allclose(giou(a, a), 1, atol=1e-6)
    np.testing.assert_array_equal(giou(a, b), giou(b, a))
    assert (giou(a, b) <= iou(a, b)).all()
