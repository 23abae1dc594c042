"""Category names: which are one phrase to the model, which are refused, what data.phrases may say."""

from __future__ import annotations

import json

import pytest

from sam3jax import doctor
from sam3jax.config import ConfigError, parse_config
from sam3jax.data.coco import DataError, rename_categories
from sam3jax.data.datasets import open_dataset, open_datasets
from sam3jax.data.folders import read_dataset
from sam3jax.data.names import phrase_key
from sam3jax.data.prompts import phrases_of, training_questions, vocabulary
from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer
from tests.coco_folders import annotation, write

ONE = [
    ("red circle", "Red Circle"),
    ("red & circle", "red &amp; circle"),
    ("red circle", "red  circle "),
    ("red circle", "red\tcircle"),
    ("café", "cafe\u0301"),
    ("t-shirt", "T - shirt"),
    ("red circle", "ｒｅｄ circle"),
]
TWO = [("red circle", "red circles"), ("cup 1", "cup 2"), ("naive", "naïve"), ("a b", "ab")]


@pytest.mark.parametrize(("a", "b"), ONE)
def test_names_are_one_where_the_model_reads_the_same(tmp_path, a, b):
    rows = Tokenizer(build_byte_tokenizer(), 16)([a, b])
    assert (rows[0] == rows[1]).all()  # the case itself, judged by the tokenizer
    items = [annotation(0, 0, 0, (2, 2, 9, 9)), annotation(1, 1, 1, (2, 2, 9, 9))]
    dataset = read_dataset(write(tmp_path / "d", items, categories=(a, b, "dog")))
    assert len(phrases_of(dataset)) == 1
    config = parse_config({"data": {"negatives": 3}}).data
    for row, picture in enumerate(dataset.images[:2]):
        asked = training_questions(
            picture, phrases_of(dataset), config, targets=3, seed=0, epoch=0, row=row
        )
        assert [len(q.targets) for q in asked] == [
            1
        ]  # present, and not absent under the other name


@pytest.mark.parametrize(("a", "b"), TWO)
def test_names_that_the_model_reads_apart_stay_two(a, b):
    rows = Tokenizer(build_byte_tokenizer(), 16)([a, b])
    assert (rows[0] != rows[1]).any()
    assert phrase_key(a) != phrase_key(b)


@pytest.mark.parametrize(
    "name", [None, "", "  ", "&nbsp;", True, ["a"], {"a": 1}, "\ud800", "x\udcff"]
)
def test_names_that_are_no_phrase_are_refused(tmp_path, name):
    folder = write(tmp_path / "d", [annotation(0, 0, 1, (2, 2, 9, 9))])
    file = folder / "_annotations.coco.json"
    coco = json.loads(file.read_text())
    coco["categories"][1]["name"] = name
    file.write_text(json.dumps(coco))
    with pytest.raises(DataError, match=r"category \{'id': 1") as caught:
        read_dataset(folder)
    assert str(caught.value).isprintable()


def test_numbers_are_names(tmp_path):
    folder = write(tmp_path / "d", [annotation(0, 0, 1, (2, 2, 9, 9))], categories=("a", 7))
    assert read_dataset(folder).categories[1] == "7"


def test_control_characters_never_reach_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("a", "red\x1b[31m cup\nodd   nothing", "blue\u202ecup")
    items = [annotation(k, k, k, (2, 2, 9, 9)) for k in range(3)]
    assert doctor.main([str(write(tmp_path / "d", items, categories=names))]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\\x1b[31m cup\\n" in out


@pytest.fixture
def folder(tmp_path):
    items = [annotation(k, k, k + 1, (2, 2, 9, 9)) for k in range(2)]
    return write(tmp_path / "d", items, categories=("x", "GlassBottle", "dog"))


def config_of(folder, **data):
    return parse_config({"model": {"preset": "tiny"}, "data": {"train": str(folder), **data}})


def test_a_misspelt_key_of_phrases_is_an_error_by_itself(folder):
    good = config_of(folder, phrases={"glassbottle": "glass bottle"})
    assert "glass bottle" in open_datasets(good)[0].categories.values()
    both = {"GlassBottle": "glass bottle", "dgo": "puppy"}
    with pytest.raises(DataError, match=r"names no category.*'dgo': did you mean 'dog'"):
        open_datasets(config_of(folder, phrases=both))
    with pytest.raises(DataError, match="two phrases"):
        open_datasets(config_of(folder, phrases={"dog": "puppy", "Dog": "hound"}))


def test_a_mapping_that_matches_nothing_in_another_data_set_is_no_error(folder, tmp_path):
    other = write(tmp_path / "o", [annotation(0, 0, 1, (2, 2, 9, 9))], categories=("x", "cat"))
    config = config_of(folder, phrases={"GlassBottle": "glass bottle"})
    assert set(open_dataset(config, str(other), "train").categories.values()) == {"x", "cat"}
    # A key of the validation data alone is no misspelling either.
    valid = config_of(folder, valid=str(other), phrases={"cat": "kitten"})
    assert "kitten" in open_datasets(valid)[1].categories.values()


def test_phrases_that_rename_to_another_case_merge(folder):
    dataset = rename_categories(read_dataset(folder), {"GlassBottle": "DOG"})
    assert len(phrases_of(dataset)) == 1


def test_empty_phrases_are_refused(folder):
    for data in ({"phrases": {"dog": " "}}, {"negative_phrases": [""]}):
        with pytest.raises(ConfigError, match="expected some text"):
            config_of(folder, **data)


def test_negative_phrases_are_compared_as_the_model_reads_them(folder):
    config = config_of(folder, negative_phrases=["DOG "])
    with pytest.raises(DataError, match="names categories of the data"):
        open_datasets(config)
    with pytest.raises(DataError, match="names categories of the data"):
        vocabulary(config.data, read_dataset(folder))


@pytest.mark.parametrize(
    ("name", "key", "refused"),
    [
        ("left shoe", "flip", True),
        ("Right-hand glove", "flip", True),
        ("leftover food", "flip", False),
        ("top drawer", "flip", False),
        ("top drawer", "turn", True),
        ("left shoe", "turn", True),
    ],
)
def test_phrases_with_sides_are_not_mirrored(tmp_path, name, key, refused):
    items = [annotation(0, 0, 1, (2, 2, 9, 9))]
    folder = write(tmp_path / "d", items, categories=("x", name))
    if not refused:
        open_datasets(config_of(folder, **{key: True}))
        return
    with pytest.raises(DataError, match=rf"data\.{key}=true would teach the opposite"):
        open_datasets(config_of(folder, **{key: True}))


def test_phrases_longer_than_the_model_reads_are_refused_by_doctor_and_training(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    long = " ".join("a" for _ in range(40))
    folder = write(tmp_path / "d", [annotation(0, 0, 1, (2, 2, 9, 9))], categories=("x", long))
    with pytest.raises(DataError, match="40 words and signs, more than the 14 tokens"):
        open_datasets(config_of(folder))
    assert doctor.main([str(folder)]) == 2
    assert "more than the 30 tokens" in capsys.readouterr().err


def test_a_category_called_visual_is_asked(tmp_path):
    from sam3jax.data.loader import make_train_loader

    folder = write(tmp_path / "d", [annotation(0, 0, 1, (2, 2, 9, 9))], images=1, categories=("x", "visual"))  # fmt: skip
    config = config_of(folder)
    data, _ = open_datasets(config)
    batch = next(make_train_loader(data, ("visual",), [[0] * 16], config))
    assert batch.targets.num_targets.sum() == 1


@pytest.mark.parametrize(
    "setting", [{"phrases": {"red cup": "\u200b"}}, {"negative_phrases": ["\u200b"]}]
)
def test_phrases_of_which_nothing_is_read_are_refused(tmp_path, setting):
    folder = write(tmp_path / "d", [annotation(0, 0, 1, (2, 3, 20, 18))])
    config = parse_config({"model": {"preset": "tiny"}, "data": {"train": str(folder), **setting}})
    with pytest.raises(DataError, match="nothing to read"):
        open_datasets(config)
