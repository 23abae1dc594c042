"""Changes of pixels, repeated pictures, and the identity of data."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sam3jax.config import DataConfig, parse_config
from sam3jax.data.augmentation import blurred, draw_change
from sam3jax.data.coco import DataError
from sam3jax.data.folders import read_dataset
from sam3jax.data.loader import make_eval_loader, make_train_loader
from sam3jax.data.prompts import vocabulary
from sam3jax.data.sampling import Order, fingerprint, repeat_factors
from tests.coco_folders import annotation, write

PICTURE = Image.fromarray(np.random.default_rng(0).integers(40, 200, (64, 80, 3), np.uint8))
EVERYTHING = dict(brightness=0.5, contrast=0.5, colour=0.5, grey=0.2, blur=3.0, noise=20.0)


def changed(seed, **settings):
    change = draw_change(np.random.default_rng(seed), DataConfig(**settings))
    return None if change is None else np.asarray(change(PICTURE)).astype(int)


def test_nothing_changes_unless_asked():
    assert changed(0) is None
    assert DataConfig().augment == "off"


@pytest.mark.parametrize("key", EVERYTHING)
def test_each_change_does_what_its_name_says(key):
    before = np.asarray(PICTURE).astype(int)
    luma = np.array([0.299, 0.587, 0.114])
    seen = []
    for seed in range(40):
        after = changed(seed, **{key: 1.0 if key == "grey" else EVERYTHING[key]})
        if after is None:
            continue
        seen.append(after)
        assert after.shape == before.shape
        if key == "brightness":  # one factor for all pixels
            inside = (after > 0) & (after < 255)
            factors = (after / before)[inside]
            assert np.ptp(factors) < 0.05
        elif key == "contrast":  # the mean stays, distances from it are scaled
            assert abs((after @ luma).mean() - (before @ luma).mean()) < 2
        elif key in ("colour", "grey"):  # grey levels stay
            inside = ((after > 0) & (after < 255)).all(-1)
            np.testing.assert_allclose((after @ luma)[inside], (before @ luma)[inside], atol=2)
            if key == "grey":
                assert np.ptp(after, axis=-1).max() <= 1
        elif key == "blur":
            assert after.std() <= before.std()
        else:
            assert abs((after - before).mean()) < 1
            assert (after - before).std() < 21
    assert len(seen) > 5
    if key == "noise":  # up to the largest deviation that is asked for
        assert max((after - before).std() for after in seen) > 15
    assert any((a != seen[0]).any() for a in seen[1:]) or key == "grey"


@pytest.mark.parametrize("radius", [0.2, 0.7, 1.0, 1.5, 3.25, 10.0])
def test_blur_is_pillow_s_box(radius):
    rng = np.random.default_rng(0)
    for size in ((64, 80), (3, 5), (1, 7)):
        picture = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        ours = np.asarray(blurred(picture, radius)).astype(int)
        theirs = np.asarray(picture.filter(ImageFilter.BoxBlur(radius)))
        assert np.abs(ours - theirs).max() <= 2 + (radius > 5)  # weights in 256ths
    white = Image.new("RGB", (9, 9), (255, 255, 255))
    assert blurred(white, radius).getextrema() == ((255, 255),) * 3


def test_switching_one_on_leaves_the_luck_of_the_others():
    both = changed(3, brightness=0.5, noise=0.0, blur=0.0)
    alone = changed(3, brightness=0.5)
    np.testing.assert_array_equal(both, alone)
    np.testing.assert_array_equal(changed(7, **EVERYTHING), changed(7, **EVERYTHING))


def test_the_preset_is_a_start_that_other_keys_override():
    config = parse_config({"data": {"augment": "standard", "flip": False}}).data
    assert not config.flip
    assert config.noise > 0
    assert config.crop < 1


@pytest.fixture
def dataset(tmp_path):
    """10 pictures; red cup in all, dog in one."""
    items = [annotation(k, k, 1, (2, 2, 20, 18)) for k in range(10)]
    items += [annotation(10, 4, 3, (30, 10, 20, 18))]
    return read_dataset(write(tmp_path / "d", items, images=10))


def test_pixels_change_and_targets_do_not(dataset):
    def batch(**data):
        config = parse_config({"model": {"preset": "tiny"}, "batch_size": 5, "data": data})
        phrases = vocabulary(config.data, dataset)
        loader = make_train_loader(dataset, phrases, np.zeros((len(phrases), 16)), config)
        found = next(loader)
        loader.close()
        return found

    plain, loud = batch(), batch(**EVERYTHING)
    np.testing.assert_array_equal(plain.targets.masks, loud.targets.masks)
    np.testing.assert_array_equal(plain.targets.boxes, loud.targets.boxes)
    assert (plain.images != loud.images).any((1, 2, 3)).all()


def test_padding_stays_black(dataset):
    data = {"min_size": 96, "brightness": 0.5, "contrast": 0.5, "noise": 30.0}
    config = parse_config({"model": {"preset": "tiny"}, "batch_size": 10, "data": data})
    loader = make_train_loader(dataset, ("red cup", "dog"), np.zeros((2, 16)), config)
    images = next(loader).images
    loader.close()
    assert (images == 0).all(-1).any()
    edges = np.concatenate([images[:, 0], images[:, -1]], 1)
    assert (edges == 0).all((1, 2)).any()  # some picture has a black row above or below


def test_rare_categories_are_shown_more_often(dataset):
    """LVIS: sqrt(t / f). dog is in 1 of 10: t = .9 shows its picture 3 times, the others once."""
    np.testing.assert_allclose(repeat_factors(dataset, 0.9), [1] * 4 + [3] + [1] * 5)
    order = Order(dataset, seed=0, threshold=0.9)
    epoch = [order(k) for k in range(12)]
    rows = [row for _, row in epoch]
    assert sorted(rows) == [0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 9]
    # Each showing has questions and a transform of its own.
    assert len(set(epoch)) == 12
    assert len({order(k) for k in range(36)}) == 36
    plain = Order(dataset, seed=0)
    assert [plain(k)[0] for k in (0, 9, 10, 25)] == [0, 0, 1, 2]


def test_a_state_of_changed_data_is_refused(dataset):
    def loader(data):
        config = parse_config({"model": {"preset": "tiny"}})
        return make_train_loader(data, ("red cup", "dog"), np.zeros((2, 16)), config)

    state = loader(dataset).get_state()
    loader(dataset).set_state(state)
    loader(dataset).set_state(
        {k: state[k] for k in ("pictures_seen", "pictures", "seed")}
    )  # an old one
    less = tuple(dataclasses.replace(i, annotations=i.annotations[:1]) for i in dataset.images)
    with pytest.raises(
        DataError, match=r"those of the checkpoint \(annotations 11 -> 10, checksum"
    ):
        loader(dataclasses.replace(dataset, images=less)).set_state(state)
    for changed_data in (
        dataclasses.replace(dataset, images=dataset.images[::-1]),
        dataclasses.replace(dataset, categories={**dataset.categories, 1: "blue"}),
    ):
        assert fingerprint(changed_data) != fingerprint(dataset)
        with pytest.raises(DataError, match=r"those of the checkpoint \(checksum"):
            loader(changed_data).set_state(state)


class Loud:
    """A data set whose repr must never be asked for: grain names transforms by their repr."""

    def __init__(self, dataset):
        self.__dict__.update(
            {f.name: getattr(dataset, f.name) for f in dataclasses.fields(dataset)}
        )

    def __repr__(self):
        raise AssertionError("the repr of the whole data set was computed")


def test_batches_do_not_cost_the_repr_of_the_data(dataset):
    config = parse_config({"model": {"preset": "tiny"}, "batch_size": 2})
    args = (Loud(dataset), ("red cup", "dog"), np.zeros((2, 16)), config)
    loader = make_train_loader(*args)
    next(loader)
    loader.close()
    assert next(iter(make_eval_loader(*args, targets=False))).batch.targets.boxes.shape[1] == 0


def test_evaluation_of_many_categories_is_ready_at_once(dataset):
    """20,000 pictures x 2,000 categories are 40 million questions; none is made before it is asked."""
    names = {k: f"thing {k}" for k in range(2000)}
    items = tuple(
        dataclasses.replace(a, category_id=k)
        for k, a in enumerate([dataset.images[0].annotations[0]] * 2000)
    )
    first = dataclasses.replace(dataset.images[0], annotations=items)
    big = dataclasses.replace(
        dataset, images=(first,) + dataset.images[1:] * 2222, categories=names
    )
    config = parse_config({"model": {"preset": "tiny"}, "data": {"max_prompts": 4}})
    phrases = vocabulary(config.data, big)
    start = time.perf_counter()
    loader = make_eval_loader(big, phrases, np.zeros((2000, 16)), config, targets=False)
    assert time.perf_counter() - start < 10
    assert len(loader) == len(big.images) * 500 // 2
    found = next(iter(loader))
    assert found.category_ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
