"""StableHLO programs: run from their files by jax alone, they answer as the model does."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image
from safetensors.flax import load_file

from sam3jax import export
from sam3jax.inference.detector import Detector
from sam3jax.inference.exported import PLATFORMS
from sam3jax.types import Prompts
from tests.small_run import small_run

pytest.importorskip("flatbuffers", reason="jax writes programs with it")
PHRASE = "red circle"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run"), evaluation={"nms": 0.5})


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "read_run", lambda _: run)
        words = ["--run", "a run", "--out", out, "--phrase", PHRASE, "--detections", "5"]
        assert export.main([str(w) for w in words]) == 0
    return out


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 255, (1, 42, 42, 3), dtype=np.uint8)


def programs(folder):
    read = lambda name: bytearray((folder / f"{name}.stablehlo").read_bytes())
    return [jax_export.deserialize(read(name)) for name in ("image", "text", "detect")]


@pytest.mark.parametrize("boxes", [0, 2])
def test_the_programs_answer_as_the_model_does(run, folder, pixels, boxes):
    about = json.loads((folder / "model.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    image, text, detect = programs(folder)
    room = about["boxes"]
    shown = np.zeros((1, room, 4), np.float32), np.zeros((1, room), np.int32), np.zeros((1, room), bool)  # fmt: skip
    shown[0][0, :boxes] = np.array([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.2, 0.2]])[:boxes]
    shown[1][0, :boxes], shown[2][0, :boxes] = [1, 0][:boxes], True
    features, valid = text.call(weights, np.array([about["tokens"][PHRASE]], np.int32))
    scores, found, masks = detect.call(weights, image.call(weights, pixels), features, valid, *shown)  # fmt: skip
    assert scores.shape == (5,)
    own = Detector(run.model, run.config.evaluation, limit=5)
    prompts = Prompts(
        text_id=np.zeros((1, 1), np.int32), valid=np.ones((1, 1), bool),
        boxes=shown[0][None], box_labels=shown[1][None], box_valid=shown[2][None],
    )  # fmt: skip
    encoded = own.encode_text(run.variables, run.tokenizer([PHRASE]))
    want = own.ask(run.variables, own.encode_image(run.variables, pixels), encoded, prompts)
    np.testing.assert_allclose(scores, np.where(want.keep, want.scores, 0)[0], atol=1e-5)
    np.testing.assert_allclose(found, want.boxes[0], atol=1e-5)
    np.testing.assert_allclose(masks, want.mask_logits[0], atol=1e-4)


def test_the_programs_are_for_every_platform(folder):
    for program in programs(folder):
        assert tuple(program.platforms) == PLATFORMS


def test_the_readme_runs_without_this_package(folder, tmp_path):
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(folder / "photograph.jpg")  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    guard = "import sys\nsys.modules['sam3jax'] = None\n"
    code = guard + code.replace("score > 0.5", "score >= 0")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert done.stdout.startswith(PHRASE)


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert export.main(["--run", "a run", "--out", str(tmp_path / "there")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert jax.devices()  # the command has not touched the backend


@pytest.mark.parametrize("phrases", [["word " * 40], [" "], ["cup", "Cup"]])
def test_phrases_that_the_model_cannot_read_are_refused(
    run, tmp_path, monkeypatch, capsys, phrases
):
    monkeypatch.setattr(export, "read_run", lambda _: run)
    asked = [word for phrase in phrases for word in ("--phrase", phrase)]
    assert export.main(["--run", "a run", "--out", str(tmp_path / "x"), *asked]) == 2
    assert "phrase" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
