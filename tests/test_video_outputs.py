"""What is written of a video can be read again, by us and by others; and the command end to end."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO

from sam3jax import predict
from sam3jax.data.coco import decode_mask
from sam3jax.data.frames import Film, FrameFiles
from sam3jax.data.pictures import DataError
from sam3jax.data.video_folders import read_videos
from sam3jax.options import parse
from sam3jax.predict import Predictor, PromptError
from sam3jax.predict_video import predict_videos
from sam3jax.video import chunks
from sam3jax.video.association import Rules
from sam3jax.video.objects import VideoFrame, VideoObject
from sam3jax.video.results import VideoResults
from sam3jax.viewing import film
from sam3jax.viewing.draw import Instance
from tests import video_folders as made
from tests.small_run import small_run

HEIGHT, WIDTH = made.SIZE


def results() -> VideoResults:
    """What a perfect model finds in the made video; frames added backwards."""
    out = VideoResults("walk", ["cat", "dog"], made.FRAMES)
    for t in reversed(range(made.FRAMES)):
        objects = []
        for k, mask in enumerate(made.object_masks()[t]):
            if mask.any():
                rle = rle_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
                left, top, width, height = rle_codec.toBbox(rle).tolist()
                box = (left, top, left + width, top + height)
                objects.append(VideoObject(k + 1, ("cat", "dog")[k], 0.9 - 0.1 * k, box, rle))
        out.add(VideoFrame(t, WIDTH, HEIGHT, tuple(objects)))
    return out


def test_every_format_reads_back_as_it_was(tmp_path):
    root = made.write_ytvis(tmp_path / "data")
    assert results().write(tmp_path / "out") == []
    truth = read_videos(root).videos[0]
    raw = json.loads((tmp_path / "out" / "ytvis.json").read_text())
    raw["videos"][0]["file_names"] = [f"walk/{t:05d}.jpg" for t in range(made.FRAMES)]
    (root / "instances.json").write_text(json.dumps(raw))
    (root / "Annotations").mkdir()
    (tmp_path / "out" / "masks").rename(root / "Annotations" / "walk")
    (ytvis,) = read_videos(root / "instances.json").videos
    (palette,) = read_videos(root).videos
    for t in range(made.FRAMES):
        wanted = {a.id: decode_mask(a, HEIGHT, WIDTH) for a in truth.labels[t].annotations}
        for found in (ytvis, palette):
            got = {a.id: decode_mask(a, HEIGHT, WIDTH) for a in found.labels[t].annotations}
            assert set(got) == set(wanted)
            assert all(np.array_equal(got[i], wanted[i]) for i in got)
    coco = COCO(tmp_path / "out" / "coco.json")
    assert len(coco.imgs) == made.FRAMES
    boxes = {
        a["image_id"]: a["bbox"] for a in coco.loadAnns(coco.getAnnIds()) if a["track_id"] == 2
    }
    assert boxes == {2: [20, 12, 10, 8], 3: [20, 12, 10, 8]}
    (cat, dog) = raw["annotations"]
    assert [s is None for s in dog["segmentations"]] == [True, True, False, False, True, True]
    assert (cat["score"], dog["category_id"]) == (pytest.approx(0.9), 2)


def test_objects_beyond_a_palette_are_said(tmp_path):
    rle = rle_codec.encode(np.asfortranarray(np.ones((HEIGHT, WIDTH), np.uint8)))
    out = VideoResults("crowd", ["cat"], 1)
    many = [VideoObject(i, "cat", 0.9, (0, 0, 1, 1), rle) for i in range(1, 301)]
    out.add(VideoFrame(0, WIDTH, HEIGHT, tuple(many)))
    assert out.write(tmp_path) == ["46 of 300 objects are not in masks/: a palette holds 254"]
    with Image.open(tmp_path / "masks" / "00000.png") as image:
        assert (image.mode, image.getpixel((0, 0))) == ("P", 1)  # the strongest, the first
        assert image.convert("RGB").getpixel((0, 0)) == (128, 0, 0)  # DAVIS's first colour


def odd_pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (37, 25), (20 * k, 90, 90)) for k in range(count)]


def test_a_film_plays_and_its_edges_are_even(tmp_path):
    pytest.importorskip("av", reason="films need PyAV")
    file = film.write_film(tmp_path / "x", odd_pictures(7), 5)
    frames = Film(file)
    assert (file.suffix, len(frames), frames.width, frames.height) == (".mp4", 7, 36, 24)
    assert np.abs(frames[6].astype(int)[..., 0] - 120).max() < 6


def test_without_pyav_there_is_a_gif(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    file = film.write_film(tmp_path / "x", odd_pictures(5), 5)
    with Image.open(file) as image:
        assert (file.suffix, image.n_frames, image.info["duration"]) == (".gif", 5, 200)
    with pytest.raises(DataError, match="no frame"):
        film.write_film(tmp_path / "y", [], 5)


def test_a_strip_shows_each_row_of_frames():
    nothing = lambda number: []
    one = lambda number: [Instance("#1", (2, 2, 20, 20))]
    strip = film.strip(made.pictures(), film.evenly(6, 3), [("truth", nothing), ("found", one)])
    assert strip.width > 3 * 180
    assert strip.height > 2 * 180


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """An untrained model, with thresholds low enough that it finds something."""
    run = small_run(tmp_path_factory.mktemp("run"), seed=7)
    config = run.config.evaluation.model_copy(update={"threshold": 0.02})
    return Predictor(run.model, run.variables, run.tokenizer, config)


def test_a_video_is_asked_frame_by_frame_both_ways(predictor):
    frames, phrases = made.pictures(11), ["red square", "dog"]
    video = predictor.of_videos()
    video.rules = Rules(hot_start=3, unmatched=3, duplicate=3, new_score=0.0)
    forwards = list(video.objects(frames, phrases))
    backwards = list(video.objects(frames, phrases, reverse=True))
    assert [f.number for f in forwards] == list(range(11))
    assert [f.number for f in backwards] == list(range(10, -1, -1))
    seen = [o for f in forwards for o in f.objects]
    assert seen
    assert {(f.width, f.height) for f in forwards} == {(WIDTH, HEIGHT)}
    # The strongest of a phrase is what the picture predictor finds, in its pixels.
    first = forwards[0].objects[0]
    predictor.set_image(frames[0])
    alone = predictor.predict(first.phrase)
    assert first.mask == alone.masks[0]
    np.testing.assert_allclose(first.box_xyxy, alone.boxes_xyxy[0], atol=1e-3)
    np.testing.assert_allclose(first.score, alone.scores[0], atol=1e-3)
    assert [f.number for f in predictor.video(frames, phrases)] == list(range(11))
    assert list(predictor.video([], phrases)) == []
    with pytest.raises(PromptError, match="empty"):
        next(predictor.video(frames, [""]))


def test_fewer_phrases_and_other_thresholds_take_the_same_program(predictor):
    frames = made.pictures(3)
    phrases = ["red square", "dog", "blue circle"]
    video = predictor.of_videos()
    all_three = [f for _, f in video.detections(frames, phrases)]
    programs = chunks._detect_chunk._cache_size()
    video.thresholds = {"dog": 0.9}
    two = [f for _, f in video.detections(frames, phrases[:2])]
    assert chunks._detect_chunk._cache_size() == programs
    alone = [f for _, f in predictor.of_videos().detections(frames, phrases[:1])]
    for got, first, want in zip(two, alone, all_three, strict=True):
        assert got.logits.shape == (2, *want.logits.shape[1:])
        np.testing.assert_allclose(got.logits[0], want.logits[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(first.logits[0], want.logits[0], rtol=1e-4, atol=1e-4)
        assert (got.logits[1] < -100).all()


def test_a_trackers_input_needs_the_second_neck(predictor):
    with pytest.raises(PromptError, match="no interactive heads"):
        predictor.of_videos(levels=True)
    tiny = Predictor.from_model_folder("shipped:tiny_shapes")
    ((_, found),) = tiny.of_videos(levels=True).detections(made.pictures(1), ["red circle"])
    assert [x.shape[0] for x in found.levels] == [48, 24, 12]
    assert {str(x.dtype) for x in found.levels} == {"bfloat16"}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["x.mp4", "--frame", "2"], "--frame is for files"),
        (["x.png", "--reverse"], "are for videos"),
        (["x.png", "--frames-per-device", "2"], "are for videos"),
        (["x.mp4", "--frames-per-device", "0"], "whole number from 1"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, match, capsys):
    try:
        status = predict.main([*words, "--run", "R", "--phrase", "cat"])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert match in " ".join(capsys.readouterr().err.split())


def options_of(*more: str):
    return parse("predict", ["x.mp4", "--run", "R", "--phrase", "cat", *more])


def test_the_command_writes_a_folder_for_each_video(predictor, tmp_path, capsys):
    pytest.importorskip("av", reason="films need PyAV")
    clip = made.write_film(tmp_path / "clip.mp4", made.pictures())
    folder = made.write_palette(tmp_path / "data") / "JPEGImages" / "walk"
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    one = tmp_path / "one"
    one.mkdir()
    Image.fromarray(made.pictures()[0]).save(one / "0.png")
    paths = [str(p) for p in (clip, folder, tmp_path / "bad.mp4", one)]
    failed = predict_videos(predictor.of_videos(), paths, options_of(), tmp_path / "out")
    said = capsys.readouterr()
    assert failed == 1
    assert "bad.mp4" in said.err
    assert "damaged or no film" in said.err
    for name, frames in (("clip", 6), ("walk", 6), ("one", 1)):
        out = tmp_path / "out" / name
        assert len(Film(out / "overlay.mp4")) == frames
        assert len(list((out / "masks").iterdir())) == frames
        assert len(json.loads((out / "coco.json").read_text())["images"]) == frames
        assert (out / "strip.png").is_file()
    assert isinstance(read_videos(tmp_path / "data").videos[0].frames, FrameFiles)


def test_boxes_are_for_pictures(capsys):
    arguments = ["clip.mp4", "--model", "x", "--box", "1,1,2,2"]
    assert predict.main(arguments) == 2
    assert "a video is asked with --phrase" in capsys.readouterr().err
