"""Batches: static shapes, the same for every worker, process and resumed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sam3jax.config import ConfigError, parse_config
from sam3jax.data.coco import DataError, decode_mask
from sam3jax.data.datasets import open_datasets
from sam3jax.data.folders import read_dataset
from sam3jax.data.loader import make_eval_loader, make_train_loader
from sam3jax.data.pictures import read_picture
from sam3jax.data.prompts import evaluation_shapes, training_shapes, vocabulary
from sam3jax.data.transforms import move_mask, move_picture, square, unpack_mask
from tests.coco_folders import BOTTLES, annotation, write

NAMES = ("things", "red cup", "blue cup", "dog", "cat", "owl")


def config_of(train=None, **sections):
    data = {"train": str(train) if train else None, **sections.pop("data", {})}
    return parse_config({"model": {"preset": "tiny"}, "data": data, **sections})


@pytest.fixture
def dataset(tmp_path):
    """7 pictures of one size, 1 empty, 5 categories, up to 4 instances of a category."""
    rng = np.random.default_rng(0)
    items = []
    for image in range(7):
        for _ in range(0 if image == 3 else 5):
            x, y, w, h = *rng.integers(0, (90, 60)), *rng.integers(20, 40, 2)
            box = tuple(int(v) for v in (x, y, w, h))
            category = int(rng.integers(1, 6))
            items.append(annotation(len(items), image, category, box))
    items[4]["segmentation"] = []
    return read_dataset(write(tmp_path / "d", items, images=7, categories=NAMES, size=(130, 100)))


def loader(dataset, **sections):
    config = config_of(**sections)
    phrases = vocabulary(config.data, dataset)
    tokens = np.arange(len(phrases) * 16).reshape(-1, 16)
    return make_train_loader(dataset, phrases, tokens, config), phrases, config


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


AUGMENTED = {
    "flip": True,
    "turn": True,
    "crop": 0.6,
    "min_size": 96,
    "exemplars": 2,
    "negatives": 2,
}


def test_a_batch_holds_what_its_pictures_show(dataset):
    batches, phrases, config = loader(dataset, batch_size=3)
    shapes = training_shapes(dataset, config.data)
    for batch in take(batches, 7):
        assert batch.images.shape == (3, 168, 168, 3)
        assert batch.images.dtype == np.uint8
        assert batch.targets.masks.shape == (3, shapes.instances, 168, 21)
        assert batch.targets.index.shape == (3, shapes.prompts, shapes.targets)
        assert batch.image_valid.all()
        for i, row in enumerate(batch.image_id):
            record = dataset.images[row]
            t = square(record.width, record.height, 168)
            pixels = move_picture(t, read_picture(record.file, 130, 100))
            np.testing.assert_array_equal(batch.images[i], pixels)
            for p in np.flatnonzero(batch.prompts.valid[i]):
                phrase = phrases[batch.prompts.text_id[i, p]]
                wanted = [
                    a for a in record.annotations if dataset.categories[a.category_id] == phrase
                ]
                count = batch.targets.num_targets[i, p]
                assert count == len(wanted)
                index = batch.targets.index[i, p]
                assert (index[count:] == shapes.instances).all()
                for m, a in zip(index[:count], wanted):
                    x, y, w, h = a.bbox
                    box = [(x + w / 2) / 130, (y + h / 2) / 100, w / 130, h / 100]
                    np.testing.assert_allclose(batch.targets.boxes[i, m], box, rtol=1e-5)
                    mask = unpack_mask(batch.targets.masks[i, m], 168)
                    assert batch.targets.mask_valid[i, m] == (a.segmentation is not None)
                    np.testing.assert_array_equal(mask, move_mask(t, decode_mask(a, 100, 130)))


def test_every_epoch_shows_every_picture_once_in_another_order(dataset):
    batches, _, _ = loader(dataset, batch_size=7)
    orders = [tuple(batch.image_id) for batch in take(batches, 4)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(orders)) == 4


def test_the_same_seed_gives_the_same_batches_and_another_one_others(dataset):
    a, b, c = (take(loader(dataset, batch_size=3, seed=s, data=AUGMENTED)[0], 4) for s in (0, 0, 1))
    assert_same(a, b)
    with pytest.raises(AssertionError):
        assert_same(a, c)


def test_augmented_targets_stay_consistent(dataset):
    batches, _, _ = loader(dataset, batch_size=5, data=AUGMENTED | {"visual_probability": 0.3})
    shown = 0
    for batch in take(batches, 6):
        targets, prompts = batch.targets, batch.prompts
        M = targets.boxes.shape[1]
        assert ((targets.index < M).sum(-1) == targets.num_targets).all()
        assert (targets.boxes[..., 2:].prod(-1) > 0).sum() >= targets.mask_valid.sum()
        assert (targets.masks[~targets.mask_valid] == 0).all()
        assert (targets.num_targets[~prompts.valid] == 0).all()
        # Valid exemplars first, each one a target of its own prompt.
        assert (np.diff(prompts.box_valid.astype(int), axis=-1) <= 0).all()
        for i, p, g in np.argwhere(prompts.box_valid):
            own = targets.boxes[i, targets.index[i, p, : targets.num_targets[i, p]]]
            assert (own == prompts.boxes[i, p, g]).all(-1).any()
            shown += 1
        assert (prompts.box_labels == prompts.box_valid).all()
    assert shown > 10


def test_a_resumed_iterator_continues_exactly(dataset):
    settings = dict(batch_size=3, data=AUGMENTED)
    undisturbed = take(loader(dataset, **settings)[0], 9)
    first, _, _ = loader(dataset, **settings)
    assert_same(take(first, 4), undisturbed[:4])
    state = json.loads(json.dumps(first.get_state()))
    second, _, _ = loader(dataset, **settings)
    second.set_state(state)
    assert_same(take(second, 5), undisturbed[4:])
    next(first)
    first.set_state(state)  # also back, on an iterator in use
    assert_same(take(first, 5), undisturbed[4:])
    assert first.get_state() == second.get_state()


def test_a_state_of_other_data_is_refused(dataset):
    other, _, _ = loader(dataset, seed=5)
    with pytest.raises(DataError, match=r"cannot resume: .*seed 5 -> 0"):
        loader(dataset)[0].set_state(other.get_state())


def test_processes_share_each_batch_in_order(dataset):
    config = config_of(batch_size=6, evaluation={"batch_size": 4}, data={"max_prompts": 2})
    phrases = vocabulary(config.data, dataset)
    tokens = np.zeros((len(phrases), 16))
    for make in (make_train_loader, make_eval_loader):
        whole = make(dataset, phrases, tokens, config)
        parts = [
            make(dataset, phrases, tokens, config, process_index=k, process_count=2)
            for k in range(2)
        ]
        for one, *two in zip(range(5), whole, *parts):
            joined = [
                np.concatenate([getattr(b, "batch", b).image_id for b in two[1:]]),
                np.concatenate([getattr(b, "batch", b).prompts.text_id for b in two[1:]]),
            ]
            want = getattr(two[0], "batch", two[0])
            assert_same(joined, [want.image_id, want.prompts.text_id])
            assert one < 5
    with pytest.raises(DataError, match="batch_size 6 does not divide among 4 processes"):
        make_train_loader(dataset, phrases, tokens, config, process_count=4)


def test_evaluation_asks_everything_once_and_fills_up_the_last_batch(dataset):
    config = config_of(evaluation={"batch_size": 4}, data={"max_prompts": 3})
    phrases = vocabulary(config.data, dataset)
    batches = make_eval_loader(dataset, phrases, np.zeros((len(phrases), 16)), config)
    assert evaluation_shapes(dataset, config.data).prompts == 3
    for _ in range(2):  # from the start each time
        found = list(batches)
        assert len(found) == len(batches) == 4  # 7 pictures x 2 rows in batches of 4
        asked = []
        for e in found:
            assert e.batch.images.shape == (4, 168, 168, 3)
            assert (e.batch.prompts.valid == (e.category_ids >= 0)).all()
            assert not e.batch.prompts.valid[~e.batch.image_valid].any()
            assert (e.batch.targets.num_targets[~e.batch.image_valid] == 0).all()
            for i, p in np.argwhere(e.batch.prompts.valid):
                category = e.category_ids[i, p]
                assert phrases[e.batch.prompts.text_id[i, p]] == dataset.categories[category]
                asked.append((e.batch.image_id[i], category))
        assert sorted(asked) == [(r, c) for r in range(7) for c in range(1, 6)]
        assert sum((~e.batch.image_valid).sum() for e in found) == 2


def test_evaluation_without_targets_differs_in_targets_only(dataset):
    config = config_of(evaluation={"batch_size": 5})
    phrases = vocabulary(config.data, dataset)
    args = (dataset, phrases, np.zeros((len(phrases), 16)), config)
    full, bare = list(make_eval_loader(*args)), list(make_eval_loader(*args, targets=False))
    assert_same([e.batch.prompts for e in full], [e.batch.prompts for e in bare])
    assert_same([e.batch.images for e in full], [e.batch.images for e in bare])
    assert sum(e.batch.targets.num_targets.sum() for e in bare) == 0
    total = sum(len(i.annotations) for i in dataset.images)
    assert sum(e.batch.targets.num_targets.sum() for e in full) == total


def test_box_only_training_draws_no_masks(dataset):
    batches, _, _ = loader(dataset, batch_size=3, loss={"masks": False})
    batch = next(batches)
    assert batch.targets.num_targets.any()
    assert not batch.targets.mask_valid.any()


def test_settings_that_could_not_act_are_refused(dataset):
    with pytest.raises(ConfigError, match=r"data\.min_size: 200 is larger than .* 168"):
        loader(dataset, data={"min_size": 200})
    with pytest.raises(ConfigError, match=r"set data\.exemplars=1"):
        loader(dataset, data={"visual_probability": 0.5})


def test_a_picture_that_breaks_later_is_named(dataset):
    batches, _, _ = loader(dataset, batch_size=7)
    file = dataset.images[2].file
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match=r"2\.png cannot be read"):
        next(batches)


def test_bottles_load_with_their_real_masks():
    if not BOTTLES.is_dir():
        pytest.skip("shared/data/bottles is not here")
    config = config_of(BOTTLES, batch_size=7)
    train, valid = open_datasets(config)
    phrases = vocabulary(config.data, train, valid)
    assert phrases == ("glass bottle", "plastic bottle")
    batches = make_train_loader(train, phrases, np.zeros((2, 16)), config)
    for batch in take(batches, 4):
        for i, row in enumerate(batch.image_id):
            masks = unpack_mask(batch.targets.masks[i], 168)
            assert batch.targets.mask_valid[i].sum() == len(train.images[row].annotations)
            for m in np.flatnonzero(batch.targets.mask_valid[i]):
                ys, xs = np.nonzero(masks[m])
                found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                x, y, w, h = batch.targets.boxes[i, m] * 168
                box = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                assert np.abs(np.subtract(found, box)).max() <= 1.0


WORKERS = """
import sys
import jax, numpy as np
from pathlib import Path
from tests.test_loader import loader, take, assert_same, AUGMENTED
from sam3jax.data.folders import read_dataset

if __name__ == "__main__":
    dataset = read_dataset(Path(sys.argv[1]))
    settings = dict(batch_size=3)
    alone = take(loader(dataset, **settings, data=AUGMENTED)[0], 6)
    two = loader(dataset, **settings, data=AUGMENTED | {"workers": 2})[0]
    assert_same(take(two, 4), alone[:4])
    state = two.get_state()
    two.close()
    three = loader(dataset, **settings, data=AUGMENTED | {"workers": 1})[0]
    three.set_state(state)
    assert_same(take(three, 2), alone[4:])
    three.close()
    file = dataset.images[2].file
    file.write_bytes(file.read_bytes()[:300])
    try:
        take(loader(dataset, batch_size=7, data={"workers": 1})[0], 1)
    except ValueError as error:
        print("named" if "2.png cannot be read" in str(error) else error, type(error).__name__)
"""


def test_workers_change_nothing_and_leave_quietly(dataset, tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(script), str(dataset.images[0].file.parent)],
        env={"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["named", "DataError"], done.stdout
    assert "Exception ignored" not in done.stderr


def test_the_semantic_head_alone_reads_masks_too(dataset):
    batches, _, _ = loader(dataset, loss={"masks": False, "semantic": True})
    assert next(batches).targets.mask_valid.any()
    batches, _, _ = loader(dataset, loss={"masks": False})
    assert not next(batches).targets.mask_valid.any()
