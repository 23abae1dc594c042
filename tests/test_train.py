"""The trainer as people use it: a folder in, a run folder out; killed and resumed; wrong inputs."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sam3jax import evaluate, train
from sam3jax.config import dump_config, load_config
from sam3jax.data.features import FeatureStore
from tests.coco_folders import write_small_shapes
from tests.trainings import Killed, before_step, kill, losses, words

STEPS = 6
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small_shapes(tmp_path_factory.mktemp("data"), train=24, valid=8)


def arguments(data, output, **changes):
    settings = {
        "output": output, "data.train": data, "steps": STEPS, "batch_size": 8, "eval_every": 3, "save_every": 2, **changes,
    }  # fmt: skip
    return words(settings)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train.main(arguments(data, run)) == 0
    return run


def test_a_run_folder_holds_what_it_should(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "predictions",
                "summary.json", "evaluation.json", "report.html", "batches"}  # fmt: skip
    assert expected <= names
    found = losses(undisturbed)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert all(np.isfinite(v) for v in found.values())
    first = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[0])
    parts = [v for k, v in first.items() if k.startswith("loss/")]
    np.testing.assert_allclose(sum(parts), first["loss"], rtol=1e-5)
    assert {"rate", "grad_norm", "loss_bbox", "loss_ce_aux_0_o2m", "mask_pairs"} <= set(first)
    assert list(undisturbed.glob("tensorboard/*tfevents*"))
    assert list(undisturbed.glob("predictions/*/*.png"))
    assert {f.name for f in (undisturbed / "batches").iterdir()} == {
        f"batch_{k}.png" for k in (1, 2, 3)
    }
    config = load_config(undisturbed / "config.yaml")
    assert load_config(undisturbed / "config.yaml") == config
    head, text = (undisturbed / "config.yaml").read_text().split("\n", 1)
    assert head.startswith("# crc32 of the lines below: ")
    assert dump_config(config) == text


def test_killed_and_resumed_equals_undisturbed(data, undisturbed, tmp_path, monkeypatch):
    run = tmp_path / "killed"

    with monkeypatch.context() as patch:
        before_step(patch, 5, kill)
        with pytest.raises(Killed):
            train.main(arguments(data, run))
    assert train.main(arguments(data, run)) == 0
    assert losses(run) == losses(undisturbed)
    ours, theirs = (json.loads((r / "evaluation.json").read_text()) for r in (run, undisturbed))
    assert ours["metrics"] == theirs["metrics"]


def test_features_read_back_train_as_pictures_do(data, undisturbed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAM3JAX_CACHE", str(tmp_path / "cache"))
    computed = []
    write = FeatureStore.write
    counted = lambda self, entries, *rest: (
        computed.append(len(entries)) or write(self, entries, *rest)
    )
    monkeypatch.setattr(FeatureStore, "write", counted)
    run = tmp_path / "cached"
    with monkeypatch.context() as patch:
        before_step(patch, 3, kill)
        with pytest.raises(Killed):
            train.main(arguments(data, run, cache_trunk=1))
    assert sum(computed) == 24
    assert "24 pictures x 1 views" in capsys.readouterr().err
    # A batch is drawn from its pictures.
    drawn = "batches/batch_1.png"
    assert (run / drawn).read_bytes() == (undisturbed / drawn).read_bytes()
    assert train.main(arguments(data, run, cache_trunk=1)) == 0
    assert sum(computed) == 24  # nothing is computed twice
    ours, theirs = losses(run), losses(undisturbed)
    assert sorted(ours) == sorted(theirs)
    np.testing.assert_allclose([ours[n] for n in ours], [theirs[n] for n in ours], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"lora.targets": ["backbone.vision_backbone.trunk.*"]}, "lora.targets=[transformer.*]"),
     ({"train": "all"}, "tensors are trained"), ({"model.drop_path": 0.1}, "set model.drop_path=0"),
     ({"task": "clicks", "lora.enabled": True, "lora.targets": ["backbone.vision_backbone.trunk.*"]}, "cache_trunk is for")],
)  # fmt: skip
def test_a_trunk_whose_answers_change_is_not_cached(data, tmp_path, capsys, changes, said):
    run = tmp_path / "run"
    assert train.main(arguments(data, run, cache_trunk=1, **changes)) == 2
    assert said in capsys.readouterr().err
    assert not run.exists()


def test_evaluate_says_what_the_log_said(undisturbed):
    logged = json.loads((undisturbed / "summary.json").read_text())["best"]
    assert evaluate.main(["--run", str(undisturbed)]) == 0
    again = json.loads((undisturbed / "evaluation.json").read_text())["metrics"]
    assert again == logged


def test_lora_starts_from_a_run_and_equals_what_evaluate_says(data, undisturbed, tmp_path):
    run = tmp_path / "lora"
    extra = {"init": undisturbed, "lora.rank": 2}
    assert train.main(arguments(data, run, **extra)) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["base"] == json.loads((undisturbed / "summary.json").read_text())["best"]
    assert 0 < summary["parameters_trained"] < summary["parameters"]
    assert evaluate.main(["--run", str(run), "--compare"]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    assert report["metrics"] == summary["best"]
    assert report["base"]["metrics"] == summary["base"]


def test_a_run_is_not_continued_with_other_settings(data, undisturbed, capsys):
    assert train.main(arguments(data, undisturbed, **{"optim.learning_rate": 5e-3})) == 2
    line = capsys.readouterr().err
    assert "optim.learning_rate 0.01 -> 0.005" in line


def broken(kind, data, tmp_path):
    """(overrides, words the message must hold) of one wrong input."""
    if kind == "unknown key":
        return {"optim.lr": 1e-3}, ["optim.lr", "unknown"]
    if kind == "missing folder":
        return {"data.train": tmp_path / "nowhere"}, ["nowhere"]
    if kind == "no init":
        return {"model.vocab_size": 49408}, ["init is not set", "facebook/sam3"]
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    file = copy / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    if kind == "not COCO":
        file.write_text('{"frames": []}')
        words = ["_annotations.coco.json"]
    elif kind == "not JSON":
        file.write_text("{")
        words = ["_annotations.coco.json"]
    elif kind == "unreadable picture":
        picture = copy / "train" / content["images"][0]["file_name"]
        picture.write_bytes(b"no picture")
        words = [picture.name]
    elif kind == "category without masks":
        for a in content["annotations"]:
            if a["category_id"] == content["annotations"][0]["category_id"]:
                a["segmentation"] = []
        file.write_text(json.dumps(content))
        names = {c["id"]: c["name"] for c in content["categories"]}
        words = [names[content["annotations"][0]["category_id"]], "mask"]
    return {"data.train": copy}, words


KINDS = ["unknown key", "missing folder", "no init", "not COCO", "not JSON", "unreadable picture", "category without masks"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_inputs_get_one_clear_line_and_leave_nothing_behind(kind, data, tmp_path, capsys):
    changes, words = broken(kind, data, tmp_path)
    run = tmp_path / "run"
    assert train.main(arguments(data, run, **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    for word in words:
        assert word in error[0]
    assert not run.exists()


def test_an_output_that_is_a_file_stays_as_it_is(data, tmp_path, capsys):
    file = tmp_path / "run"
    file.write_text("mine")
    assert train.main(arguments(data, file)) == 2
    assert "run: there is a file; give another" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_a_checkpoint_of_another_size_is_named(data, undisturbed, tmp_path, capsys):
    changes = {"init": undisturbed}
    args = [
        a for a in arguments(data, tmp_path / "run", **changes) if not a.startswith("model.dim")
    ]
    assert train.main([*args, "model.dim=64"]) == 2
    assert "another size: it has dim 32 (the config says 64)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pictures_written_by_a_run_can_be_opened(undisturbed):
    for file in undisturbed.glob("predictions/*/*.png"):
        with Image.open(file) as picture:
            assert picture.size[0] > 200
