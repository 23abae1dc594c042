"""The tiny model inside the package: its size and record, how it is found, and that it knows its shapes."""

import json

import ml_dtypes
import numpy as np
import pytest

from sam3jax.config import ConfigError, load_config, parse_config
from sam3jax.data.loader import make_eval_loader
from sam3jax.data.prompts import tokenize, vocabulary
from sam3jax.data.shapes import shapes_dataset
from sam3jax.evaluation.ask import evaluate_dataset
from sam3jax.files import FileError
from sam3jax.inference.detector import Detector
from sam3jax.model import Sam3
from sam3jax.predict import Predictor
from sam3jax.weights.base import open_base
from sam3jax.weights.model_folder import SHIPPED, is_model_folder, locate, open_model_folder
from sam3jax.weights.names import PARTS, parts_of

pytestmark = pytest.mark.slow

NAME = f"{SHIPPED}tiny_shapes"


def test_it_is_small_narrow_and_says_how_it_was_trained():
    folder = open_model_folder(NAME)
    assert sum(f.stat().st_size for f in locate(NAME).iterdir()) <= 5_000_000
    assert {np.dtype(t.dtype) for t in folder.leaves.values()} == {np.dtype(ml_dtypes.bfloat16)}
    first, *later = folder.source["trained"]
    runs = [run for run in later if run["made by"] == "python -m sam3jax.train"]
    heads = later[len(runs) :]  # last, the trunk as it is
    assert {part["made by"] for part in heads} == {"python -m scripts.pretrain_clicks"}
    assert heads[-1]["mIoU@1"] > 0.84
    assert parts_of(path[0] for path in folder.leaves) == tuple(PARTS)
    assert first["made by"] == "python -m scripts.pretrain_shapes"
    assert first["steps"] > 1000
    assert all(run["settings"]["data"]["shapes_concepts"] == "seen" for run in runs)
    assert runs[-1]["validation"]["segm/AP50"] > 0.5


def test_it_finds_and_masks_what_it_was_taught_on_pictures_it_has_not_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("SAM3JAX_CACHE", str(tmp_path))
    config = parse_config(
        {
            "init": NAME,
            "data": {"train": "shapes", "shapes_concepts": "seen", "shapes_valid": 12},
            "evaluation": {"batch_size": 4},
        }
    )
    base = open_base(config)
    data = shapes_dataset("test", config.data)
    phrases = vocabulary(config.data, data)
    loader = make_eval_loader(
        data, phrases, tokenize(phrases, base.tokenizer), base.config, targets=False
    )
    detector = Detector(Sam3(base.config.model), config.evaluation)
    found = evaluate_dataset(
        detector, {"params": base.load().params}, loader, data, config.evaluation
    )
    assert found.metrics["segm/AP50"] > 0.5
    assert found.metrics["false_alarms"] < 0.1
    # And through the face of notebooks, with the same weights.
    predictor = Predictor.from_model_folder(NAME)
    record = next(r for r in data.images if r.annotations)
    predictor.set_image(record.file)
    phrase = data.categories[record.annotations[0].category_id]
    assert len(predictor.predict(phrase, threshold=0.0).scores)


def test_a_name_that_is_not_shipped_is_an_error_that_names_what_is():
    with pytest.raises(FileError, match=r"shipped:nothing is not shipped.*shipped:tiny_shapes"):
        open_model_folder("shipped:nothing")
    assert is_model_folder(NAME)
    assert json.loads((locate(NAME) / "config.json").read_text())["version"] == 1


@pytest.mark.parametrize("words", [["model.image_size=84"], ["model.image_size=252", "model.preset=tiny"]])  # fmt: skip
def test_the_picture_size_is_checked_against_the_window_of_the_weights(words):
    found = open_base(load_config(None, ["init=shipped:tiny_shapes", *words])).config.model
    assert found.window_size == 6
    assert f"model.image_size={found.image_size}" in words
    wrong = load_config(None, ["init=shipped:tiny_shapes", "model.image_size=336", "model.patch_size=7"])  # fmt: skip
    with pytest.raises(ConfigError, match="patch_size 14"):
        open_base(wrong)
    with pytest.raises(ConfigError, match="use a multiple of 84"):
        open_base(load_config(None, ["init=shipped:tiny_shapes", "model.image_size=1000"]))
