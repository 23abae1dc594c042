"""The task `clips` as people use it: videos in, a run folder out; killed and resumed; short videos; errors."""

import json

import numpy as np
import pytest

from sam3jax import evaluate, train
from sam3jax.data.video_sets import open_videos, pictures_of
from sam3jax.data.videos import VOID
from sam3jax.errors import UserError
from sam3jax.evaluation.steadiness import steadiness_of
from tests import video_folders as made
from tests.batches import small_config
from tests.trainings import Killed, before_step, kill, losses, words

STEPS = 4
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made.write_ytvis(tmp_path_factory.mktemp("videos"))


def arguments(data, output, **changes):
    settings = {
        "task": "clips", "output": output, "data.train": data, "data.valid": data, "steps": STEPS,
        "clips.frames": 2, "batch_size": 2, "clips.frames_at_once": 2, "eval_every": 0, "save_every": 2,
        **changes,
    }  # fmt: skip
    return words(settings)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train.main(arguments(data, run)) == 0
    return run


def test_a_run_validates_frames_and_draws_strips(undisturbed):
    last = json.loads((undisturbed / "summary.json").read_text())["final"]
    assert {"segm/AP50", "bbox/AP", "video/steadiness"} <= set(last)
    assert list(undisturbed.glob("predictions/*/*.png"))
    assert len(list(undisturbed.glob("batches/batch_*.png"))) == 3
    found = losses(undisturbed)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert np.isfinite(list(found.values())).all()


def test_evaluate_says_what_the_log_said(undisturbed):
    logged = json.loads((undisturbed / "summary.json").read_text())["final"]
    assert evaluate.main(["--run", str(undisturbed)]) == 0
    again = json.loads((undisturbed / "evaluation.json").read_text())["metrics"]
    assert {k: again[k] for k in logged} == logged
    assert {"video/HOTA", "video/J&F", "video/switches"} <= set(again) - set(logged)


def test_killed_and_resumed_equals_undisturbed(data, undisturbed, tmp_path, monkeypatch):
    run = tmp_path / "killed"
    with monkeypatch.context() as patch:
        before_step(patch, 4, kill)
        with pytest.raises(Killed):
            train.main(arguments(data, run))
    assert train.main(arguments(data, run)) == 0
    assert losses(run) == losses(undisturbed)


def test_features_read_back_train_as_frames_do(data, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("SAM3JAX_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "cached"
    assert train.main(arguments(data, run, cache_trunk=4)) == 0
    drawn = "batches/batch_1.png"
    assert (run / drawn).read_bytes() == (undisturbed / drawn).read_bytes()
    ours, theirs = losses(run), losses(undisturbed)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def test_void_pixels_are_a_crowd_of_every_phrase(tmp_path):
    config = small_config(task="clips", data={"train": str(made.write_palette(tmp_path, every=2))})
    train_set, valid, _ = open_videos(config)
    assert valid is None
    pictures = pictures_of(train_set)
    assert [r.frame for r in pictures.images] == [0, 2, 4]
    assert [r.id for r in pictures.images] == [0, 1, 2]
    for record in pictures.images:
        (crowd,) = [a for a in record.annotations if a.iscrowd]
        assert crowd.area == (made.index_masks()[record.frame] == VOID).sum()
        assert record.open().size == made.SIZE[::-1]


def test_steady_scores_are_those_of_objects_in_sight(tmp_path):
    config = small_config(task="clips", data={"train": str(made.write_ytvis(tmp_path))})
    pictures = pictures_of(open_videos(config)[0])

    def said(record, a, score):
        box = list(a.bbox)
        return {"image_id": record.id, "category_id": a.category_id, "bbox": box, "score": score}

    seen = [(r, a) for r in pictures.images for a in r.annotations]
    assert steadiness_of(pictures.images, [said(r, a, 0.9) for r, a in seen]) == 1
    # The wandering square flickers, 5 changes of .9; the other one, in two frames, does not.
    some = [said(r, a, 0.9) for r, a in seen if a.category_id == 2 or r.frame % 2]
    assert steadiness_of(pictures.images, some) == pytest.approx(1 - 5 * 0.9 / 6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.train": "nowhere"}, "no videos at nowhere"),
        ({"batch_size": 3}, "no whole number of clips of 2"),
        ({"data.repeat_threshold": 0.1}, "data.repeat_threshold is for pictures"),
        ({"clips.frame": 3}, "unknown config key clips.frame"),
        ({"data.valid": None, "data.train": None}, "no training data: set data.train"),
    ],
)
def test_a_wrong_setting_is_a_sentence(data, tmp_path, capsys, changes, said):
    settings = {k: v for k, v in changes.items() if v is not None}
    words = arguments(data, tmp_path / "run", **settings)
    gone = [k for k, v in changes.items() if v is None]
    assert train.main([w for w in words if w.split("=")[0] not in gone]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_videos_without_an_annotated_frame_are_refused(tmp_path):
    root = made.write_ytvis(tmp_path)
    raw = json.loads((root / "instances.json").read_text())
    (root / "instances.json").write_text(json.dumps({**raw, "annotations": []}))
    with pytest.raises(UserError, match="no usable annotation"):
        open_videos(small_config(task="clips", data={"train": str(root)}))
