"""The store of trunk features: what is there is read, what is missing or of a changed file is named."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from sam3jax.config import load_config
from sam3jax.data import features
from sam3jax.data.datasets import open_datasets
from sam3jax.data.features import FeatureStore, stamps_of
from sam3jax.data.ledger import DataError
from sam3jax.data.loader import make_train_loader, view_of
from sam3jax.data.prompts import vocabulary
from tests.coco_folders import write_small_shapes
from tests.trainings import words

SHAPE = (3, 2, 5)
ABOUT = {"weights": 1}


def opened(folder, dtype="bfloat16", **about) -> FeatureStore:
    store = FeatureStore(2, 4, SHAPE, dtype)
    store.open(folder, {**ABOUT, **about})
    return store


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_and_the_rest_is_missing(tmp_path, dtype):
    store, stamps = opened(tmp_path, dtype), [5, 6, 7, 8]
    assert store.missing(stamps) == list(range(8))
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, *SHAPE)).astype(dtype)
    store.write([0, 3, 6], values, [5, 6, 8])
    assert store.missing(stamps) == [1, 2, 4, 5, 7]
    again = pickle.loads(pickle.dumps(opened(tmp_path, dtype)))
    assert again.missing(stamps) == [1, 2, 4, 5, 7]
    for k, (row, view) in enumerate([(0, 0), (1, 1), (3, 0)]):
        np.testing.assert_array_equal(again.read(row, view), values[k])
        assert again.read(row, view).dtype == values.dtype
    # Another file of the picture, other weights.
    assert store.missing([5, 6, 7, 9]) == [1, 2, 4, 5, 6, 7]
    assert opened(tmp_path, dtype, weights=2).missing(stamps) == list(range(8))


def test_a_store_that_is_not_opened_has_the_shape_alone():
    assert FeatureStore(1, 1, SHAPE, "bfloat16").read(0, 0).shape == SHAPE


def test_a_disk_that_is_too_small_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_FREE", 1e18)
    with pytest.raises(DataError, match="SAM3JAX_CACHE"):
        opened(tmp_path)
    assert not list(tmp_path.rglob("features.bin"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = write_small_shapes(tmp_path_factory.mktemp("data"), train=5, valid=2)
    settings = {"data.train": data, "batch_size": 5, "data.flip": True, "data.crop": 0.6, "data.augment": "standard"}  # fmt: skip
    return load_config(None, words(settings))


def test_stamps_follow_the_content_of_files(config):
    dataset, _ = open_datasets(config)
    before = stamps_of(dataset, 1)
    assert len({0, *before}) == 6
    file = dataset.images[2].file
    file.write_bytes(file.read_bytes() + b"\0")
    after = stamps_of(dataset, 1)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, True, True]


def test_views_come_again_and_are_those_that_are_stored(config, tmp_path):
    dataset, _ = open_datasets(config)
    phrases = vocabulary(config.data, dataset)
    tokens = np.zeros((len(phrases), 8), np.int32)
    store = FeatureStore(2, 5, (2, 2, 1), "float32")
    store.open(tmp_path, ABOUT)
    # Entry k holds the number k.
    store.write(range(10), np.arange(10.0).reshape(10, 1, 1, 1), np.ones(10))
    loader = make_train_loader(dataset, phrases, tokens, config, features=store)
    plain = make_train_loader(dataset, phrases, tokens, config)
    for turn in range(4):
        batch, usual = next(loader), next(plain)
        np.testing.assert_array_equal(batch.image_id, usual.image_id)
        np.testing.assert_array_equal(batch.prompts.text_id, usual.prompts.text_id)
        entries = batch.images[:, 0, 0, 0]
        np.testing.assert_array_equal(entries, 2 * batch.image_id + turn % 2)
        shown = loader.with_pictures(batch)
        np.testing.assert_array_equal(shown.targets.boxes, batch.targets.boxes)
        for pixels, row in zip(shown.images, batch.image_id, strict=True):
            np.testing.assert_array_equal(pixels, view_of(dataset, int(row), turn % 2, config))
        if turn < 2:
            np.testing.assert_array_equal(shown.images, usual.images)
    loader.close()
    plain.close()
    assert loader.get_state()["views"] == 2
