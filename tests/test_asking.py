"""One predictor for phrases and clicks, and pictures in whatever form they are handed to it."""

import jax
import numpy as np
import pytest
from PIL import Image

from sam3jax import ClickPredictor, Predictor
from sam3jax.config import ConfigError
from sam3jax.data.pictures import DataError, open_rgb
from sam3jax.files import FileError
from sam3jax.viewing import click_heads
from sam3jax.viewing import predictor as predictor_module
from sam3jax.viewing.asking import PromptError, as_rgb
from sam3jax.weights.model_folder import save_model_folder
from tests.small_run import small_run

SHIPPED = "shipped:tiny_shapes"


def pixels():
    """A red disc and a blue square, 120 x 80."""
    y, x = np.mgrid[:80, :120]
    found = np.full((80, 120, 3), 235, np.uint8)
    found[(x - 30) ** 2 + (y - 40) ** 2 < 20**2] = (220, 30, 30)
    found[(abs(x - 85) < 18) & (abs(y - 40) < 18)] = (30, 60, 210)
    return found


@pytest.fixture(scope="module")
def predictor():
    return Predictor.from_model_folder(SHIPPED)


@pytest.mark.parametrize(
    "asked",
    [
        {"points": [[30, 40]]},
        {"points": [[30, 40], [85, 40]], "labels": [1, 0], "multimask": False},
        {"boxes": [10, 20, 40, 40], "multimask": False},
        {"points": [[[30, 40]], [[85, 40]]], "boxes": [[10, 20, 40, 40], [67, 22, 36, 36]]},
        {"mask": np.eye(48, dtype=np.float32) * 9},
    ],
    ids=lambda asked: "+".join(asked),
)
def test_a_predictor_answers_clicks_as_the_click_predictor_does(predictor, asked):
    clicks = ClickPredictor.from_model_folder(SHIPPED)
    for one in (predictor, clicks):
        one.set_image(pixels())
    for ours, theirs in zip(predictor.predict(**asked), clicks.predict(**asked), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_trunk_runs_once_for_phrases_and_clicks(predictor, monkeypatch):
    calls = []
    real = predictor._detector.encode_trunk
    monkeypatch.setattr(predictor._detector, "encode_trunk", lambda *a: calls.append(1) or real(*a))
    predictor.set_image(pixels())
    assert len(predictor.predict("red circle")) == 1
    first = predictor.predict(points=[85, 40])
    predictor.set_image(pixels()[:, ::-1])
    second = predictor.predict(points=[34, 40])
    assert len(calls) == 2
    for found, x in ((first, 85), (second, 34)):
        mask = found.masks[0, found.ious[0].argmax()]
        assert mask[40, x]
        assert 0.5 < mask.sum() / 36**2 < 1.5
    assert predictor.clicks.draw(second.masks[0, :1], [[34, 40]]).size[0] >= 120


def test_phrases_and_clicks_are_not_mixed(predictor):
    predictor.set_image(pixels())
    for asked in ({"phrase": "red circle"}, {"threshold": 0.3}, {"negative_boxes": [[1, 1, 5, 5]]}):
        with pytest.raises(PromptError, match="ask one after the other"):
            predictor.predict(points=[[30, 40]], **asked)
    with pytest.raises(PromptError, match="points on an object"):
        predictor.predict()
    with pytest.raises(PromptError, match="points have a name"):
        predictor.predict([[30, 40]])
    with pytest.raises(PromptError, match="True or False"):
        predictor.predict(points=[[30, 40]], multimask="no")
    for wrong in (7, float("nan"), "high"):
        with pytest.raises(PromptError, match="score from 0 to 1"):
            predictor.predict("red circle", threshold=wrong)


def test_models_without_heads_say_what_to_do(tmp_path, monkeypatch):
    run = small_run(tmp_path)
    alone = Predictor(run.model, run.variables, run.tokenizer)
    save_model_folder(tmp_path / "m", run.config.model, run.variables["params"], run.tokenizer)
    folder = Predictor.from_model_folder(tmp_path / "m")
    monkeypatch.setattr(predictor_module, "read_run", lambda _: run)
    for found, error, words in (
        (alone, PromptError, "has no interactive heads"),
        (folder, FileError, "Convert the whole sam3.pt"),
        (Predictor.from_run(tmp_path), ConfigError, "task=clicks"),
    ):
        found.set_image(pixels())
        with pytest.raises(error, match=words):
            found.predict(points=[[30, 40]])


def test_a_detectors_run_clicks_with_the_heads_below_it(tmp_path, predictor):
    run = small_run(tmp_path, init=SHIPPED)
    heads = click_heads.heads_below(run.config)
    assert heads.keys() == click_heads.HEADS
    whole = predictor.clicks._variables["params"]
    for ours, theirs in zip(
        jax.tree.leaves(heads), jax.tree.leaves({root: whole[root] for root in heads}), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


FORMS = {
    "grey": lambda: Image.fromarray(pixels()).convert("L"),
    "palette": lambda: Image.fromarray(pixels()).convert("P"),
    "clear": lambda: Image.fromarray(np.dstack([pixels(), np.full((80, 120), 90, np.uint8)])),
    "grey and clear": lambda: Image.fromarray(pixels()).convert("LA"),
    "bit": lambda: Image.fromarray(pixels()).convert("1"),
    "sixteen": lambda: Image.fromarray(pixels()[..., 1].astype(np.uint16) * 16),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_in_memory_is_read_as_its_file(form, tmp_path):
    picture = FORMS[form]()
    picture.save(tmp_path / "a.png")
    want = np.asarray(open_rgb(tmp_path / "a.png"))
    np.testing.assert_array_equal(np.asarray(as_rgb(picture)), want)
    if form not in ("palette", "bit", "grey and clear"):
        np.testing.assert_array_equal(np.asarray(as_rgb(np.array(picture))), want)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (pixels().transpose(2, 0, 1), r"channels come last, picture.transpose\(1, 2, 0\)"),
        (pixels()[None], r"array \[1, 80, 120, 3\], expected"),
        (pixels()[..., :2], "expected"),
        (pixels()[:0], "without a pixel"),
        (Image.new("RGB", (0, 0)), "without a pixel"),
        (pixels() / 255, "array of float64, expected uint8"),
        (pixels().astype(np.int64), "array of int64"),
        (pixels() > 9, "array of bool"),
        (None, "of type NoneType"),
        (b"abc", "of type bytes"),
        ([[1, 2], [3, 4]], "of type list"),
        ("https://example.com/a.png", "web address"),
        (".", "is a folder"),
        ("no.png", "does not exist"),
    ],
)
def test_what_is_no_picture_is_named(picture, words):
    with pytest.raises(DataError, match=words):
        as_rgb(picture)


def test_a_picture_that_cannot_be_read_leaves_the_one_before(predictor, tmp_path):
    predictor.set_image(pixels())
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    closed = Image.fromarray(pixels())
    closed.close()
    for wrong in (tmp_path / "cut.png", closed):
        with pytest.raises(DataError, match="cannot be read"):
            predictor.set_image(wrong)
    for wrong in ([], pixels(), str(tmp_path)):
        with pytest.raises(DataError, match="takes a list of pictures"):
            predictor.set_images(wrong)
    assert predictor.predict(points=[30, 40]).masks.shape[2:] == (80, 120)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_pictures_of_odd_sizes_answer_at_their_size(predictor, size):
    predictor.set_image(np.zeros(size, np.uint8))
    assert predictor.predict(points=[0, 0]).masks.shape == (1, 3, *size)


@pytest.fixture
def asked(predictor):
    predictor.set_image(pixels())
    return predictor


def test_a_threshold_is_a_number_in_any_form(asked):
    torch = pytest.importorskip("torch")
    expected = len(asked.predict("red circle", threshold=0.25))
    for same in (np.float32(0.25), np.array(0.25), torch.tensor(0.25)):
        assert len(asked.predict("red circle", threshold=same)) == expected
    for wrong in (np.nan, 1.5, "0.5", True, [0.5]):
        with pytest.raises(PromptError, match="expected a score from 0 to 1"):
            asked.predict("red circle", threshold=wrong)
        with pytest.raises(PromptError, match="expected a score from 0 to 1"):
            asked.of_videos(threshold=wrong)


def test_pictures_are_drawn_on_and_tiled_and_iterated_in_any_form(asked, tmp_path):
    found = asked.predict("red circle")
    Image.fromarray(pixels()).save(tmp_path / "p.png")
    drawn = [asked.draw({"x": found}, p) for p in (None, pixels(), tmp_path / "p.png")]
    assert all(np.array_equal(drawn[0], d) for d in drawn)
    assert [len(f) for f in asked.predict_tiled(pixels(), "red circle")] == [1]
    asked.set_images(p for p in (pixels(), tmp_path / "p.png"))
    assert len(asked.pictures) == 2


def test_frames_are_pictures_in_any_form_of_one_size(predictor, tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "0.png")
    grey = np.repeat(pixels()[..., :1], 3, axis=2)

    def ask(frames, phrases=("red circle",)):
        return [
            (f.number, [(o.phrase, o.score) for o in f.objects])
            for f in predictor.video(frames, phrases)
        ]

    expected = ask([pixels()] * 2)
    assert all(len(objects) == 1 for _, objects in expected)
    assert ask([tmp_path / "0.png"] * 2) == expected
    assert ask([Image.fromarray(pixels())] * 2) == expected
    assert ask(np.stack([pixels()] * 2)) == expected
    assert ask([grey] * 2) == ask([grey[..., 0]] * 2)
    assert ask([pixels()] * 2, "red circle") == expected  # not its letters
    assert ask([]) == []
    for frames, words in (
        ([pixels(), pixels()[:50]], "frame 1 has 120 x 50 pixels, the first one 120 x 80"),
        ([pixels() / 255.0] * 2, "frame 0: the picture is an array of float64"),
        ((p for p in [pixels()]), "expected a film, a folder of pictures, or frames in a list"),
        (7, "the frames are of type int"),
    ):
        with pytest.raises(DataError, match=words):
            ask(frames)
    for phrases, words in (
        ((), "give at least one phrase"),
        (("red circle", "Red  circle"), "is the same to the model as"),
        (("red circle", 3), "one phrase at a time"),
    ):
        with pytest.raises(PromptError, match=words):
            ask([pixels()], phrases)


def test_what_clicks_drew_is_shown_or_refused_in_words(asked):
    found = asked.predict(points=[[30, 40]])
    one = asked.clicks.draw(found.masks[0, 0], [[30, 40]])
    assert np.array_equal(one, asked.clicks.draw(found.masks[0, :1], [[30, 40]]))
    with pytest.raises(PromptError, match="1 points but 2 labels"):
        asked.clicks.draw(found.masks[0], [[30, 40]], [1, 0])
    with pytest.raises(PromptError, match=r"expected \[B, 80, 120\] of this picture"):
        asked.clicks.draw(found.masks, [[30, 40]])
