"""The demo from a base of a few steps: what it writes, not how good it is."""

import json

import pytest
from PIL import Image

from sam3jax import demo, train
from sam3jax.data.folders import read_dataset
from tests.batches import DECODER, SMALL_MODEL
from tests.coco_folders import annotation, write

pytestmark = pytest.mark.slow

PICTURES = {"data.shapes_train": 8, "data.shapes_valid": 4, "data.shapes_size": 96}
SHORT = {"steps": 2, "batch_size": 4, "eval_every": 0, "evaluation.panels": 0, **PICTURES}


def overrides(**settings) -> list[str]:
    return [f"{k.replace('__', '.')}={v}" for k, v in settings.items()]


@pytest.fixture
def few_pictures(one_device, monkeypatch, tmp_path):
    monkeypatch.setenv("SAM3JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "PICTURES", {demo.NEW: 4, demo.OLD: 3})


def test_the_demo_starts_from_a_base_and_writes_its_table_and_picture(
    few_pictures, tmp_path, capsys
):
    base, run = tmp_path / "base", tmp_path / "demo"
    model = {f"model.{k}": v for k, v in {**SMALL_MODEL, "decoder_layers": 1}.items()}
    settings = {**model, **SHORT, "output": base, "init": "null"}
    assert train.main(["--config", "configs/shapes_base.yaml", *overrides(**settings)]) == 0
    settings = {**SHORT, "init": base, "output": run, "lora.targets": list(DECODER)}
    assert demo.main(overrides(**settings)) == 0
    found = json.loads((run / "demo.json").read_text())
    assert list(found["results"]) == [
        "new concepts, base", "new concepts, tuned", "phrases permuted, tuned",
        "old concepts, base", "old concepts, tuned",
    ]  # fmt: skip
    for row in found["results"].values():
        assert set(row) == {"AP50", "recall", "silence"}
        assert all(0 <= value <= 1 for value in row.values())
    assert Image.open(run / "demo.png").width > 3 * 96
    said = capsys.readouterr().out
    assert "The demo takes" in said
    assert "phrases permuted, tuned" in said


def test_a_demo_without_its_base_says_so(few_pictures, tmp_path, capsys):
    assert demo.main([f"init={tmp_path / 'nothing'}", f"output={tmp_path / 'run'}"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_permuted_phrases_ask_every_concept_by_another_name(tmp_path):
    items = [annotation(k, 0, k + 1, (2 + 9 * k, 2, 8, 9)) for k in range(3)]
    names = ("things", "cup", "dog", "owl")
    data = read_dataset(write(tmp_path / "d", items, images=1, categories=names))
    moved = demo.permuted(data)
    assert all(moved.categories[i] != name for i, name in data.categories.items())
    assert sorted(moved.categories.values()) == sorted(data.categories.values())
    assert moved.images is data.images
