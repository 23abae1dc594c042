"""Whole sets: doctor and training agree, limits are said, and damaged files lose nothing in silence."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sam3jax import doctor
from sam3jax.config import ConfigError, parse_config
from sam3jax.data.coco import DataError
from sam3jax.data.datasets import open_datasets
from sam3jax.data.describe import compare, describe
from sam3jax.data.folders import read_dataset
from sam3jax.data.loader import make_eval_loader, make_train_loader
from sam3jax.data.prompts import trained_phrases, training_questions, vocabulary
from tests.coco_folders import annotation, picture, write

CASES = Path(__file__).parents[1] / ".." / "shared" / "cases"
DRAWS = int(os.environ.get("SAM3JAX_DAMAGE_DRAWS", "120"))  # 2,000 before a release


def examine(folder, *options):
    """Exit code, what is printed, errors."""
    out, err = io.StringIO(), io.StringIO()
    with (
        tempfile.TemporaryDirectory() as place,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = doctor.main([str(folder), "--output", place, *options])
    return code, out.getvalue(), err.getvalue()


def train_once(folder, **sections):
    """Open the data as a training does, and take a batch of each loader."""
    data = {"train": str(folder), **sections.pop("data", {})}
    config = parse_config({"data": data, "batch_size": 2, "model": {"image_size": 336}, **sections})
    train, valid = open_datasets(config)
    phrases = vocabulary(config.data, *filter(None, (train, valid)))
    tokens = np.zeros((len(phrases), 32))
    loader = make_train_loader(train, phrases, tokens, config)
    batch = next(loader)
    loader.close()
    for dataset in filter(None, (train, valid)):
        for found in make_eval_loader(dataset, phrases, tokens, config, targets=False):
            assert found.batch.targets.masks.shape[1] == 0
            break
    return train, batch


def agree(folder):
    """The exit code; asserts that doctor and training say the same."""
    code, _, err = examine(folder)
    try:
        train_once(folder)
        trained = True
    except (DataError, ConfigError):
        trained = False
    assert code == (0 if trained else 2), err
    return code


# ---- crowds


def crowd(k, value, **more):
    return annotation(k, k % 3, 1 + k % 2, (2 + k, 2, 20, 18), iscrowd=value, **more)


NO = [0, "0", False, "false", "False", "0.0", 0.0, "no", "", None, "f"]
YES = [1, "1", True, "true", 1.0, "1.0", "yes"]


@pytest.mark.parametrize("value", NO + YES)
def test_crowd_is_read_whatever_its_type(tmp_path, value):
    items = [crowd(0, value), crowd(1, 0), crowd(2, 0)]
    dataset = read_dataset(write(tmp_path / "d", items))
    assert dataset.images[0].annotations[0].iscrowd == (value in YES)
    assert bool(dataset.problems) == isinstance(value, str)


@pytest.mark.parametrize("value", [2, -1, "maybe", [1], {}, 0.5, 10**400, float("nan")])
def test_what_is_neither_is_counted(tmp_path, value):
    items = [crowd(0, value), crowd(1, 0), crowd(2, 0)]
    dataset = read_dataset(write(tmp_path / "d", items))
    assert not dataset.images[0].annotations[0].iscrowd
    assert dataset.problems["iscrowd is neither 0 nor 1 (read as 0)"] == 1


def test_crowds_everywhere_are_one_error_with_the_remedy(tmp_path):
    folder = write(tmp_path / "d", [crowd(k, 1) for k in range(6)])
    with pytest.raises(
        DataError, match=r"6 of 6 annotations are marked as crowds.*set iscrowd to 0"
    ):
        read_dataset(folder)
    assert agree(folder) == 2
    nearly = [crowd(k, int(k > 0)) for k in range(40)]
    with pytest.raises(DataError, match="39 of 40"):
        read_dataset(write(tmp_path / "e", nearly))


def test_a_category_of_crowds_is_never_asked_in_training_and_said(tmp_path):
    items = [crowd(k, k % 2) for k in range(6)]  # category 2, blue cup, is all crowd
    folder = write(tmp_path / "d", items)
    dataset = read_dataset(folder)
    assert trained_phrases(dataset) == {1: "red cup"}
    config = parse_config({"data": {"negatives": 3}}).data
    for row, record in enumerate(dataset.images):
        asked = training_questions(
            record, trained_phrases(dataset), config, targets=9, seed=0, epoch=0, row=row
        )
        assert {q.phrase for q in asked} <= {"red cup"}
    assert "crowds only, never asked in training: blue cup" in "\n".join(describe(dataset))
    assert agree(folder) == 0


# ---- limits


def test_more_instances_than_the_model_can_find_are_said(tmp_path):
    items = [annotation(k, 0, 1, (k % 40, k % 20, 9, 8)) for k in range(220)]
    folder = write(tmp_path / "d", items)
    code, out, _ = examine(folder)
    assert code == 0
    assert "220 instances of 'red cup' in 0.png, more than the 200" in out
    assert "recall is at most 91%" in out
    assert "more than the 300" not in examine(folder, "model.queries=300")[1]


def test_one_category_gets_a_remedy_that_can_help(tmp_path):
    items = [annotation(k, k, 1, (2, 2, 9, 9)) for k in range(3)]
    out = examine(write(tmp_path / "d", items))[1]
    assert "one category, in every picture: red cup" in out
    assert "data.negative_phrases" in out


def test_few_entries_of_each_kind_are_shown_and_all_are_written(tmp_path):
    items = [
        annotation(k, k % 3, 1, (2 + k, 2, 9, 9), segmentation=[[1, 1, 2, 2]]) for k in range(8)
    ]
    items += [annotation(k, k % 3, 2, (2 + k, 20, 9, 9)) for k in range(8, 12)]
    folder = write(tmp_path / "d", items)
    code = doctor.main(
        [str(folder), "--output", str(tmp_path / "o"), "data.allow_missing_masks=true"]
    )
    assert code == 0
    report = json.loads((tmp_path / "o" / "doctor.json").read_text())
    found = {p["what"]: p for p in report["splits"]["all"]["problems"]}
    odd = found["polygon left out: fewer than three points, or not numbers"]
    assert odd["count"] == len(odd["entries"]) == 8
    assert odd["entries"][3] == {"file": "0.png", "id": "3", "found": "found [1, 1, 2, 2]"}
    lines = [s for s in describe(read_dataset(folder)) if "polygon left out" in s]
    assert lines[0].count("id ") == 3


def test_what_validation_has_and_training_has_not_is_said(tmp_path):
    write(tmp_path / "train", [annotation(k, k, 1, (2, 2, 9, 9)) for k in range(3)])
    items = [annotation(0, 0, 1, (2, 2, 9, 9)), annotation(1, 1, 3, (2, 2, 9, 9))]
    write(tmp_path / "valid", items, categories=("x", "Red Cup", "blue cup", "dog"))
    picture(tmp_path / "valid" / "2.png", 60, 40, seed=99)
    code, out, _ = examine(tmp_path)
    assert code == 0
    assert "1 of 2 categories of" in out
    assert "never trained: dog" in out
    assert "2 of 3 pictures of" in out  # 0.png and 1.png are the same bytes in both
    assert "(0.png, 1.png)" in out
    write(tmp_path / "valid", [])
    assert any("no annotations" in s for s in compare(*(read_dataset(tmp_path, s) for s in ("train", "valid"))))  # fmt: skip


def test_every_split_is_looked_at_and_every_error_said(tmp_path):
    for split in ("train", "valid", "test"):
        write(tmp_path / split, [annotation(0, 0, 1, (2, 2, 9, 9))])
    (tmp_path / "train" / "1.png").unlink()
    (tmp_path / "test" / "_annotations.coco.json").write_text("{oh")
    code, out, err = examine(tmp_path)
    assert code == 2
    assert err.count("error:") == 2
    assert "1.png" in err
    assert "is not JSON" in err
    assert "split valid" in out


# ---- doctor and training agree


@pytest.mark.skipif(not CASES.is_dir(), reason="shared/cases is not here")
def test_every_case_on_record_gives_its_right_value():
    right = {
        "absent-categories-lost-by-merging": 0, "appledouble-files": 0, "box-only-with-validation": 0,
        "boxes-as-shares": 2, "category-id-text-in-annotations": 0, "category-ids-as-words": 0,
        "crowd-as-text": 0, "crowd-everywhere": 2, "exif-size-as-stored": 0,
        "masks-that-cannot-be-read": 0, "missing-subfolder": 2, "rel-coco-types/area-huge": 0,
        "rel-coco-types/category-ids-text": 0, "rel-coco-types/category-list": 2,
        "rel-coco-types/id-list": 0, "rel-coco-types/ids-mixed": 0, "rel-coco-types/image-list": 2,
        "rel-coco-types/neg-int": 0, "rel-coco-types/rle-refused-late": 2,
        "rel-coco-types/surrogate": 2, "rel-iscrowd-string": 0, "rle-of-swapped-size": 2,
        "same-phrase-html": 0, "same-phrase-other-case": 0, "stray-json-folder": 0,
        "twelve-bit-picture": 0, "two-jsons-in-a-split": 2,
    }  # fmt: skip
    for name, code in right.items():
        folder = CASES / name / ("" if "/" in name else "data")
        assert agree(folder) == code, name


CATEGORIES = [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.integers(-(10**40), 10**40),
    st.just(10**400),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=6),
    st.sampled_from(["0", "1", "1.0", "dog", "b'ab'", "[1, 2]", "\ud800", {"$oid": "1"}, {"x": 1, "y": 2}]),
    st.lists(st.integers(-5, 70), max_size=8),
    st.lists(st.lists(st.integers(-5, 70), max_size=7), max_size=4),
    st.just([[5, 5, 25, 5, 25, 25]]),
    st.just({"size": [40, 60], "counts": [100, 50, 2250]}),
    st.just({"size": [60, 40], "counts": "11"}),
)  # fmt: skip


@st.composite
def damaged(draw):
    """A sound file of 3 pictures, 6 annotations, 2 categories, with up to five values replaced, removed,
    or repeated, anywhere."""
    coco = {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 60, "height": 40} for k in range(3)],
        "annotations": [annotation(k, k % 3, 1 + k % 2, (2 + 3 * k, 2, 20, 18)) for k in range(6)],
        "categories": copy.deepcopy(CATEGORIES),
    }
    for _ in range(draw(st.integers(0, 5))):
        section = draw(st.sampled_from(["images", "annotations", "annotations", "categories"]))
        entries = coco[section]
        if not entries:
            continue
        k = draw(st.integers(0, len(entries) - 1))
        what = draw(st.sampled_from(["field", "field", "field", "all", "drop", "repeat", "entry"]))
        fields = ["id", "iscrowd", "bbox", "segmentation", "area", "image_id", "category_id",
                  "width", "height", "file_name", "name", "neg_category_ids",
                  "not_exhaustive_category_ids", "frame", "phrase"]  # fmt: skip
        if what in ("field", "all"):
            own = [f for f in fields if isinstance(entries[k], dict) and f in entries[k]]
            field, value = draw(st.sampled_from(own or fields)), draw(ODD)
            if draw(st.integers(0, 4)) == 0:
                field = draw(st.sampled_from(fields))
            for entry in entries if what == "all" else [entries[k]]:
                if isinstance(entry, dict):
                    entry[field] = copy.deepcopy(value)
        elif what == "drop" and isinstance(entries[k], dict) and entries[k]:
            entries[k].pop(draw(st.sampled_from(sorted(entries[k]))))
        elif what == "repeat":
            entries.append(copy.deepcopy(entries[k]))
        elif what == "entry":
            entries[k] = copy.deepcopy(draw(ODD))
    return coco


@pytest.fixture(scope="module")
def place():
    """Pictures to which every drawn file refers."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), [])
        yield Path(folder)


@given(damaged())
@settings(max_examples=DRAWS, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_files_end_in_no_traceback_and_lose_nothing_in_silence(place, coco):
    (place / "_annotations.coco.json").write_text(json.dumps(coco))
    code, out, err = examine(place)
    text = out + err
    text.encode()  # printable anywhere
    assert "\x1b" not in text
    try:
        dataset = read_dataset(place)
    except DataError as error:
        refused = str(error)
    else:
        refused = None
    if refused is not None:
        assert code == 2
        assert refused in err
        return
    problems = dataset.problems
    kept = sum(len(image.annotations) for image in dataset.images)
    assert kept + problems.total("annotation left out") == len(coco["annotations"])
    listed = len(coco["images"])
    gone = sum(problems.get(s, 0) for s in (
        "picture id used more than once", "picture left out: its id belongs to several files",
        "picture listed more than once under different ids (made one)",
    ))  # fmt: skip
    assert len(dataset.images) + gone == listed
    masks = sum(a.segmentation is not None for image in dataset.images for a in image.annotations)
    if masks < dataset.stated_masks:
        assert problems.total("mask left out")
    for image in dataset.images:
        for a in image.annotations:
            x, y, w, h = a.bbox
            assert min(x, y) >= 0
            assert w > 0
            assert h > 0
            assert x + w <= image.width + 1e-6
            assert y + h <= image.height + 1e-6
            assert a.category_id in dataset.categories
            assert 0 < a.area < float("inf")
    try:
        train_once(place)
        trained = True
    except (DataError, ConfigError):
        trained = False
    assert code == (0 if trained else 2), err
