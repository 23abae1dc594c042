"""Prompts of people: what cannot be asked is named; answers do not depend on neighbours or padding."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_codec

from sam3jax import predict
from sam3jax.viewing.click_predictor import ClickPredictor
from sam3jax.viewing.click_prompts import prompted
from sam3jax.viewing.everything import GridOptions, crop_boxes, everything, is_cut, without_doubles
from sam3jax.viewing.predictor import PromptError

WIDTH, HEIGHT, SIZE, GRID = 120, 80, 168, 12


def ask(points=None, labels=None, boxes=None, mask=None):
    return prompted(points, labels, boxes, mask, width=WIDTH, height=HEIGHT, size=SIZE, grid=GRID)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "nothing is asked"),
        ({"points": []}, "no point"),
        ({"points": [[[5, 5]], []]}, "no point"),
        ({"points": [[5, 5, 5]]}, r"expected \[\[x, y\]"),
        ({"points": 5}, r"the shape \[\]: expected \[\[x, y\]"),
        ({"points": [[[[5, 5]]]]}, r"expected \[\[x, y\]"),
        ({"points": [["a", "b"]]}, "numbers in pixels; found"),
        ({"points": "5,5"}, "numbers in pixels; found '5,5'"),
        ({"points": {"x": 5}}, "numbers in pixels"),
        ({"points": np.array([[True, False]])}, "numbers in pixels"),
        ({"points": [[5 + 1j, 5]]}, "numbers in pixels"),
        ({"points": [[None, 5]]}, "numbers in pixels"),
        ({"points": [[5, 5], [6]]}, r"expected \[\[x, y\]"),
        ({"points": np.zeros((0, 2))}, "no point"),
        ({"points": [[5, 5]], "labels": ["inside"]}, r"labels are 1 inside .* found \['inside'\]"),
        ({"points": [[5, 5]], "labels": [[1]]}, "labels have the shape"),
        ({"points": [[5, 5]], "labels": [0.5]}, "label 0.5"),
        ({"points": [[5, 5], [6, 6]], "labels": 1}, "labels have the shape"),
        ({"points": [[120, 5]]}, "point 120, 5 lies outside the picture, which is 120 x 80"),
        ({"points": [[5, -1]]}, "lies outside"),
        ({"points": [[5, 5]], "labels": [7]}, "label 7: 1 is inside"),
        ({"points": [[5, 5]], "labels": [-1]}, "label -1"),
        ({"points": [[5, 5]], "labels": [float("nan")]}, "label nan"),
        ({"points": [[5, 5]], "labels": [1, 0]}, "1 points but 2 labels"),
        ({"points": [[[5, 5]], [[6, 6]]], "labels": [[1]]}, "2 objects .* labels of 1"),
        ({"labels": [1]}, "labels without points"),
        ({"points": [[float("nan"), 5]]}, "is no place"),
        ({"points": [[float("inf"), 5]]}, "is no place"),
        ({"points": [[0.4, 0.5], [0.2, 0.9]]}, "shares of the picture"),
        ({"boxes": [5, 5, 0, 5]}, "no area"),
        ({"boxes": [500, 5, 10, 5]}, "outside the picture"),
        ({"boxes": [5, 5, 10]}, "four numbers"),
        ({"boxes": "5,5,9,9"}, "four numbers"),
        ({"boxes": 5}, "four numbers"),
        ({"boxes": [[5, 5, 9, 9], [5, 5]]}, r"box \[5, 5\]: expected four numbers"),
        ({"boxes": [60, 60, -20, -20]}, "no area"),
        ({"boxes": [0.1, 0.2, 0.5, 0.5]}, "shares of the picture"),
        ({"boxes": []}, "nothing is asked"),
        ({"points": [[[5, 5]], [[6, 6]]], "boxes": [[5, 5, 9, 9]]}, "as many of each"),
        ({"points": [[5, 5]], "mask": np.zeros((1, 3, 48, 48))}, "3 masks of each object"),
        ({"mask": np.zeros((48, 48), np.uint8)}, "yes and no"),
        ({"mask": [[1.0, 2.0], [3.0]]}, "no numbers"),
        ({"mask": "mask.png"}, "no numbers"),
        ({"mask": np.zeros((80, 120))}, "expected the logits of an earlier answer, 48 x 48"),
        ({"mask": np.zeros((48, 48), bool)}, "yes and no"),
        ({"mask": np.full((48, 48), np.nan)}, "no number"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_named(asked, words):
    with pytest.raises(PromptError, match=words):
        ask(**asked)


def test_prompts_as_the_model_reads_them():
    found = ask([[[60, 40]], [[0, 0], [119, 79], [30, 20]]], [[1], [0, 1, 1]])
    np.testing.assert_array_equal(found.labels, [[1, -2, -2, -2, -1], [0, 1, 1, -2, -1]])
    np.testing.assert_allclose(found.points[0, 0], [84, 84])
    found = ask(boxes=[[30, 20, 60, 40]])
    np.testing.assert_array_equal(found.labels, [[2, 3, -2, -2, -1]])
    np.testing.assert_allclose(found.points[0, :2], [[42, 42], [126, 126]])
    found = ask(mask=np.ones((48, 48)))  # alone: no token, as published
    assert found.labels.tolist() == [[-2]]
    assert found.has_mask.all()


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"points": [5, 6]}, {"points": [[5, 6]]}),
        ({"points": (5, 6), "labels": 1}, {"points": [[5, 6]]}),
        ({"points": iter([[5, 6]])}, {"points": [[5, 6]]}),
        ({"points": np.array([[5, 6]], np.uint8)}, {"points": [[5, 6]]}),
        ({"points": [[5, 6], [7, 8]], "labels": np.array([True, False])},
         {"points": [[5, 6], [7, 8]], "labels": [1, 0]}),
        ({"points": [[[5, 6]], [[7, 8]]], "labels": [1, 0]},
         {"points": [[[5, 6]], [[7, 8]]], "labels": [[1], [0]]}),
        ({"boxes": np.array([5, 5, 9, 9])}, {"boxes": [[5, 5, 9, 9]]}),
        ({"mask": np.ones((1, 1, 48, 48), np.float16)}, {"mask": np.ones((48, 48))}),
    ],
)  # fmt: skip
def test_the_one_sensible_reading_is_taken(given, same):
    for found, expected in zip(ask(**given), ask(**same), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_tensors_of_torch_are_numbers_too():
    torch = pytest.importorskip("torch")
    found = ask(
        torch.tensor([[5.0, 6.0]]), torch.tensor([1]), mask=torch.ones(48, 48, requires_grad=True)
    )
    for x, y in zip(found, ask([[5, 6]], [1], mask=np.ones((48, 48))), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def predictor():
    return ClickPredictor.from_model_folder("shipped:tiny_shapes")


@pytest.fixture(scope="module")
def picture():
    """A red disc and a blue square, 120 x 80."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.full((HEIGHT, WIDTH, 3), 235, np.uint8)
    pixels[(x - 30) ** 2 + (y - 40) ** 2 < 20**2] = (220, 30, 30)
    pixels[(abs(x - 85) < 18) & (abs(y - 40) < 18)] = (30, 60, 210)
    return Image.fromarray(pixels)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_a_click_finds_the_object_under_it_and_an_answer_is_its_own(predictor, picture):
    with pytest.raises(PromptError, match="call set_image first"):
        ClickPredictor(predictor._model, predictor._variables).predict(points=[[1, 1]])
    predictor.set_image(picture)
    pixels = np.asarray(picture).astype(int)
    disc, square = pixels[..., 0] - pixels[..., 2] > 90, pixels[..., 2] - pixels[..., 0] > 90
    alone = predictor.predict(points=[[30, 40]])
    assert alone.masks.shape == (1, 3, HEIGHT, WIDTH)
    assert alone.logits.shape == (1, 3, 48, 48)
    assert iou(alone.masks[0, alone.ious[0].argmax()], disc) > 0.75
    three = predictor.predict(points=[[[85, 40]], [[30, 40]], [[85, 40], [30, 40], [5, 5]]], labels=[[1], [1], [1, 0, 0]])  # fmt: skip
    assert iou(three.masks[0, three.ious[0].argmax()], square) > 0.75
    np.testing.assert_allclose(three.logits[1], alone.logits[0], atol=1e-4)
    np.testing.assert_allclose(three.ious[1], alone.ious[0], atol=1e-5)
    again = predictor.predict(points=[[30, 40]], mask=alone.logits[0, 0], multimask=False)
    assert again.masks.shape == (1, 1, HEIGHT, WIDTH)


def test_everything_is_found_once_in_coco_form(predictor, picture):
    found = everything(predictor, picture, GridOptions(side=6, iou=0.6, stability=0.6))
    assert found
    for record in found:
        assert record["score"] >= 0.6
        assert record["segmentation"]["size"] == [HEIGHT, WIDTH]
        assert record["area"] > 0
    assert [r["score"] for r in found] == sorted((r["score"] for r in found), reverse=True)
    doubles = [dict(r, score=r["score"] / 2) for r in found]
    assert without_doubles([*found, *doubles], 0.7) == found


def test_of_doubles_in_two_crops_the_finer_one_is_kept(picture):
    """As SAM's generator: a crop sees more detail, whatever score the whole picture's mask has."""
    square = np.zeros((HEIGHT, WIDTH), np.uint8)
    square[30:50, 20:40] = 1

    class Answers(SimpleNamespace):
        picture = None

        def set_image(self, picture):
            self.picture = picture

        def predict(self, points):
            whole = self.picture.size == (WIDTH, HEIGHT)
            width, height = self.picture.size
            mask = square if whole else square[:height, :width]
            size = (len(points), 1)
            masks = np.broadcast_to(mask, (*size, *mask.shape)) > 0
            return SimpleNamespace(
                masks=masks, ious=np.full(size, 0.95 if whole else 0.9), stability=np.ones(size)
            )

    options = GridOptions(side=1, crops=1, edge=0)
    found = everything(Answers(), picture, options)
    assert {r["score"] for r in found} == {0.9}
    assert all(r["crop_box"][2:] != [WIDTH, HEIGHT] for r in found)
    assert [r["score"] for r in everything(Answers(), picture, GridOptions(side=1))] == [0.95]


@pytest.mark.parametrize(
    ("box", "cut"),
    [
        ((100, 100, 50, 50), False),
        ((100, 100, 190, 50), True),  # ends 10 pixels from the crop's right edge
        ((100, 100, 170, 50), False),  # 30 pixels
        ((5, 100, 50, 50), False),  # the left edge is the picture's
        ((15, 15, 280, 50), True),  # left and top are, right is not
    ],
)
def test_what_ends_near_a_crops_edge_is_cut(box, cut):
    """Twenty pixels, as in segment_anything.utils.amg.is_box_near_crop_edge."""
    assert is_cut(box, (0, 0, 300, 300), (600, 600), 20) == cut
    assert not is_cut(box, (0, 0, 300, 300), (300, 300), 20)


def test_crops_cover_the_picture():
    boxes = crop_boxes(120, 80, GridOptions(crops=2))
    assert len(boxes) == 1 + 4 + 16
    for layer in (boxes[1:5], boxes[5:]):
        seen = np.zeros((80, 120), bool)
        for left, top, right, bottom in layer:
            assert 0 <= left < right <= 120
            assert 0 <= top < bottom <= 80
            seen[top:bottom, left:right] = True
        assert seen.all()


def test_the_command_clicks(tmp_path, picture, capsys):
    picture.save(tmp_path / "p.png")
    base = [str(tmp_path / "p.png"), "--model", "shipped:tiny_shapes", "--output", str(tmp_path / "out")]  # fmt: skip
    assert predict.main([*base, "--points", "30,40,1", "5,5,0", "--points", "85,40"]) == 0
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(record["annotations"]) == 2
    assert (tmp_path / "out" / "0001_p.png").is_file()
    assert predict.main([*base, "--points", "300,40,1"]) == 2
    assert "point 300, 40 lies outside the picture" in capsys.readouterr().err
    assert predict.main([*base, "--points", "30,40,7"]) == 2
    assert "label 7" in capsys.readouterr().err
    assert predict.main([*base, "--points", "30,40", "--everything"]) == 2
    assert predict.main([*base, "--everything", "--grid", "1", "--least-iou", "1"]) == 0
    assert "a smaller --least-iou or --least-stability keeps more" in capsys.readouterr().err
    for wrong, words in (
        (["--points", "30,40", "--threshold", "0.5"], "go with --phrase"),
        (["--points", "30,40", "--grid", "4"], "go with --everything"),
        (["--points", "30,40", "--video"], "clicks are for pictures"),
    ):
        assert predict.main([*base, *wrong]) == 2
        assert words in capsys.readouterr().err
    for wrong in (["--grid", "0"], ["--grid", "100000"], ["--least-iou", "nan"], ["--least-iou", "2"]):  # fmt: skip
        with pytest.raises(SystemExit):
            predict.main([*base, "--everything", *wrong])


def test_a_click_outside_one_of_several_pictures_fails_that_picture_only(tmp_path, picture, capsys):
    picture.save(tmp_path / "a.png")
    picture.crop((0, 0, 20, 20)).save(tmp_path / "b.png")
    pages = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    pages[0].save(tmp_path / "c.tif", save_all=True, append_images=pages[1:])
    base = ["--model", "shipped:tiny_shapes", "--output", str(tmp_path / "out"), "--points", "30,40"]  # fmt: skip
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert predict.main([*files, *base, "--format", "yolo"]) == 1
    said = capsys.readouterr()
    assert "b.png: point 30, 40 lies outside the picture, which is 20 x 20" in said.err
    assert "1 of 2 pictures failed" in said.err
    assert "as yolo" in said.out
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())["annotations"]) == 1
    found = []
    for frame in ("0", "1"):
        assert predict.main([str(tmp_path / "c.tif"), *base, "--frame", frame]) == 0
        found += json.loads((tmp_path / "out/predictions.json").read_text())["annotations"]
    assert found[0]["area"] != found[1]["area"]


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 60), (17, 9)])
def test_everything_of_a_tiny_picture_decodes_to_its_size(predictor, size):
    found = everything(
        predictor, Image.new("RGB", size, "red"), GridOptions(side=2, crops=3, iou=0, stability=0)
    )
    for record in found:
        mask = rle_codec.decode(record["segmentation"])
        assert mask.shape == size[::-1]
        assert mask.sum() == record["area"] > 0
