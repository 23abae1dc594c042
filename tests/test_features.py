"""The store of trunk features: what is there is read, what is missing or of a changed file is named."""

from __future__ import annotations

import pickle

import jax
import numpy as np
import pytest

from sam3jax.config import load_config
from sam3jax.data import features
from sam3jax.data.click_loader import make_click_loader
from sam3jax.data.clip_loader import clip_of, clip_stamps, make_clip_loader, pixels_of
from sam3jax.data.datasets import open_datasets
from sam3jax.data.features import FeatureStore, stamps_of
from sam3jax.data.ledger import DataError
from sam3jax.data.loader import make_train_loader, view_of
from sam3jax.data.prompts import vocabulary
from sam3jax.data.video_sets import open_videos, pictures_of, sampling_of
from tests import video_folders
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
    before = stamps_of(dataset)
    assert len({0, *before}) == 6
    file = dataset.images[2].file
    file.write_bytes(file.read_bytes() + b"\0")
    after = stamps_of(dataset)
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


def numbered(rows: int, folder, shape=(2, 2, 1)) -> FeatureStore:
    """Two views of each row; entry k holds the number k."""
    store = FeatureStore(2, rows, shape, "float32")
    store.open(folder, ABOUT)
    values = np.arange(2.0 * rows).reshape(-1, *(1,) * len(shape))
    store.write(range(2 * rows), values, np.ones(2 * rows))
    return store


def test_views_of_clicks_come_again_and_what_is_clicked_is_drawn_anew(config, tmp_path):
    settings = {"task": "clicks", "data.train": config.data.train, "batch_size": 5, "data.flip": True, "data.crop": 0.6, "clicks.objects": 1}  # fmt: skip
    config = load_config(None, words(settings))
    dataset, _ = open_datasets(config)
    loader = make_click_loader(dataset, config, features=numbered(5, tmp_path))
    plain = make_click_loader(dataset, config)
    masks = {}
    for turn in range(6):
        batch, usual = next(loader), next(plain)
        np.testing.assert_array_equal(batch.luck, usual.luck)
        np.testing.assert_array_equal(batch.images[:, 0, 0, 0], 2 * batch.image_id + turn % 2)
        shown = loader.with_pictures(batch)
        np.testing.assert_array_equal(shown.masks, batch.masks)
        for pixels, mask, row in zip(shown.images, batch.masks, batch.image_id, strict=True):
            np.testing.assert_array_equal(pixels, view_of(dataset, int(row), turn % 2, config))
            masks.setdefault((int(row), turn % 2), set()).add(mask.tobytes())
        if turn < 2:
            np.testing.assert_array_equal(shown.images, usual.images)
            np.testing.assert_array_equal(batch.masks, usual.masks)
    loader.close()
    plain.close()
    assert max(map(len, masks.values())) > 1


def clips_config(root):
    settings = {
        "task": "clips", "data.train": root, "clips.frames": 2, "batch_size": 2, "clips.max_stride": 3,
        "data.flip": True, "data.crop": 0.6, "data.augment": "standard",
    }  # fmt: skip
    return load_config(None, words(settings))


def test_views_of_videos_are_clips_that_come_again(tmp_path):
    config = clips_config(video_folders.write_ytvis(tmp_path / "videos"))
    videos, _, _ = open_videos(config)
    sampling = sampling_of(config)
    phrases = vocabulary(config.data, pictures_of(videos))
    rest = phrases, np.zeros((len(phrases), 8), np.int32), config, sampling
    store = numbered(len(videos.videos), tmp_path, (2, 2, 2, 1))
    loader, plain = make_clip_loader(videos, *rest, features=store), make_clip_loader(videos, *rest)
    assert len(videos.videos) == 1
    for turn in range(4):
        batch, usual = next(loader), next(plain)
        assert set(batch.images[..., 0].ravel().tolist()) == {turn % 2}
        shown = loader.with_pictures(batch)
        np.testing.assert_array_equal(shown.targets.masks, batch.targets.masks)
        clip = clip_of(videos, 0, turn % 2, config, sampling)
        np.testing.assert_array_equal(shown.images, pixels_of(*clip))
        np.testing.assert_array_equal(batch.frame, clip[0].frames)
        if turn < 2:
            for ours, theirs in zip(jax.tree.leaves(shown), jax.tree.leaves(usual), strict=True):
                np.testing.assert_array_equal(ours, theirs)
    loader.close()
    plain.close()


def test_stamps_of_videos_follow_the_frames_that_are_shown(tmp_path):
    config = clips_config(video_folders.write_ytvis(tmp_path))
    videos, _, _ = open_videos(config)
    sampling = sampling_of(config)
    (before,) = clip_stamps(videos, 1, config, sampling)
    shown = clip_of(videos, 0, 0, config, sampling)[0].frames
    for number, file in enumerate(videos.videos[0].frames.files):
        whole = file.read_bytes()
        file.write_bytes(whole + b"\0")
        (after,) = clip_stamps(videos, 1, config, sampling)
        assert (after != before) == (number in shown)
        file.write_bytes(whole)
    assert clip_stamps(videos, 1, config, sampling) == [before]
    assert clip_stamps(videos, 2, config, sampling) != [before]
