"""Boxes: one odd box is repaired or left out, one wrong export is an error that names the cause."""

from __future__ import annotations

import numpy as np
import pytest

from sam3jax import doctor
from sam3jax.data.coco import DataError
from sam3jax.data.folders import read_dataset
from tests.coco_folders import annotation, write

W, H = 60, 40

CONVENTIONS = {
    "corners": (lambda x, y, w, h: [x, y, x + w, y + h], "corners"),
    "centres": (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], "centre x"),
    "rows first": (lambda x, y, w, h: [y, x, h, w], "top, left, height, width"),
    "corners, rows first": (lambda x, y, w, h: [y, x, y + h, x + w], "top, left, bottom, right"),
    "shares": (lambda x, y, w, h: [x / W, y / H, w / W, h / H], "0..1"),
    "yolo": (lambda x, y, w, h: [(x + w / 2) / W, (y + h / 2) / H, w / W, h / H], "0..1"),
    "shares of corners": (lambda x, y, w, h: [x / W, y / H, (x + w) / W, (y + h) / H], "0..1"),
    "percent": (lambda x, y, w, h: [100 * x / W, 100 * y / H, 100 * w / W, 100 * h / H], "percent"),
    "thousandths": (
        lambda x, y, w, h: [1000 * y / H, 1000 * x / W, 1000 * (y + h) / H, 1000 * (x + w) / W],
        "thousandths",
    ),
}


def boxes(count=30, seed=0):
    """Boxes all over the picture, none of them alike in the two axes."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        w, h = rng.uniform(12, 25), rng.uniform(6, 11)
        x, y = rng.uniform(1, W - w - 1), rng.uniform(1, H - h - 1)
        found.append(tuple(round(float(v), 2) for v in (x, y, w, h)))
    return found


def items_of(convert, masks=True, count=30):
    more = {} if masks else {"segmentation": []}
    return [
        annotation(k, k % 3, 1, box, **{**more, "bbox": list(convert(*box))})
        for k, box in enumerate(boxes(count))
    ]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_another_convention_is_an_error_where_masks_tell(tmp_path, capsys, name):
    convert, cause = CONVENTIONS[name]
    folder = write(tmp_path / "d", items_of(convert))
    with pytest.raises(
        DataError, match=rf"\d+ of 30 boxes.*{cause}.*expected left, top, width, height"
    ):
        read_dataset(folder)
    assert doctor.main([str(folder)]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["corners", "centres", "shares", "yolo", "shares of corners"])
def test_another_convention_is_an_error_where_no_mask_tells(tmp_path, name):
    convert, cause = CONVENTIONS[name]
    with pytest.raises(DataError, match=cause):
        read_dataset(write(tmp_path / "d", items_of(convert, masks=False)))


@pytest.mark.parametrize("masks", [True, False])
def test_coco_boxes_pass_and_keep_their_numbers(tmp_path, masks):
    as_is = lambda *box: box
    dataset = read_dataset(write(tmp_path / "d", items_of(as_is, masks)))
    assert not dataset.problems
    found = {a.id: a.bbox for image in dataset.images for a in image.annotations}
    for k, box in enumerate(boxes()):
        np.testing.assert_allclose(found[k], box, atol=1e-9)


def test_one_box_of_another_convention_is_kept_and_counted(tmp_path):
    items = items_of(lambda *box: box)
    x, y, w, h = boxes()[20]
    items[20]["bbox"] = [x, y, x + w, y + h]
    dataset = read_dataset(write(tmp_path / "d", items))
    assert dataset.problems["box does not fit its own mask (kept)"] == 1


def test_boxes_that_contradict_their_masks_are_an_error(tmp_path):
    """Masks of another picture size: no reading of four numbers makes them fit."""
    items = items_of(lambda x, y, w, h: [x / 3, y / 3, w / 3, h / 3])
    with pytest.raises(DataError, match="30 of 30 boxes do not fit their own masks"):
        read_dataset(write(tmp_path / "d", items))


def test_a_mask_that_fills_the_picture_makes_no_box_a_share(tmp_path):
    whole = [[0, 0, W, 0, W, H, 0, H]]
    items = [annotation(k, k, 1, (10, 10, 30, 30), segmentation=whole) for k in range(3)]
    with pytest.raises(DataError, match="belongs to another picture size or another object"):
        read_dataset(write(tmp_path / "d", items))


def test_loose_boxes_and_boxes_over_the_edge_are_no_wrong_export(tmp_path):
    loose = items_of(lambda x, y, w, h: [x - 2, y - 1, w + 4, h + 2])
    read_dataset(write(tmp_path / "a", loose))
    # Amodal boxes: two in five reach far over one edge or another.
    amodal = items_of(lambda *box: box, masks=False)
    for k, item in enumerate(amodal[:12]):
        item["bbox"] = [[-9, 5, 30, 9], [45, 5, 30, 9], [20, -6, 9, 20], [20, 30, 9, 25]][k % 4]
    dataset = read_dataset(write(tmp_path / "b", amodal))
    assert dataset.problems["box reached over the picture's edge (cut)"] == 12


def test_polygons_as_shares_are_an_error_whatever_the_boxes_are(tmp_path):
    items = items_of(lambda *box: box)
    for item in items:
        flat = item["segmentation"][0]
        item["segmentation"] = [[v / (H if k % 2 else W) for k, v in enumerate(flat)]]
    with pytest.raises(DataError, match=r"30 of 30 masks lie within 0\.\.1"):
        read_dataset(write(tmp_path / "a", items))
    for item in items:
        del item["bbox"]
    with pytest.raises(DataError, match=r"masks lie within 0\.\.1"):
        read_dataset(write(tmp_path / "b", items))


@pytest.mark.parametrize(
    "box",
    [
        "1234", [1, 2, 3], [1, 2, 3, 4, 5], {"x": 1}, [10**400, 2, 3, 4], [1, 2, float("inf"), 4],
        [1, 2, -3, 4], [True, 2, 3, 4], [[1, 2], [3, 4]], None, [None] * 4,
    ],
)  # fmt: skip
def test_what_is_no_box_is_taken_from_the_mask_or_left_out(tmp_path, box):
    items = [
        annotation(0, 0, 1, (10, 8, 20, 16), bbox=box),
        annotation(1, 1, 1, (10, 8, 20, 16), bbox=box, segmentation=[]),
        *(annotation(k, 2, 2, (2 * k, 3, 20, 11)) for k in range(2, 6)),
    ]
    dataset = read_dataset(write(tmp_path / "d", items))
    assert dataset.images[0].annotations[0].bbox == (10, 8, 20, 16)
    assert dataset.images[1].annotations == ()
    assert dataset.problems["box missing or without area: taken from the mask"] == 1
    assert dataset.problems["annotation left out: no box with an area"] == 1


def test_numbers_as_text_are_numbers(tmp_path):
    items = [annotation(0, 0, 1, (10, 8, 20, 16), bbox=["10", "8.0", "20", "16"], area="320")]
    (found,) = read_dataset(write(tmp_path / "d", items)).images[0].annotations
    assert (found.bbox, found.area) == ((10, 8, 20, 16), 320)


def test_boxes_thinner_than_a_pixel_are_said(tmp_path):
    items = [
        annotation(0, 0, 1, (10, 8, 0.4, 16), segmentation=[]),
        annotation(1, 1, 1, (9, 9, 9, 9)),
    ]
    dataset = read_dataset(write(tmp_path / "d", items))
    assert dict(dataset.problems) == {"box thinner than a pixel (kept)": 1}
    assert (
        str(dataset.problems.entries("box thinner than a pixel (kept)")[0])
        == "0.png, id 0, found [10, 8, 0.4, 16]"
    )


@pytest.mark.parametrize("area", [10**400, float("inf"), "big", -3, 0, [5]])
def test_an_area_that_is_none_is_computed(tmp_path, area):
    items = [annotation(0, 0, 1, (10, 8, 20, 16), area=area)]
    (found,) = read_dataset(write(tmp_path / "d", items)).images[0].annotations
    assert 250 < found.area < 320


@pytest.mark.parametrize("width", [-3, 0])
def test_boxes_without_a_size_are_one_error(tmp_path, width):
    items = [annotation(k, k, 1, (10, 8, 20, 16), bbox=[10, 8, width, 5], segmentation=[]) for k in range(3)]  # fmt: skip
    with pytest.raises(
        DataError, match=r"3 of 3 annotations cannot be used.*width and a height above 0"
    ):
        read_dataset(write(tmp_path / "d", items))


def test_boxes_of_another_picture_size_are_one_error(tmp_path):
    items = [annotation(k, k, 1, (600 + k, 400, 200, 160), segmentation=[]) for k in range(3)]
    with pytest.raises(DataError, match=r"3 of 3 annotations cannot be used.*another size"):
        read_dataset(write(tmp_path / "d", items))
