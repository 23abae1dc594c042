"""Postprocessing against the torch package, torchvision and pycocotools."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3jax.inference import candidates as on_device
from sam3jax.inference import full_size as on_host
from sam3jax.types import Detections as Queries
from sam3jax.types import Outputs

LAYERS, PAIRS, QUERIES, WIDTH, CELLS = 2, 5, 11, 6, 12


def random_outputs(seed: int) -> Outputs:
    rng = np.random.default_rng(seed)
    smooth = rng.normal(size=(PAIRS, 4, 4, WIDTH))
    pixels = jax.image.resize(smooth, (PAIRS, CELLS, CELLS, WIDTH), "linear")
    centre, size = rng.uniform(0.2, 0.8, (2, LAYERS, PAIRS, QUERIES, 2))
    queries = Queries(
        logits=jnp.asarray(rng.normal(size=(LAYERS, PAIRS, QUERIES)), jnp.float32),
        boxes=jnp.asarray(np.concatenate([centre, size], -1), jnp.float32),
        mask_embed=jnp.asarray(rng.normal(size=(PAIRS, QUERIES, WIDTH)), jnp.float32),
    )
    return Outputs(
        o2o=queries,
        o2m=None,
        presence_logits=jnp.asarray(rng.normal(size=(LAYERS, PAIRS)), jnp.float32),
        pixel_embed=jnp.asarray(pixels, jnp.float32),
        semantic_logits=jnp.zeros((PAIRS, CELLS, CELLS)),
    )


SIZES = [(37, 53), (5, 7), (64, 12), (12, 12), (301, 499)]


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_torch_package_on_the_same_outputs(seed):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("sam3.eval.postprocessors")
    outputs = random_outputs(seed)
    masks = jnp.einsum("bqd,byxd->bqyx", outputs.o2o.mask_embed, outputs.pixel_embed)
    as_torch = lambda array: torch.from_numpy(np.array(array))
    sizes = torch.tensor(SIZES)
    expected = reference.PostProcessImage(
        max_dets_per_img=-1, iou_type="segm", always_interpolate_masks_on_gpu=False,
    )(
        {
            "pred_logits": as_torch(outputs.o2o.logits[-1])[..., None],
            "pred_boxes": as_torch(outputs.o2o.boxes[-1]),
            "pred_masks": as_torch(masks),
            "presence_logit_dec": as_torch(outputs.presence_logits[-1])[:, None],
        },
        sizes,
        sizes,
    )  # fmt: skip
    candidates = on_device.top_candidates(outputs, limit=QUERIES)
    for pair, (height, width) in enumerate(SIZES):
        found = on_host.full_size(candidates, pair, height, width)
        order = np.argsort(-expected[pair]["scores"].numpy(), kind="stable")
        np.testing.assert_allclose(found.scores, expected[pair]["scores"][order], atol=1e-5)
        np.testing.assert_allclose(
            found.boxes_xyxy / max(height, width),
            expected[pair]["boxes"][order] / max(height, width),
            atol=1e-5,
        )
        wrong = found.decode_masks() != expected[pair]["masks"][order, 0].numpy()
        assert wrong.mean() <= 1e-3


def test_masks_of_a_large_picture_equal_torch_strip_by_strip():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 9, 13)).astype(np.float32)
    height, width = 1531, 1203  # no multiple of a strip
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None], (height, width), mode="bilinear", align_corners=False
    )[0].numpy()
    for threshold in (0.5, 0.8):
        found = on_host.enlarge_masks(logits, height, width, threshold=threshold)
        cutoff = np.log(threshold / (1 - threshold))
        for rle, truth in zip(found, expected > cutoff, strict=True):
            assert rle["size"] == [height, width]
            assert (coco_mask.decode(rle).astype(bool) != truth).mean() <= 1e-5


@pytest.mark.parametrize("corner", [(0, 0), (3, 5), (8, 11)])
def test_a_small_mask_in_a_large_picture_is_whole(corner):
    """Only the strips in which a mask can be are looked at."""
    torch = pytest.importorskip("torch")
    logits = np.full((1, 10, 14), -1.0, np.float32)
    logits[0, corner[0] : corner[0] + 2, corner[1] : corner[1] + 2] = 9
    height, width = 2203, 5601  # a cell is wider than a strip
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None], (height, width), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    (found,) = on_host.enlarge_masks(logits, height, width)
    assert (coco_mask.decode(found).astype(bool) != (expected > 0)).sum() <= 9


def test_run_lengths_are_what_pycocotools_would_write():
    logits = np.full((4, 6, 6), -4.0, np.float32)
    logits[0] = 4  # all of the picture
    logits[1, :, 0] = 4  # touches the first pixel
    logits[2, :, -1] = 4  # touches the last pixel; logits[3] is empty
    for rle in on_host.enlarge_masks(logits, 24, 36):
        mask = coco_mask.decode(rle)
        assert rle["counts"] == coco_mask.encode(np.asfortranarray(mask))["counts"]
    areas = [int(coco_mask.area(rle)) for rle in on_host.enlarge_masks(logits, 24, 36)]
    assert areas[0] == 24 * 36
    assert areas[1] == areas[2] > 0
    assert areas[3] == 0


def test_only_the_strongest_are_kept_in_order_of_score():
    outputs = random_outputs(7)
    candidates = on_device.top_candidates(outputs, limit=3)
    everything = np.asarray(on_device.scores(outputs))
    np.testing.assert_array_equal(candidates.scores, -np.sort(-everything, axis=1)[:, :3])
    assert candidates.mask_logits.shape == (PAIRS, 3, CELLS, CELLS)
    floor = float(candidates.scores[0, 1])
    found = on_host.full_size(candidates, 0, 20, 30, floor=floor)
    assert len(found) == 1
    assert found.scores[0] > floor


def test_mask_nms_equals_torchvision_where_masks_are_boxes():
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops")
    rng = np.random.default_rng(3)
    pairs, count, size = 9, 17, 20
    corner = rng.integers(0, 12, (pairs, count, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 9, corner.shape)], -1)
    boxes[:, 5] = boxes[:, 2]  # a duplicate
    masks = np.zeros((pairs, count, size, size), bool)
    for b in range(pairs):
        for k, (left, top, right, bottom) in enumerate(boxes[b]):
            masks[b, k, top:bottom, left:right] = True
    keep = np.asarray(jax.jit(on_device.mask_nms, static_argnums=1)(masks, 0.3))
    strength = torch.linspace(1, 0.1, count)
    for b in range(pairs):
        expected = ops.nms(torch.from_numpy(boxes[b]).float(), strength, 0.3)
        np.testing.assert_array_equal(np.flatnonzero(keep[b]), np.sort(expected.numpy()))
        assert not keep[b, 5]


def test_results_are_plain_coco_json():
    import json

    outputs = random_outputs(1)
    candidates = on_device.top_candidates(outputs, limit=QUERIES)
    found = on_host.full_size(candidates, 2, 40, 60, limit=4)
    results = json.loads(json.dumps(found.to_coco(image_id=8, category_id=0)))
    assert [r["score"] for r in results] == pytest.approx(found.scores.tolist())
    x, y, width, height = results[0]["bbox"]
    np.testing.assert_allclose([x, y, x + width, y + height], found.boxes_xyxy[0], rtol=1e-5)
    assert coco_mask.decode(results[0]["segmentation"]).shape == (40, 60)
    assert len(found.above(0.999999)) == 0
    assert found.above(0.999999).decode_masks().shape == (0, 40, 60)
