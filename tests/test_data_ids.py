"""Ids of any kind: which entries meet, which are refused by name, and that all of them train."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sam3jax.config import parse_config
from sam3jax.data.coco import DataError
from sam3jax.data.datasets import open_datasets
from sam3jax.data.folders import read_dataset
from sam3jax.data.ids import Ids
from sam3jax.data.loader import make_eval_loader, make_train_loader
from sam3jax.data.prompts import vocabulary
from tests.coco_folders import annotation, write

KINDS = {
    "text numbers": ["0", "1", "2"],
    "words": ["c1", "c2", "c3"],
    "uuids": ["6f1e-aa", "6f1e-ab", "6f1e-ac"],
    "mongo": [{"$oid": "5f01"}, {"$oid": "5f02"}, {"$oid": "5f03"}],
    "fractions": [0.5, 1.5, 2.5],
    "huge": [2**63, 2**64, 2**70],
    "negative": [-1, -2, -3],
    "mixed": ["a", 1, 2.5],
    "floats": [0.0, 1.0, 2.0],
    "unicode": ["ä", "日本", "🙂"],
}


def renumber(folder, section, fields, values, annotation_values=None):
    file = folder / "_annotations.coco.json"
    coco = json.loads(file.read_text())
    old = [entry["id"] for entry in coco[section]]
    listed = dict(zip(old, values))
    used = dict(zip(old, annotation_values or values))
    for entry in coco[section]:
        entry["id"] = listed[entry["id"]]
    for entry in coco["annotations"]:
        for field in fields:
            entry[field] = used[entry[field]]
    file.write_text(json.dumps(coco))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Picture k shows category k: red cup, blue cup, dog."""
    items = [annotation(k, k, k, (2 + 9 * k, 3, 20, 18)) for k in range(3)]
    return write(tmp_path / "d", items, categories=("red cup", "blue cup", "dog"))


def read_back(folder):
    dataset = read_dataset(folder)
    return [
        (i.file.name, [dataset.categories[a.category_id] for a in i.annotations])
        for i in dataset.images
    ]


RIGHT = [("0.png", ["red cup"]), ("1.png", ["blue cup"]), ("2.png", ["dog"])]


@pytest.mark.parametrize("section", ["images", "categories"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_any_kind_are_read_and_train(folder, section, kind):
    field = "image_id" if section == "images" else "category_id"
    renumber(folder, section, [field], KINDS[kind])
    assert read_back(folder) == RIGHT
    config = parse_config(
        {"model": {"preset": "tiny"}, "data": {"train": str(folder)}, "batch_size": 3}
    )
    train, _ = open_datasets(config)
    numbers = [i.id for i in train.images] + list(train.categories)
    assert all(type(n) is int and 0 <= n < 2**53 for n in numbers)
    assert len({i.id for i in train.images}) == 3
    phrases = vocabulary(config.data, train)
    tokens = np.zeros((len(phrases), 16))
    batch = next(make_train_loader(train, phrases, tokens, config))
    assert (batch.targets.num_targets.sum(1) == 1).all()
    asked = {
        c for e in make_eval_loader(train, phrases, tokens, config) for c in e.category_ids.flat
    }
    assert asked - {-1} == set(train.categories)


@pytest.mark.parametrize(
    ("listed", "used"),
    [
        ([0, 1, 2], ["0", "1", "2"]),
        (["0", "1", "2"], [0, 1, 2]),
        ([0, 1, 2], [0.0, 1.0, 2.0]),
        ([0, 1, 2], ["0.0", "1.0", "2.0"]),
        (["000", "001", "002"], [0, 1, 2]),
        ([" a", "b ", "c"], ["a", "b", " c "]),
        ([0, 1, 2], [{"$numberInt": "0"}, {"$numberLong": "1"}, 2]),
    ],
)
@pytest.mark.parametrize("section", ["images", "categories"])
def test_ids_that_mean_the_same_meet(folder, section, listed, used):
    field = "image_id" if section == "images" else "category_id"
    renumber(folder, section, [field], listed, used)
    assert read_back(folder) == RIGHT


def test_whole_numbers_are_kept_and_others_are_named(folder):
    renumber(folder, "categories", ["category_id"], [7, "x", 900])
    dataset = read_dataset(folder)
    assert dataset.categories == {7: "red cup", 901: "blue cup", 900: "dog"}
    assert dataset.source_ids == {"category": {901: "x"}}
    assert any("numbered anew" in line for line in dataset.problems)


def test_a_text_and_a_number_that_are_both_listed_stay_two():
    ids = Ids([1, "1", "2"])
    assert ids.find(1) == 1
    assert ids.find("1") not in (None, 1)
    assert ids.find(2) == ids.find("2") == 2
    assert ids.find(1.0) == 1


@pytest.mark.parametrize("raw", [None, True, [1], {}, {"id": 1}, "", float("nan"), float("inf")])
def test_what_names_nothing_finds_nothing(raw):
    assert Ids([0, 1, "a"]).find(raw) is None
    assert Ids([raw]).sources == {}


@pytest.mark.parametrize("bad", [None, [1], {"a": 1}, True])
@pytest.mark.parametrize("section", ["images", "categories"])
def test_entries_without_a_usable_id_are_refused_by_name(folder, section, bad):
    renumber(folder, section, [], [0, bad, 2])
    with pytest.raises(DataError, match=r"needs an `id`"):
        read_dataset(folder)


def test_names_in_place_of_ids_are_read_and_said(folder):
    renumber(folder, "images", ["image_id"], [0, 1, 2], ["0.png", "1.png", "2"])
    renumber(folder, "categories", ["category_id"], [0, 1, 2], ["Red  Cup", "blue cup", "dog"])
    renumber(folder, "images", [], [10, 11, 12])
    dataset = read_dataset(folder)
    # "2" is the stem of 2.png, and no listed id.
    assert read_back(folder) == RIGHT
    assert dataset.problems["`category_id` is written otherwise than the id (read)"] == 3


@pytest.mark.parametrize(
    ("field", "sentence"),
    [("image_id", "picture is not listed"), ("category_id", "category is not listed")],
)
def test_ids_that_never_meet_are_one_error(folder, field, sentence):
    file = folder / "_annotations.coco.json"
    coco = json.loads(file.read_text())
    for k, entry in enumerate(coco["annotations"]):
        entry[field] = f"other-{k}"
    file.write_text(json.dumps(coco))
    with pytest.raises(
        DataError, match=f"3 of 3 annotations cannot be used.*{sentence}.*never meet"
    ):
        read_dataset(folder)


def test_a_shortened_list_of_pictures_is_no_wrong_export(tmp_path):
    """Somebody tries one picture of a file: annotations of the others are left out, and said."""
    items = [annotation(k, k, 1, (2, 3, 20, 18)) for k in range(60)]
    dataset = read_dataset(write(tmp_path / "d", items, images=1))
    assert len(dataset.images[0].annotations) == 1
    assert dataset.problems["annotation left out: its picture is not listed"] == 59


def test_absences_of_merged_and_text_categories_follow_the_merge(tmp_path):
    images = [{"id": k, "file_name": f"{k}.png", "width": 60, "height": 40} for k in range(3)]
    images[0] |= {"neg_category_ids": ["3", 77], "not_exhaustive_category_ids": [2]}
    images[1] |= {"neg_category_ids": 5}
    items = [annotation(k, 1, k, (2 + 9 * k, 2, 9, 9)) for k in (1, 2, 3)]
    dataset = read_dataset(
        write(tmp_path / "d", items, images=images, categories=("x", "cup", "dog", "Cup"))
    )
    assert dataset.images[0].negative_ids == {1}  # 3 is `Cup`, which is `cup`
    assert dataset.images[0].not_exhaustive_ids == {2}
    assert dataset.images[1].negative_ids == frozenset()  # nothing is known to be absent
    assert dataset.images[2].negative_ids is None
    lines = list(dataset.problems)
    assert any("not listed (left out)" in line for line in lines)
    assert any("is no list" in line for line in lines)


@pytest.mark.parametrize("step", [-1, 1])
def test_ids_that_count_from_another_number_are_an_error(folder, step):
    """All but one would meet, each under a wrong name."""
    renumber(folder, "categories", ["category_id"], [4, 5, 6], [4 + step, 5 + step, 6 + step])
    with pytest.raises(DataError, match="shifted by one, so that all names are wrong"):
        read_dataset(folder)
