"""Evaluation end to end with a small model, and the command's files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sam3jax import evaluate
from sam3jax.data.folders import read_dataset
from sam3jax.data.ledger import DataError
from sam3jax.data.loader import make_eval_loader
from sam3jax.data.prompts import vocabulary
from sam3jax.data.records import Dataset
from sam3jax.evaluation.ask import evaluate_dataset
from sam3jax.evaluation.comparison import with_source_ids
from sam3jax.inference.candidates import Candidates
from sam3jax.inference.detector import Detector
from sam3jax.inference.full_size import fetch
from sam3jax.predict import Predictor
from sam3jax.training.mesh import make_mesh, put_replicated
from tests.small_run import small_run
from tests.video_folders import write_ytvis

NAMES = ["red circle", "cat", "blue dog", "tree", "house"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures and five categories, as a Roboflow export; the last picture is empty."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        (root / split).mkdir()
        images, annotations = [], []
        for k in range(3):
            width, height = 60 + 7 * k, 50
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / f"{k}.png")
            images.append({"id": k, "file_name": f"{k}.png", "width": width, "height": height})
            for category in range(5 if k < 2 else 0):
                box = [5 + category, 6, 20, 25]
                x, y, w, h = box
                corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                annotations.append(
                    {"id": len(annotations), "image_id": k, "category_id": category, "bbox": box,
                     "segmentation": corners, "area": 500, "iscrowd": 0}
                )  # fmt: skip
        raw = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": n} for i, n in enumerate(NAMES)],
        }
        (root / split / "_annotations.coco.json").write_text(json.dumps(raw))
    return root


@pytest.fixture
def run(folder, tmp_path):
    data = {"train": str(folder), "max_prompts": 2}
    sections = {"data": data, "evaluation": {"batch_size": 2, "threshold": 0.3}}
    return small_run(tmp_path / "run", **sections)


def test_a_picture_asked_in_several_rows_gets_the_answers_of_each_phrase_alone(run, folder):
    dataset = read_dataset(folder, "valid")
    phrases = vocabulary(run.config.data, dataset)
    tokens = run.tokenizer(phrases)
    config = run.config.evaluation.model_copy(update={"score_floor": 0.0})
    detector = Detector(run.model, config)
    encoded = []
    real = detector.encode_image
    detector.encode_image = lambda *a: encoded.append(1) or real(*a)
    loader = make_eval_loader(dataset, phrases, tokens, run.config, targets=False)
    found = evaluate_dataset(detector, run.variables, loader, dataset, config)
    assert len(loader) == 5  # 3 pictures x 3 rows of at most 2 prompts
    assert len(encoded) < len(loader)
    assert len(found.predictions) == 3 * 5 * 7
    alone = Predictor(run.model, run.variables, run.tokenizer, config)
    for image in dataset.images:
        alone.set_image(image.file)
        for category, phrase in dataset.categories.items():
            pair = (image.id, category)
            ours = [
                r["score"] for r in found.predictions if (r["image_id"], r["category_id"]) == pair
            ]
            np.testing.assert_allclose(ours, alone.predict(phrase, threshold=0).scores, atol=1e-5)


def test_corrections_are_asked_of_the_model_and_leave_the_first_answer_alone(run, folder):
    dataset = read_dataset(folder, "valid")
    phrases = vocabulary(run.config.data, dataset)

    def ask(steps: int):
        config = run.config.evaluation.model_copy(update={"interactive_steps": steps})
        detector = Detector(run.model, config)
        encode, answer, calls = detector.encode_image, detector.ask, []
        detector.encode_image = lambda *a: calls.append("encode") or encode(*a)
        detector.ask = lambda *a: calls.append((a[-1], found := answer(*a))) or found
        loader = make_eval_loader(
            dataset, phrases, run.tokenizer(phrases), run.config, targets=False
        )
        found = evaluate_dataset(detector, run.variables, loader, dataset, config, batches=2)
        return found, [c for c in calls if c != "encode"], calls.count("encode")

    (plain, _, pictures), (corrected, asked, encoded) = ask(0), ask(2)
    assert corrected.predictions == plain.predictions
    assert {n: corrected.metrics[n] for n in plain.metrics} == plain.metrics
    further = {n.split("/")[0] for n in corrected.metrics if n not in plain.metrics}
    assert further == {"exemplars_1", "exemplars_2"}
    assert encoded == pictures  # for all rounds
    # What is missed once is shown once; nothing is found in vain above the threshold.
    assert [bool(p.box_valid.any()) for p, _ in asked] == [False, True] * 2
    before, after = (np.asarray(found.scores) for _, found in asked[:2])
    shown = np.asarray(asked[1][0].box_valid).any(-1).ravel()
    assert shown.any()
    assert np.abs(before - after).max(-1)[shown].min() > 1e-4  # the boxes reach the model


def test_only_what_was_asked_is_counted(run, folder):
    dataset = read_dataset(folder, "valid")
    phrases = vocabulary(run.config.data, dataset)
    loader = make_eval_loader(dataset, phrases, run.tokenizer(phrases), run.config)
    config = run.config.evaluation
    detector = Detector(run.model, config)
    found = evaluate_dataset(detector, run.variables, loader, dataset, config, batches=1)
    assert sum(row["instances"] for row in found.per_category) == 4
    assert set(found.pictures) == {0}


def test_the_command_compares_and_probes(run, folder, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "read_run", lambda _: run)
    arguments = ["--run", str(run.path), "--compare", "--probe", str(folder)]
    stale = run.path / "comparison" / "01_of_an_earlier_step.png"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    assert evaluate.main(arguments) == 0
    report = json.loads((run.path / "evaluation.json").read_text())
    base, tuned = report["base"]["metrics"], report["metrics"]
    assert {"bbox/AP", "segm/AP", "cgF1", "false_alarms", "false_alarms_empty"} <= set(tuned)
    for name, difference in report["compare"]["metrics"].items():
        assert difference == pytest.approx(tuned[name] - base[name])
    assert report["probe"]["metrics"] == tuned  # the same data
    assert set(report["thresholds"]) == set(NAMES)
    results = json.loads((run.path / "predictions.json").read_text())
    assert {r["image_id"] for r in results} <= {0, 1, 2}
    shown = report["compare"]["pictures"]
    assert all(p["difference"] == p["F1"] - p["base"] != 0 for p in shown)
    assert len(list((run.path / "comparison").glob("*.png"))) == len(shown)
    printed = capsys.readouterr().out
    assert "blue dog" in printed
    assert "probe" in printed


def test_a_run_of_pictures_is_measured_on_videos_too(run, folder, tmp_path, monkeypatch, capsys):
    """What the data are decides, not the task that the run was of; a probe may be either."""
    monkeypatch.setattr(evaluate, "read_run", lambda _: run)
    videos = str(write_ytvis(tmp_path / "videos"))
    assert evaluate.main(["--run", str(run.path), "--data", videos, "--probe", videos]) == 0
    report = json.loads((run.path / "evaluation.json").read_text())
    assert {"video/HOTA", "video/J&F", "video/steadiness", "segm/AP"} <= set(report["metrics"])
    assert report["probe"]["metrics"]["segm/AP"] == report["metrics"]["segm/AP"]
    assert evaluate.main(["--run", str(run.path), "--probe", videos]) == 0
    report = json.loads((run.path / "evaluation.json").read_text())
    assert "video/HOTA" not in report["metrics"]


def test_predictions_hold_the_ids_of_the_file():
    results = [{"image_id": 0, "category_id": 5, "score": 1.0}, {"image_id": 3, "category_id": 7, "score": 0.5}]  # fmt: skip
    sources = {"image": {0: "c1"}, "category": {5: 2.5, 7: "dog"}}
    dataset = Dataset("d", (), {5: "cat", 7: "dog"}, source_ids=sources)
    found = with_source_ids(results, dataset)
    assert [r["source_ids"] for r in found] == [{"image": "c1", "category": 2.5}, {"category": "dog"}]  # fmt: skip
    assert [{k: v for k, v in r.items() if k != "source_ids"} for r in found] == results
    assert with_source_ids(results, Dataset("d", (), {})) == results


def test_the_base_can_be_evaluated_alone(run, folder, monkeypatch):
    monkeypatch.setattr(evaluate, "read_run", lambda _: run)
    assert evaluate.main(["--run", str(run.path), "--base", "--split", "train"]) == 0
    assert json.loads((run.path / "evaluation.json").read_text())["weights"] == "base"


def test_a_missing_split_is_one_sentence(run, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "read_run", lambda _: run)
    assert evaluate.main(["--run", str(run.path), "--split", "holiday"]) == 2
    assert "holiday" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_one_sentence(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "read_run", lambda _: run)
    (tmp_path / "file").write_text("mine")
    assert evaluate.main(["--run", str(run.path), "--output", str(tmp_path / "file")]) == 2
    assert "file: there is a file; give another folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_two_devices_answer_as_one(run, folder):
    dataset = read_dataset(folder, "valid")
    phrases = vocabulary(run.config.data, dataset)
    config = run.config.evaluation.model_copy(update={"score_floor": 0.0})
    found = []
    for devices in (1, 4):  # three pictures: the last row of four only fills up
        tokens = run.tokenizer(phrases)
        loader = make_eval_loader(
            dataset, phrases, tokens, run.config, targets=False, batch_size=devices
        )
        detector = Detector(run.model, config, make_mesh(jax.devices()[:devices]))
        found.append(evaluate_dataset(detector, run.variables, loader, dataset, config))
    assert len(found[0].predictions) == 105
    for a, b in zip(found[0].predictions, found[1].predictions, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
        assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-3)


def test_weights_that_lie_on_the_devices_are_not_copied(run):
    mesh = make_mesh(jax.devices()[:3])
    there = put_replicated({"kernel": np.arange(5.0)}, mesh)
    placed = Detector(run.model, run.config.evaluation, mesh).place(there)
    pointers = lambda x: [s.data.unsafe_buffer_pointer() for s in x.addressable_shards]
    assert pointers(placed["kernel"]) == pointers(there["kernel"])
    few = Detector(run.model, run.config.evaluation, make_mesh(jax.devices()[1:2])).place(there)
    assert pointers(few["kernel"]) == pointers(there["kernel"])[1:2]


def test_no_mask_is_fetched_of_what_is_too_weak():
    """The strongest come first; scores are read before masks."""
    rng = np.random.default_rng(0)
    scores = np.sort(rng.uniform(size=(3, 9)), 1)[:, ::-1]
    masks = rng.normal(size=(3, 9, 2, 2))
    candidates = Candidates(
        scores, rng.uniform(size=(3, 9, 4)), masks, rng.uniform(size=(3, 9)) < 0.7
    )
    for floor in (0.0, 0.3, 0.5, 0.8, 1.0):
        got = fetch(jax.tree.map(jnp.asarray, candidates), floor)
        above = (scores > floor) & candidates.keep
        number = got.scores.shape[1]
        assert not above[:, number:].any()
        assert number <= 2 * max(np.flatnonzero(above.any(0)).max(initial=-1) + 1, 0)
        np.testing.assert_allclose(got.mask_logits, masks[:, :number], rtol=1e-6)


def test_two_processes_know_each_others_answers(tmp_path):
    program = """
import sys, jax
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
from sam3jax.evaluation.ask import _of_all_processes
me = jax.process_index()
own = [{{"score": me / 7}}] * (1 + 5 * me)
asked, rounds = _of_all_processes({{(f"é{{me}}", k) for k in range(3 + me)}}, [own, own[:1]])
assert len(asked) == 7 and ("é1", 3) in asked and ("é0", 0) in asked, asked
assert [[r["score"] for r in found] for found in rounds] == [[0.0] + [1 / 7] * 6, [0.0, 1 / 7]], rounds
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", program.format(port=port)]
    running = [subprocess.Popen([*command, str(k)], env=environment) for k in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]


def test_clicks_are_refused_for_a_run_of_phrases(run, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "read_run", lambda _: run)
    assert evaluate.main(["--run", str(run.path), "--clicks", "3"]) == 2
    assert "--clicks is for runs of clicks" in capsys.readouterr().err


def test_data_without_an_annotation_are_said_to_measure_nothing(run, folder, tmp_path):
    data = tmp_path / "empty"
    (data / "valid").mkdir(parents=True)
    for file in (folder / "valid").iterdir():
        (data / "valid" / file.name).write_bytes(file.read_bytes())
    annotations = data / "valid" / "_annotations.coco.json"
    annotations.write_text(json.dumps({**json.loads(annotations.read_text()), "annotations": []}))
    dataset = read_dataset(data, "valid")
    with pytest.raises(DataError, match="no phrase to ask and nothing to measure"):
        make_eval_loader(dataset, tuple(NAMES), np.zeros((5, 16), np.int32), run.config)
