"""Prediction: right results or one clear sentence, for every kind of picture and question."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3jax import predict
from sam3jax.data.coco import DataError, parse_coco
from sam3jax.data.datasets import reading_of
from sam3jax.data.frames import open_frames
from sam3jax.data.loader import make_eval_loader
from sam3jax.evaluation.ask import evaluate_dataset
from sam3jax.inference.detector import Detector
from sam3jax.model import Interactive
from sam3jax.predict import Detections, Predictor, PromptError, find_pictures
from sam3jax.viewing import click_predictor
from sam3jax.viewing import predictor as predictor_module
from sam3jax.viewing.asking import box_in_picture
from sam3jax.viewing.click_predictor import ClickPredictor
from tests.small_run import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run"), evaluation={"threshold": 0.0})


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor(run.model, run.variables, run.tokenizer, run.config.evaluation)


@pytest.fixture
def command(run, predictor, monkeypatch):
    """`python -m sam3jax.predict` with the run of the test, compiled once for all tests."""
    monkeypatch.setattr(Predictor, "from_run", classmethod(lambda *_, **__: predictor))
    return lambda *arguments: predict.main([str(a) for a in (*arguments, "--run", run.path)])


def photograph(width: int, height: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def same(a, b, tolerance=1e-5) -> bool:
    return np.allclose(a.scores, b.scores, atol=tolerance) and np.allclose(
        a.boxes_xyxy, b.boxes_xyxy, atol=100 * tolerance
    )


def test_predictions_equal_those_of_evaluation(run, predictor, tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(photograph(61, 45)).save(file)
    raw = {
        "images": [{"id": 4, "file_name": str(file), "width": 61, "height": 45}],
        "categories": [{"id": 0, "name": "red circle"}, {"id": 7, "name": "cat"}],
        "annotations": [
            {"id": 0, "image_id": 4, "category_id": c, "bbox": [5, 5, 20, 20],
             "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]]}
            for c in (0, 7)
        ],
    }  # fmt: skip
    dataset = parse_coco(raw, "raw", "raw", lambda _: file)
    phrases = ("cat", "red circle")
    loader = make_eval_loader(dataset, phrases, run.tokenizer(phrases), run.config)
    config = run.config.evaluation.model_copy(update={"score_floor": 0.0})
    detector = Detector(run.model, config)
    found = evaluate_dataset(detector, run.variables, loader, dataset, config).predictions
    predictor.set_image(file)
    for category, phrase in ((0, "red circle"), (7, "cat")):
        expected = [r for r in found if r["category_id"] == category]
        ours = predictor.predict(phrase).to_coco(4, category)
        assert len(ours) == len(expected) == 7
        for a, b in zip(ours, expected, strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=1e-6)
            assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-4)
            mask, other = (coco_mask.decode(r["segmentation"]) for r in (a, b))
            assert (mask != other).mean() <= 1e-3


def test_the_backbone_runs_once_for_several_phrases(predictor, monkeypatch):
    calls = []
    real = predictor._detector.encode_trunk
    count = lambda *arguments: calls.append(1) or real(*arguments)
    monkeypatch.setattr(predictor._detector, "encode_trunk", count)
    predictor.set_image(photograph(40, 30))
    found = {phrase: predictor.predict(phrase) for phrase in ("red circle", "blue dog", "tree")}
    assert len(calls) == 1
    assert not same(found["red circle"], found["blue dog"])


def test_boxes_change_the_answer_and_padding_does_not(predictor):
    predictor.set_image(photograph(80, 60))
    alone = predictor.predict("cat")
    one = predictor.predict("cat", boxes=[(10, 10, 20, 20)])
    negative = predictor.predict("cat", negative_boxes=[(10, 10, 20, 20)])
    three = predictor.predict("cat", boxes=[(10, 10, 20, 20), (40, 5, 9, 9), (2, 30, 30, 25)])
    turned = predictor.predict("cat", boxes=[(2, 30, 30, 25), (10, 10, 20, 20), (40, 5, 9, 9)])
    assert not same(alone, one)
    assert not same(one, negative)
    assert not same(one, three)
    assert same(three, turned, 1e-4)  # order is no information
    assert len(predictor.predict(boxes=[(10, 10, 20, 20)])) == 7


@pytest.mark.parametrize(
    ("boxes", "complaint"),
    [
        ([(100, 10, 20, 20)], "outside the picture, which is 80 x 60"),
        ([(10, -30, 20, 20)], "outside the picture"),
        ([(10, 10, 0, 20)], "no area"),
        ([(10, 10, float("nan"), 20)], "four numbers"),
    ],
)
def test_a_box_that_shows_nothing_is_refused(predictor, boxes, complaint):
    predictor.set_image(photograph(80, 60))
    with pytest.raises(PromptError, match=complaint):
        predictor.predict("cat", boxes=boxes)


def test_a_box_over_the_edge_is_cut():
    assert box_in_picture((70, 50, 20, 20), 80, 60) == [
        75 / 80,
        55 / 60,
        10 / 80,
        10 / 60,
    ]


def test_questions_without_sense_are_refused(run, predictor):
    with pytest.raises(PromptError, match="set_image"):
        Predictor(run.model, run.variables, run.tokenizer).predict("cat")
    predictor.set_image(photograph(20, 20))
    with pytest.raises(PromptError, match="nothing to look for"):
        predictor.predict(negative_boxes=[(1, 1, 5, 5)])
    with pytest.raises(PromptError, match="empty"):
        predictor.predict("  ")
    with pytest.raises(PromptError, match=r"tokens long, this model reads 14"):
        predictor.predict("a phrase of very many words " * 9)


def test_every_kind_of_picture_gives_the_result_of_its_pixels(predictor, tmp_path):
    rgb = photograph(50, 40)
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    alpha = np.dstack([rgb, np.full(grey.shape, 255, np.uint8)])
    turned = Image.fromarray(np.rot90(rgb))  # orientation 6: shown a quarter turn clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    cases = {
        "rgb.png": (Image.fromarray(rgb), rgb),
        "rgba.png": (Image.fromarray(alpha), rgb),
        "grey.png": (Image.fromarray(grey), np.dstack([grey] * 3)),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), np.dstack([grey] * 3)),
    }
    turned.save(tmp_path / "exif.png", exif=exif)
    for name, (image, _) in cases.items():
        image.save(tmp_path / name)
    for name, pixels in {**{k: v for k, (_, v) in cases.items()}, "exif.png": rgb}.items():
        predictor.set_image(pixels)
        expected = predictor.predict("cat")
        predictor.set_image(tmp_path / name)
        found = predictor.predict("cat")
        assert (found.height, found.width) == (40, 50), name
        assert same(found, expected), name


def test_pictures_are_read_as_the_run_read_them(run, tmp_path, monkeypatch):
    """data.window, data.slices and data.max_megapixels hold for predict, for frames and for clicks too."""
    values = np.arange(400, dtype=np.uint16).reshape(20, 20)
    for k in (1, 2, 3):
        Image.fromarray(values * k).save(tmp_path / f"scan_{k}.png")
    data = run.config.data.model_copy(update={"window": (0.0, 2550.0), "slices": 3})
    tuned = dataclasses.replace(run, config=run.config.model_copy(update={"data": data}))
    want = np.rint(np.stack([values * k / 10 for k in (1, 2, 3)], -1))
    monkeypatch.setattr(predictor_module, "read_run", lambda _: tuned)
    ours = Predictor.from_run(run.path)
    for method in ("encode_trunk", "from_trunk"):
        monkeypatch.setattr(ours._detector, method, lambda *_: None)
    ours.set_image(tmp_path / "scan_2.png")
    clicks = ClickPredictor(Interactive(run.config.model), {"params": {}}, ours.reading)
    monkeypatch.setattr(click_predictor, "encode_picture", lambda *_: None)
    clicks.set_image(tmp_path / "scan_2.png")
    found = [ours.picture, clicks.picture, open_frames(tmp_path, ours.reading)[1]]
    for picture in found:
        assert np.abs(np.asarray(picture).astype(int) - want).max() <= 1
    small = data.model_copy(update={"max_megapixels": 1e-4})
    ours.reading = reading_of(small)
    with pytest.raises(DataError, match=r"at most 0\.0001 are read"):
        ours.set_image(tmp_path / "scan_2.png")


def test_a_hundred_megapixels_give_masks_of_that_size(predictor, tmp_path, recwarn):
    file = tmp_path / "large.png"
    Image.new("L", (12_000, 8_400), 90).save(file, compress_level=1)
    predictor.set_image(file)
    found = predictor.predict("cat", threshold=0.0)
    assert len(found) == 7
    assert found.masks[0]["size"] == [8_400, 12_000]
    assert max(predictor.draw({"cat": found}).size) == 2048
    assert not [w for w in recwarn if "bomb" in str(w.message).lower()]


def test_a_page_of_a_file_can_be_asked_for(command, predictor, tmp_path, monkeypatch, capsys):
    pages = [Image.fromarray(photograph(30, 24, seed)) for seed in range(3)]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "one.png")
    words = ("--phrase", "cat", "--threshold", "0", "--nms", "1", "--no-overlay")
    monkeypatch.setattr(predictor, "config", predictor.config)  # --nms changes it
    for frame in (0, 2):
        output = tmp_path / f"out{frame}"
        file = tmp_path / "pages.tiff"
        assert command(file, *words, "--frame", frame, "--output", output) == 0
        assert f"frame {frame} of 3 is looked at" in capsys.readouterr().err
        found = json.loads((output / "predictions.json").read_text())["annotations"]
        predictor.set_image(pages[frame])
        expected = predictor.predict("cat", threshold=0).scores
        np.testing.assert_allclose([a["score"] for a in found], expected, atol=1e-5)
    # What has fewer pages is named, and the others are done.
    assert command(tmp_path / "pages.tiff", tmp_path / "one.png", *words, "--frame", 1, "--output", tmp_path / "both") == 1  # fmt: skip
    assert "one.png" in capsys.readouterr().err


def square(left: int, top: int, edge: int) -> dict:
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[top : top + edge, left : left + edge] = 1
    return coco_mask.encode(mask)


def test_each_thing_is_found_once_unless_all_are_asked_for(
    command, predictor, tmp_path, monkeypatch, capsys
):
    # The second lies on the first (IoU .68), the third on the second alone, the fourth and fifth are empty.
    masks = [square(0, 0, 20), square(2, 2, 20), square(5, 5, 20), square(0, 0, 0), square(0, 0, 0)]
    scores = np.linspace(0.9, 0.5, 5)
    found = Detections(scores, np.zeros((5, 4)), masks, 40, 60)
    assert found.distinct(0.5).scores.tolist() == scores[[0, 2, 3, 4]].tolist()
    assert found.distinct(0.5).duplicates == 1
    assert len(found.distinct(0.3)) == 3
    assert len(found.distinct(None)) == len(found.distinct(1.0)) == 5
    assert len(found.above(2.0).distinct(0.5)) == 0
    monkeypatch.setattr("sam3jax.viewing.predictor.full_size", lambda *_, **__: found)
    Image.fromarray(photograph(60, 40)).save(tmp_path / "a.png")
    words = (tmp_path / "a.png", "--phrase", "cat", "--no-overlay")
    for nms, kept in ((0.5, 4), (1, 5)):
        monkeypatch.setattr(predictor, "config", predictor.config)
        assert command(*words, "--nms", nms, "--output", tmp_path / f"out{nms}") == 0
        written = json.loads((tmp_path / f"out{nms}" / "predictions.json").read_text())
        assert len(written["annotations"]) == kept
        assert ("1 weaker finds on things found already" in capsys.readouterr().out) == (kept == 4)


def test_a_folder_of_a_thousand_with_one_corrupt_file(command, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(1000):
        Image.fromarray(photograph(16 + k % 3, 16, k)).save(folder / f"{k:04}.png")
    (folder / "0500.png").write_bytes((folder / "0500.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no picture")
    output = tmp_path / "out"
    code = command(
        folder, "--phrase", "cat", "--threshold", "0.999", "--output", output, "--no-overlay"
    )
    printed = capsys.readouterr()
    assert code == 1
    assert "0500.png" in printed.err
    assert "1 of 1000 pictures failed" in printed.err
    record = json.loads((output / "predictions.json").read_text())
    assert len(record["images"]) == 999
    assert len({image["id"] for image in record["images"]}) == 999


def test_a_model_folder_predicts_what_its_parameters_say(run, predictor, tmp_path):
    from sam3jax.weights.model_folder import save_model_folder

    folder = tmp_path / "model"
    save_model_folder(folder, run.config.model, run.variables["params"], run.tokenizer)
    loaded = Predictor.from_model_folder(folder)
    for one in (loaded, predictor):
        one.set_image(photograph(33, 44))
    assert same(loaded.predict("cat", threshold=0), predictor.predict("cat", threshold=0))


def test_overlays_and_coco_json_for_files_globs_and_equal_names(command, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(photograph(30, 20)).save(tmp_path / folder / "same.png")
    output = tmp_path / "out"
    code = command(
        tmp_path / "a", tmp_path / "[ab]" / "*.png", "--phrase", "cat", "--phrase", "red circle",
        "--box", "2,3,9,9", "--negative-box", "15,3,9,9", "--output", output,
    )  # fmt: skip
    assert code == 0
    assert sorted(f.name for f in output.iterdir()) == [
        "predictions.json",
        "same.png",
        "same_2.png",
    ]
    record = json.loads((output / "predictions.json").read_text())
    assert [c["name"] for c in record["categories"]] == ["cat", "red circle"]
    assert len(record["annotations"]) == 2 * 2 * 7
    first = record["annotations"][0]
    assert first["id"] == 1
    assert coco_mask.decode(first["segmentation"]).shape == (20, 30)
    assert first["area"] == coco_mask.area(first["segmentation"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["empty", "--phrase", "cat"], "no pictures: .*empty holds no picture"),
        (["nowhere.jpg", "--phrase", "cat"], "no pictures: .*nowhere.jpg does not exist"),
        (["*.jpg", "--phrase", "cat"], "matches no file"),
        (["one.png"], "give --phrase, --box around an example, --points"),
        (["one.png", "--phrase", "word " * 40], "use fewer words"),
        (
            ["one.png", "--phrase", "cat", "--output", "one.png"],
            "one.png: there is a file; give another",
        ),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_2(
    command, tmp_path, capsys, monkeypatch, arguments, complaint
):
    import re

    (tmp_path / "empty").mkdir()
    Image.fromarray(photograph(30, 20)).save(tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    assert command("--output", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert re.search(complaint, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_box_outside_one_picture_fails_that_picture_only(command, tmp_path, capsys):
    Image.fromarray(photograph(30, 20)).save(tmp_path / "small.png")
    Image.fromarray(photograph(90, 80)).save(tmp_path / "wide.png")
    output = tmp_path / "out"
    assert command(tmp_path, "--box", "50,40,9,9", "--output", output) == 1
    assert "small.png: box [50.0, 40.0, 9.0, 9.0] lies outside" in capsys.readouterr().err
    record = json.loads((output / "predictions.json").read_text())
    assert [c["name"] for c in record["categories"]] == ["visual"]
    assert [i["file_name"].endswith("wide.png") for i in record["images"]] == [True]
    with pytest.raises(SystemExit):
        command(tmp_path, "--box", "50,40,9")


def test_what_a_file_manager_left_in_a_folder_is_no_picture(tmp_path):
    for name in ("a.png", "._a.png", "__MACOSX/a.png", ".trash/b.png", "sub/c.png"):
        file = tmp_path / ".photos" / name  # the folder that is asked for may be hidden itself
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    found = find_pictures([str(tmp_path / ".photos")])
    assert [f.name for f in found] == ["a.png", "c.png"]


def test_a_large_picture_is_looked_at_in_tiles_of_the_models_size(command, predictor, tmp_path, monkeypatch):  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    Image.fromarray(pixels[:30, :40]).save(tmp_path / "small.png")
    sizes, real = [], predictor.set_images
    monkeypatch.setattr(predictor, "set_images", lambda p: [sizes.append(i.size) for i in p] and real(p))  # fmt: skip
    output = tmp_path / "out"
    words = ("--phrase", "cat", "--phrase", "tree", "--threshold", "0", "--output", output)
    assert command(tmp_path, "--tile", *words) == 0
    assert sizes == [(100, 70), *[(42, 42)] * 6, (40, 30)]
    record = json.loads((output / "predictions.json").read_text())
    large = [a for a in record["annotations"] if a["image_id"] == 1]
    assert {a["category_id"] for a in large} == {1, 2}
    assert all(a["segmentation"]["size"] == [70, 100] for a in large)
    assert [a["id"] for a in record["annotations"]] == [*range(1, len(record["annotations"]) + 1)]


def test_a_picture_that_is_squashed_much_is_said(command, tmp_path, capsys):
    Image.new("RGB", (169, 20)).save(tmp_path / "wide.png")
    Image.new("RGB", (168, 20)).save(tmp_path / "less.png")
    words = ("--phrase", "cat", "--threshold", "1", "--no-overlay", "--output", tmp_path / "out")
    assert command(tmp_path, *words) == 0
    said = capsys.readouterr().err
    assert f"note: {tmp_path}/wide.png (169 x 20) was squashed more than 4 times to 42 x 42" in said
    assert command(tmp_path, "--tile", *words) == 0
    assert "squashed" not in capsys.readouterr().err


def test_a_call_replaces_the_overlays_of_the_one_before_and_no_picture(command, tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"{name}.png")
    output, words = (
        tmp_path / "out",
        ("--phrase", "cat", "--threshold", "1", "--output", tmp_path / "out"),
    )
    assert command(tmp_path / "a.png", tmp_path / "b.png", *words) == 0
    (output / "mine.png").write_bytes(b"mine")
    assert command(tmp_path / "a.png", *words) == 0
    assert sorted(f.name for f in output.iterdir()) == ["a.png", "mine.png", "predictions.json"]
    assert command(output / "a.png", "--no-overlay", *words) == 0  # an overlay as an input
    assert sorted(f.name for f in output.iterdir()) == ["a.png", "mine.png", "predictions.json"]


def test_finds_are_written_for_other_tools_and_replaced_by_the_next_call(command, tmp_path, capsys):
    for name in ("one", "two"):
        Image.fromarray(photograph(61, 45)).save(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    words = ["--phrase", "red circle", "--format", "yolo", "--format", "cvat", "--output", out]
    assert command(tmp_path / "one.png", tmp_path / "two.png", *words) == 0
    labels = out / "yolo" / "labels"
    assert sorted(f.name for f in labels.iterdir()) == ["one.txt", "two.txt"]
    found = json.loads((out / "predictions.json").read_text())["annotations"]
    assert (out / "cvat.xml").read_text().count("<mask ") == sum(a["area"] > 0 for a in found)
    assert command(tmp_path / "one.png", *words) == 0
    assert [f.name for f in labels.iterdir()] == ["one.txt"]
    capsys.readouterr()
    other = tmp_path / "other"
    (other / "yolo").mkdir(parents=True)  # the user's own
    assert command(tmp_path / "one.png", *words[:-1], other) == 2
    assert "was there before" in capsys.readouterr().err


def test_detections_as_supervision_has_them(predictor):
    pytest.importorskip("supervision", reason="an optional extra")
    predictor.set_image(photograph(61, 45))
    found = predictor.predict("red circle")
    theirs = found.to_supervision("red circle", 3)
    assert len(theirs) == len(found)
    assert theirs.mask.shape == (len(found), 45, 61)
    assert set(theirs.class_id) <= {3}
    assert set(theirs["class_name"]) <= {"red circle"}
