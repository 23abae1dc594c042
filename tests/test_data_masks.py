"""Segmentations in every form that exporters write; pycocotools is the judge of each."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle_codec

from sam3jax import doctor
from sam3jax.config import parse_config
from sam3jax.data.coco import DataError, decode_mask
from sam3jax.data.datasets import open_datasets
from sam3jax.data.folders import read_dataset
from sam3jax.data.ledger import Ledger
from sam3jax.data.segmentations import decode_segmentation, read_segmentation
from tests.coco_folders import annotation, polygon, write

H, W = 40, 60
SQUARE = [10, 8, 30, 8, 30, 24, 10, 24]
PAIRS = [[10, 8], [30, 8], [30, 24], [10, 24]]


def true_mask(*polygons):
    return rle_codec.decode(
        rle_codec.merge(rle_codec.frPyObjects([[float(v) for v in p] for p in polygons], H, W))
    ).astype(bool)


def rle(mask):
    found = rle_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [H, W], "counts": found["counts"].decode()}


def runs(mask):
    flat = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


MASK = true_mask(SQUARE)
FORMS = {
    "polygons": [SQUARE],
    "bare": SQUARE,
    "pairs": PAIRS,
    "polygons of pairs": [PAIRS],
    "too deep": [[SQUARE]],
    "much too deep": [[[PAIRS]]],
    "dicts": [{"x": x, "y": y} for x, y in PAIRS],
    "lists of dicts": [[{"x": x, "y": y} for x, y in PAIRS]],
    "columns": {"x": SQUARE[0::2], "y": SQUARE[1::2]},
    "via": {"all_points_x": SQUARE[0::2], "all_points_y": SQUARE[1::2]},
    "null first": [None, SQUARE],
    "null last": [SQUARE, None],
    "null among pairs": [None, *PAIRS],
    "text": json.dumps([SQUARE]),
    "text of pairs": json.dumps(PAIRS),
    "text of text": json.dumps(json.dumps([SQUARE])),
    "python text": repr([tuple(SQUARE)]).replace("(", "[").replace(")", "]"),
    "numbers as text": [[str(v) for v in SQUARE]],
    "empty part": [SQUARE, []],
    "rle": rle(MASK),
    "rle in a list": [rle(MASK)],
    "rle as text": json.dumps(rle(MASK)),
    "rle as python text": repr({"size": [H, W], "counts": rle(MASK)["counts"].encode()}),
    "runs": {"size": [H, W], "counts": runs(MASK)},
    "runs as floats": {"size": [40.0, 60.0], "counts": [float(v) for v in runs(MASK)]},
    "runs as text": {"size": [H, W], "counts": json.dumps(runs(MASK))},
    "counts as repr of bytes": {"size": [H, W], "counts": repr(rle(MASK)["counts"].encode())},
    "size as text": {"size": ["40", "60"], "counts": runs(MASK)},
    "no size": {"counts": runs(MASK)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_one_reading_is_read(tmp_path, form):
    item = annotation(0, 0, 1, (10, 8, 20, 16), segmentation=FORMS[form])
    dataset = read_dataset(write(tmp_path / "d", [item]))
    (found,) = dataset.images[0].annotations
    np.testing.assert_array_equal(decode_mask(found, H, W), MASK)
    usual = form in ("polygons", "bare", "rle", "runs", "no size", "runs as floats")
    assert usual or form in ("numbers as text", "runs as text", "counts as repr of bytes", "size as text", "empty part", "null first", "null last") or dataset.problems  # fmt: skip
    assert dataset.stated_masks == 1


def test_parts_of_one_object_are_joined():
    other = [40, 5, 50, 5, 50, 15, 40, 15]
    both = true_mask(SQUARE, other)
    forms = (
        [SQUARE, other],
        [rle(MASK), rle(true_mask(other))],
        [PAIRS, [other]],
        [[SQUARE], [other]],
    )
    for form in forms:
        found, extent, stated = read_segmentation(form, W, H, Ledger())
        np.testing.assert_array_equal(decode_segmentation(found, H, W), both)
        assert stated
        assert extent == (10, 5, 50, 24)


REFUSED = {
    "two points": [[1, 1, 9, 9]],
    "odd": [[1, 1, 9, 1, 9, 9, 3]],
    "triples": [[1, 1, 0], [9, 1, 0], [9, 9, 0]],
    "words": "a mask",
    "numbers": 7,
    "truth": True,
    "bitmap name": {"file": "mask.png"},
    "huge": [[10**400, 1, 9, 1, 9, 9]],
    "infinite": [[float("inf"), 1, 9, 1, 9, 9]],
    "mixed": [SQUARE, {"size": [H, W], "counts": runs(MASK)}],
    "deep text": "[" * 5000 + "]" * 5000,
    "deep": [[[[[[[[[[[[SQUARE]]]]]]]]]]]],
    "rle, huge number": {"size": [H, W], "counts": [10**400]},
    "rle, huge size": {"size": [10**400, 60], "counts": runs(MASK)},
    "rle, fractions": {"size": [H, W], "counts": [0.5, 2399.5]},
    "rle, negative": {"size": [H, W], "counts": [-5, 2405]},
    "rle, wraps": {"size": [H, W], "counts": [2**33, 2400 - 2**33]},
    "rle, exchanged": {"size": [W, H], "counts": runs(MASK)},
    "rle, positions": {"size": [H, W], "counts": np.cumsum(runs(MASK)).tolist()},
    "rle, refused late": {"size": [H, W], "counts": "Xo0T3`U1VmoooooooooooOZmN"},
    "rle, not ascii": {"size": [H, W], "counts": "日本"},
    "rle, empty": {"size": [H, W], "counts": ""},
    "rle, null": {"size": [H, W], "counts": None},
    "rle, nested": {"size": [H, W], "counts": [[1, 2]]},
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_read_leaves_the_box_and_is_counted(tmp_path, form):
    items = [
        annotation(0, 0, 1, (10, 8, 20, 16), segmentation=REFUSED[form]),
        annotation(1, 1, 2, (10, 8, 20, 16)),
    ]
    dataset = read_dataset(write(tmp_path / "d", items))
    (found,) = dataset.images[0].annotations
    assert found.segmentation is None
    assert any(s.startswith("mask left out") for s in dataset.problems), dataset.problems
    entry = next(e for s in dataset.problems for e in dataset.problems.entries(s))
    assert (entry.file, entry.id) == ("0.png", 0)


@pytest.mark.parametrize("form", REFUSED)
def test_stated_masks_of_which_none_can_be_read_are_an_error(tmp_path, capsys, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    items = [annotation(k, k, 1, (10, 8, 20, 16), segmentation=REFUSED[form]) for k in range(3)]
    folder = str(write(tmp_path / "d", items))
    config = {"model": {"preset": "tiny"}, "data": {"train": folder}}
    with pytest.raises(DataError, match=r"3 of 3 masks of .* cannot be read.*loss\.masks=false"):
        open_datasets(parse_config(config))
    assert doctor.main([folder]) == 2
    assert "masks of" in capsys.readouterr().err
    # The remedy that the message names.
    train, _ = open_datasets(parse_config({**config, "loss": {"masks": False}}))
    assert len(train.images[0].annotations) == 1


@pytest.mark.parametrize("nothing", [None, [], [[]], [None], "", {}])
def test_no_mask_at_all_is_box_only_data(tmp_path, nothing):
    items = [annotation(k, k, 1, (10, 8, 20, 16), segmentation=nothing) for k in range(3)]
    folder = write(tmp_path / "d", items)
    train, _ = open_datasets(
        parse_config({"model": {"preset": "tiny"}, "data": {"train": str(folder)}})
    )
    assert train.stated_masks == 0


def test_a_long_count_costs_no_time():
    for text in ("o" * 400_000, "0" * 400_000, "oooooo0" * 60_000):
        start = time.perf_counter()
        found = read_segmentation({"size": [H, W], "counts": text}, W, H, Ledger())
        assert found[0] is None
        assert time.perf_counter() - start < 1


@given(st.integers(1, 30), st.integers(1, 30), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_run_lengths_say_what_pycocotools_says(height, width, random):
    mask = np.array([[random.random() < 0.3 for _ in range(width)] for _ in range(height)])
    text = rle_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    flat = mask.ravel(order="F").astype(int)
    lengths = [len(list(g)) for _, g in __import__("itertools").groupby(flat)]
    lengths = [0, *lengths] if flat[0] else lengths
    cut = random.randrange(len(lengths))
    empty = [*lengths[:cut], 0, 0, *lengths[cut:]]  # runs of length 0 change nothing
    for counts in (text["counts"].decode(), lengths, empty):
        value = {"size": [height, width], "counts": counts}
        found, extent, _ = read_segmentation(value, width, height, Ledger())
        if not mask.any():
            assert found is None
            continue
        np.testing.assert_array_equal(decode_segmentation(found, height, width), mask)
        x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        assert extent == (x[0], y[0], x[-1] + 1, y[-1] + 1)


def test_a_box_and_a_polygon_over_the_edge_alike_fit_each_other(tmp_path):
    """Neither is odd but for being cut; the stated area is that of the whole, and is measured anew."""
    items = [
        annotation(0, 0, 1, (-10, 8, 30, 16)),
        annotation(1, 1, 1, (-10, 8, 30, 16), bbox=[0, 8, 20, 16]),
    ]
    dataset = read_dataset(write(tmp_path / "d", items))
    assert dict(dataset.problems) == {"box reached over the picture's edge (cut)": 1}
    drawn = rle_codec.frPyObjects([polygon(-10.0, 8.0, 30.0, 16.0)], H, W)
    for image in dataset.images[:2]:
        assert image.annotations[0].area == rle_codec.area(drawn)[0] < 480
