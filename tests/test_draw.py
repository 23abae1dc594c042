"""Drawing: what is drawn lies where it should and can be read on any background."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from sam3jax.data.coco import Annotation, ImageRecord
from sam3jax.viewing import draw
from sam3jax.viewing.charts import curves
from sam3jax.viewing.draw import Instance
from sam3jax.viewing.shown import Shown


def disk(height: int = 480, width: int = 640, at=(300, 200), radius: int = 60) -> Instance:
    rows, columns = np.mgrid[:height, :width]
    x, y = at
    mask = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
    return Instance("disk", (x - radius, y - radius, x + radius, y + radius), mask, 0.9)


@pytest.mark.parametrize("background", [0, 128, 255])
def test_fill_and_outline_differ_from_any_background(background):
    picture = np.full((480, 640, 3), background, np.uint8)
    drawn = np.asarray(draw.overlay(picture, [disk()])).astype(int)
    inside, far = drawn[200, 300], drawn[460, 20]
    # The fill is a hint, so that a red circle stays red under a blue one; the outline is what shows.
    assert 10 < np.abs(inside - background).max() < 60
    np.testing.assert_array_equal(far, background)
    # Across the outline there is a dark and a bright line: one of them shows on any background.
    lightness = drawn[200, 355:368].mean(axis=1)
    assert lightness.min() < 60 or background == 0
    assert np.abs(lightness - background).max() > 60


def test_neighbouring_instances_have_colours_far_apart():
    colours = np.array([draw.colour(k) for k in range(12)])
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(12, dtype=int)
    assert apart.min() >= 90
    assert len({draw.colour(k) for k in range(300)}) > 250


@pytest.mark.parametrize("size", [(40, 30), (640, 480), (4000, 1000)])
def test_masks_lie_on_their_pixels_at_every_scale(size):
    width, height = size
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 4 : width // 2] = True
    box = (width // 4, height // 4, width // 2, height // 2)
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    picture = np.zeros((height, width, 3), np.uint8)
    drawn = draw.overlay(picture, [Instance("", box, rle)])
    assert 480 <= max(drawn.size) <= 2048
    small = np.asarray(drawn.resize(size, Image.Resampling.BOX)).max(axis=-1) > 25
    assert (small != mask).mean() < 0.03
    same = draw.overlay(picture, [Instance("", box, mask)])
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(same))


def test_the_picture_itself_is_left_alone():
    picture = Image.new("RGB", (600, 500), (10, 200, 30))
    before = picture.tobytes()
    draw.overlay(picture, [disk(500, 600)])
    assert picture.tobytes() == before


def plates(monkeypatch, instances, size=(640, 480)) -> list[tuple[float, ...]]:
    """The rectangles that labels are written on."""
    found = []
    real = ImageDraw.ImageDraw.rectangle

    def rectangle(self, box, fill=None, **more):
        if fill is not None:
            found.append(box)
        return real(self, box, fill=fill, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", rectangle)
    draw.overlay(Image.new("RGB", size), instances)
    return found


def test_labels_stay_inside_and_never_cover_each_other(monkeypatch):
    rng = np.random.default_rng(0)
    corners = rng.uniform((0, 0), (600, 440), (25, 2))
    corners[:4] = (0, 0), (635, 0), (0, 475), (635, 475)
    instances = [Instance("red circle", (x, y, x + 40, y + 40), None, 0.5) for x, y in corners]
    found = plates(monkeypatch, instances)
    assert len(found) >= 20
    for k, (left, top, right, bottom) in enumerate(found):
        assert left >= 0
        assert top >= 0
        assert right <= 640
        assert bottom <= 480
        for other in found[:k]:
            assert right <= other[0] or left >= other[2] or bottom <= other[1] or top >= other[3]


def test_a_crowd_keeps_most_of_the_picture_free_of_labels(monkeypatch):
    rng = np.random.default_rng(0)
    corners = rng.uniform((0, 0), (600, 440), (300, 2))
    instances = [Instance("red circle", (x, y, x + 20, y + 20), None, 0.5) for x, y in corners]
    hidden = sum((r - x) * (b - y) for x, y, r, b in plates(monkeypatch, instances))
    assert 0 < hidden < 0.17 * 640 * 480


def test_long_and_foreign_labels_fit():
    face = draw.font(14)
    for text in ("word " * 90, "красный круг", "κύκλος", "a\nb\tc", ""):
        assert face.getlength(draw._shorten(text, 200, face)) <= 200
    drawn = draw.overlay(Image.new("RGB", (64, 64)), [Instance("word " * 90, (1, 1, 60, 60))])
    assert drawn.size == (480, 480)


def test_odd_instances_do_not_stop_the_drawing():
    picture = np.zeros((50, 70, 3), np.uint8)
    odd = [
        Instance("empty", (5, 5, 5, 5), np.zeros((50, 70), bool)),
        Instance("outside", (-50, -50, -10, -10)),
        Instance("over the edge", (60, 40, 900, 900)),
        Instance("one pixel", (3, 3, 4, 4), np.arange(3500).reshape(50, 70) == 213),
    ]
    assert draw.overlay(picture, odd).size == (480, 343)
    assert draw.overlay(np.zeros((1, 900, 3), np.uint8), ()).size == (900, 1)


def test_a_panel_shows_picture_truth_and_prediction_without_crowds():
    box = (10.0, 10.0, 20.0, 20.0)
    corners = (np.array([10, 10, 30, 10, 30, 30, 10, 30], float),)
    annotations = tuple(
        Annotation(id=k, category_id=1, bbox=box, segmentation=corners, iscrowd=k == 1, area=400)
        for k in range(2)
    )
    record = ImageRecord(id=5, file="x.png", width=100, height=80, annotations=annotations)
    truth = draw.true_instances(record, {1: "thing"})
    assert [(i.text, i.box) for i in truth] == [("thing", (10, 10, 30, 30))]
    results = [
        {"category_id": 1, "bbox": [1, 2, 3, 4], "score": score, "image_id": 5}
        for score in (0.2, 0.6, 0.9)
    ]
    found = draw.found_instances(results, {1: "thing"}, Shown(0.5))
    assert [i.text for i in found] == ["thing 0.90", "thing 0.60"]
    # On the same thing: once. And from another score on, where the phrase has its own.
    found = draw.found_instances(results, {1: "thing"}, Shown(0.5, nms=0.5))
    assert [i.text for i in found] == ["thing 0.90"]
    found = draw.found_instances(results, {1: "thing"}, Shown(0.5, {"thing": 0.1, "other": 1.0}))
    assert len(found) == 3
    sheet = draw.panel(np.zeros((80, 100, 3), np.uint8), truth, found, title="x.png", height=200)
    assert sheet.height == 200 + 48
    assert sheet.width == 3 * 250 + 12


def test_predictions_have_the_colour_of_the_truth_they_lie_on():
    truth = [Instance("a", (0, 0, 10, 10)), Instance("b", (50, 0, 60, 10))]
    found = [
        Instance("b", (51, 1, 61, 11), score=0.9),
        Instance("x", (90, 90, 99, 99), score=0.8),
        Instance("a", (1, 0, 11, 10), score=0.7),
        Instance("a", (0, 0, 10, 10), score=0.6),  # taken already
    ]
    assert [i.number for i in draw.colour_like(truth, found)] == [1, 2, 0, 3]
    assert [i.number for i in draw.colour_like(truth, truth)] == [0, 1]


def test_curves_are_valid_svg_in_the_pages_ink():
    points = [(k, 1.0 / (k + 1)) for k in range(50)]
    svg = curves({"loss <a>": points, "b": points[:1]}, title="loss & more", logarithmic=True)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    assert "loss & more" in "".join(root.itertext())
    assert "#000000" not in svg
    assert curves({"empty": []}, title="none")
