"""scripts/pretrain_shapes.py: pictures, patches and boxes turn together; what it writes can be trained."""

import sys

import numpy as np
import pytest

from sam3jax.config import parse_config
from sam3jax.data.transforms import box_of_mask
from sam3jax.weights.base import open_base
from sam3jax.weights.model_folder import open_model_folder
from scripts import pretrain_shapes

pytestmark = pytest.mark.slow


def test_patches_and_boxes_turn_and_mirror_with_their_pictures():
    rng = np.random.default_rng(0)
    pictures = np.zeros((6, 12, 12, 3), np.uint8)  # a pixel is a patch here
    covered, boxes = np.zeros((6, 3, 12, 12), np.uint8), np.zeros((6, 12, 12, 4), np.float32)
    for n in range(6):
        (y, x), (h, w) = rng.integers(0, 7, 2), rng.integers(1, 6, 2)
        mask = np.zeros((12, 12), bool)
        mask[y : y + h, x : x + w] = True
        pictures[n, mask] = 255
        covered[n, n % 3, mask] = 255
        boxes[n, mask] = box_of_mask(mask)
    stream = pretrain_shapes.batches(pictures, covered, boxes, 5, seed=3)
    orientations = set()
    for _ in range(40):
        images, cells, places, asked = next(stream)
        for image, cell, place, (there, absent) in zip(images, cells, places, asked):
            mask = image[..., 0] > 0
            np.testing.assert_array_equal(cell[there] > 0, mask)
            assert not cell[absent].any()
            np.testing.assert_allclose(place[mask], np.tile(box_of_mask(mask), (mask.sum(), 1)), atol=1e-6)  # fmt: skip
            assert not place[~mask][:, 2:].any()
            orientations.add(mask.tobytes())
    assert len(orientations) > 6 * 4


def test_a_short_pretraining_writes_a_folder_that_training_starts_from(tmp_path, monkeypatch):
    monkeypatch.setenv("SAM3JAX_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "pretrained"
    arguments = ["--out", str(out), "--pictures", "8", "--steps", "2", "--batch-size", "8"]
    monkeypatch.setattr(sys, "argv", ["pretrain_shapes", *arguments])
    pretrain_shapes.main()
    source = open_model_folder(out).source
    assert (source["steps"], source["pictures"], source["concepts"]) == (2, 8, "seen")
    base = open_base(parse_config({"init": str(out), "data": {"train": "shapes"}}))
    assert np.abs(base.load().params["vit"]["pos_embed"]).max() > 0.5
    assert not np.allclose(
        base.load().params["fusion_encoder"]["layers"]["linear1"]["bias"], 0
    )  # trained in the last step
