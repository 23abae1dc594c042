"""Batches of objects to click on: static shapes, resumable, the same for any number of processes."""

import jax
import numpy as np
import pytest

from sam3jax import doctor
from sam3jax.config import parse_config
from sam3jax.data.click_loader import clickable, make_click_eval_loader, make_click_loader
from sam3jax.data.coco import decode_mask
from sam3jax.data.folders import read_dataset
from sam3jax.data.pictures import DataError
from sam3jax.data.transforms import draw_transform, move_mask, move_points, square, unpack_mask
from tests.coco_folders import annotation, write

SIZES = (0, 1, 4, 2, 5)  # objects of each picture


def config_of(**sections):
    model = dict(preset="tiny", image_size=84, window_size=3, pretrain_image_size=42)
    return parse_config({"model": model, **sections})


@pytest.fixture
def dataset(tmp_path):
    items = [
        annotation(len(SIZES) * image + k, image, 1 + k % 3, (3 + 9 * k, 4 + 5 * k, 8 + k, 9))
        for image, count in enumerate(SIZES)
        for k in range(count)
    ]
    # The first object of the last picture again, under another category; a box; a crowd.
    twice = dict(next(a for a in items if a["image_id"] == 4), id=900, category_id=3)
    items += [twice, annotation(901, 3, 1, (1, 1, 5, 5), segmentation=[])]
    crowd = {"counts": [0, 2400], "size": [40, 60]}
    items += [annotation(902, 3, 1, (0, 0, 60, 40), segmentation=crowd, iscrowd=1)]
    return read_dataset(write(tmp_path / "d", items, images=len(SIZES)))


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_objects_are_what_has_a_mask_once(dataset):
    assert [len(clickable(record)) for record in dataset.images] == list(SIZES)


def test_evaluation_shows_every_object_once(dataset):
    config = config_of(clicks={"objects": 3})
    loader = make_click_eval_loader(dataset, config, batch_size=3)
    batches = list(loader)
    # Pictures of 1, 4, 2 and 5 objects, three at a time: 1 + 2 + 1 + 2 rows, filled up to six.
    assert len(batches) == len(loader) == 2
    seen = []
    for batch in batches:
        assert batch.images.shape == (3, 84, 84, 3)
        assert batch.masks.shape == (3, 3, 84, 11)
        for i in np.flatnonzero(batch.image_valid):
            for k in np.flatnonzero(batch.valid[i]):
                seen.append((int(batch.image_id[i]), unpack_mask(batch.masks[i, k], 84)))
    want = [
        (row, move_mask(square(60, 40, 84), decode_mask(a, 40, 60)))
        for row, record in enumerate(dataset.images)
        for a in clickable(record)
    ]
    assert [row for row, _ in seen] == [row for row, _ in want]
    for (_, got), (_, wanted) in zip(seen, want, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_training_draws_objects_anew_each_epoch_and_leaves_out_empty_pictures(dataset):
    config = config_of(batch_size=2, clicks={"objects": 2})
    batches = take(make_click_loader(dataset, config), 20)
    pictures = np.concatenate([b.image_id for b in batches])
    assert set(pictures) == {1, 2, 3, 4}
    masks = {int(i): set() for i in (1, 2, 3, 4)}
    for batch in batches:
        for i, row in enumerate(batch.image_id):
            assert batch.valid[i].sum() == min(2, SIZES[row])
            masks[int(row)] |= {m.tobytes() for m in batch.masks[i][batch.valid[i]]}
    assert [len(masks[row]) for row in (1, 2, 3, 4)] == [1, 4, 2, 5]


def test_two_processes_see_one_batch_and_resume_is_exact(dataset):
    config = config_of(batch_size=4, data={"flip": True, "crop": 0.7, "turn": True})
    whole = take(make_click_loader(dataset, config), 5)
    halves = [
        take(make_click_loader(dataset, config, process_index=p, process_count=2), 5)
        for p in (0, 1)
    ]
    for a, b, c in zip(whole, *halves, strict=True):
        assert_same(a, jax.tree.map(lambda x, y: np.concatenate([x, y]), b, c))
    loader = make_click_loader(dataset, config)
    take(loader, 2)
    again = make_click_loader(dataset, config)
    again.set_state(loader.get_state())
    assert_same(next(again), whole[2])


def test_boxes_alone_are_nothing_to_click_on(tmp_path):
    boxes = [annotation(0, 0, 1, (3, 4, 9, 9), segmentation=[])]
    dataset = read_dataset(write(tmp_path / "d", boxes, images=1))
    with pytest.raises(DataError, match=r"nothing to click on: .* boxes are not enough"):
        make_click_loader(dataset, config_of())


def test_stored_clicks_follow_their_pixel_through_every_transform(tmp_path):
    """A mask of one pixel and a click on it end in the same place."""
    config = config_of(data={"train": "d", "flip": True, "turn": True, "min_size": 60}).data
    for seed in range(12):
        rng = np.random.default_rng(seed)
        transform = draw_transform(rng, 60, 40, 84, config)
        at = rng.integers((3, 3), (57, 37))
        mask = np.zeros((40, 60), bool)
        mask[at[1] - 3 : at[1] + 4, at[0] - 3 : at[0] + 4] = True
        points, seen = move_points(transform, at[None].astype(float))
        rows, columns = np.nonzero(move_mask(transform, mask))
        if seen[0] and len(rows):
            whole = rows.min() > 0 and columns.min() > 0 and max(rows.max(), columns.max()) < 83
            middle = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
            assert not whole or np.abs(points[0] - middle).max() <= 1.0


@pytest.mark.parametrize(
    ("fields", "kept", "words"),
    [
        ({"points": [[5, 6], [1.5, 2]], "labels": [1, 0]}, ((5, 6, 1), (1.5, 2, 0)), ""),
        ({"points": [[5, 6]]}, ((5, 6, 1),), ""),
        ({"points": [5, 6], "labels": 0}, ((5, 6, 0),), ""),
        ({"points": [[5, 6], [60, 6]], "labels": [1, 1]}, ((5, 6, 1),), "outside the picture"),
        ({"points": [[5, 6]], "labels": [7]}, (), "neither 1"),
        ({"points": [[5, 6]], "labels": [1, 0]}, (), "not as many"),
        ({"points": [[5, float("nan")]]}, (), "no numbers"),
        ({"points": "5 and 6"}, (), "no list"),
        ({"points": [5, 6, 7, 8]}, (), "no list"),
        ({"points": "[[5, 6]]", "labels": "[1]"}, ((5, 6, 1),), ""),
        ({"points": [{"x": 5, "y": 6}], "labels": [True]}, ((5, 6, 1),), ""),
        ({"points": [[[5, 6], [4, 5]]], "labels": [[1, 0]]}, ((5, 6, 1), (4, 5, 0)), ""),
        ({"points": [[5, 6], [7, 8]], "labels": "negative"}, ((5, 6, 0), (7, 8, 0)), ""),
        ({"points": [[5, 6], [7, 8]], "labels": [1, -1]}, ((5, 6, 1),), "neither 1"),
        ({"point_coords": [[5, 6]], "point_labels": [0]}, ((5, 6, 0),), ""),
        ({"points": [[30, 20]]}, ((30, 20, 1),), "outside the box of its object (kept)"),
        ({}, (), ""),
    ],
)
def test_stored_clicks_as_people_write_them(tmp_path, fields, kept, words):
    items = [{**annotation(1, 0, 1, (3, 4, 8, 9)), **fields}]
    dataset = read_dataset(write(tmp_path / "d", items, images=1))
    (found,) = clickable(dataset.images[0])
    assert found.clicks == kept
    assert any(words in problem for problem in dataset.problems) or not words


def test_stored_clicks_reach_the_batch_and_shares_are_refused(tmp_path):
    items = [annotation(k, 0, 1, (3 + 20 * k, 4, 8, 9)) for k in range(2)]
    items[1] |= {"points": [[30, 20], [2, 3]], "labels": [1, 0]}
    config = config_of(clicks={"objects": 2}, data={"train": "d"}, batch_size=1)
    batch = next(make_click_loader(read_dataset(write(tmp_path / "d", items, images=1)), config))
    row = int(np.flatnonzero((batch.labels[0] >= 0).any(1))[0])
    np.testing.assert_array_equal(batch.labels[0, row], [1, 0])
    np.testing.assert_array_equal(batch.labels[0, 1 - row], [-2, -2])
    np.testing.assert_allclose(batch.points[0, row, 0], [30.5 * 84 / 60 - 0.5, 20.5 * 84 / 40 - 0.5], rtol=1e-6)  # fmt: skip
    items[1] |= {"points": [[0.3, 0.2]], "labels": [1]}
    with pytest.raises(DataError, match="shares of the picture"):
        make_click_loader(read_dataset(write(tmp_path / "e", items, images=1)), config)


def test_clicks_beside_all_their_objects_are_refused_by_doctor_and_training(tmp_path, capsys):
    """y before x: every click lies in the picture, and none in its object."""
    items = [
        annotation(k, k % 3, 1, (3 + 5 * k, 2, 4, 9), points=[[6, 5 + 5 * k]]) for k in range(7)
    ]
    folder = write(tmp_path / "d", items[1:])
    config = config_of(batch_size=1)
    with pytest.raises(DataError, match=r"6 of 6 stored clicks .* is y before x"):
        make_click_loader(read_dataset(folder), config)
    words = [str(folder), "--output", str(tmp_path / "o")]
    assert doctor.main([*words, "task=clicks"]) == 2
    assert "is y before x" in capsys.readouterr().err
    assert doctor.main(words) == 0
    boxes = [annotation(k, k, 1, (3, 2, 4, 9), segmentation=[]) for k in range(3)]
    write(tmp_path / "b", boxes)
    assert doctor.main([str(tmp_path / "b"), "--output", str(tmp_path / "o"), "task=clicks"]) == 2
    assert "nothing to click on" in capsys.readouterr().err
