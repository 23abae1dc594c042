"""Exports that nobody thought of: read in the one sensible way and said, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import numpy as np
import pytest
from PIL import Image

from sam3jax import doctor
from sam3jax.data import pictures
from sam3jax.data.boxes import parse_box
from sam3jax.data.coco import DataError, decode_mask, parse_coco
from sam3jax.data.folders import is_picture, read_dataset
from sam3jax.data.names import phrase_key, visible
from sam3jax.data.statistics import twins
from sam3jax.viewing.draw import WIDEST, row
from tests.coco_folders import annotation, picture, write

BOX = (4, 6, 20, 18)


def made(folder, change=lambda k, item: item, pictures=None, names=("things", "cup", "dog")):
    """Four pictures with an outline each; change(k, annotation) gives what is written instead."""
    items = [change(k, annotation(k, k, 1 + k % 2, (4 + k, 6, 20, 18))) for k in range(4)]
    write(folder, items, images=4, categories=names)
    if pictures is not None:
        file = folder / "_annotations.coco.json"
        raw = json.loads(file.read_text())
        for k, image in enumerate(raw["images"]):
            raw["images"][k] = pictures(k, image)
        file.write_text(json.dumps(raw))
    return folder


def renamed(old, new):
    def change(k, item):
        item[new] = item.pop(old)
        return item

    return change


@pytest.mark.parametrize(
    ("field", "other"),
    [("image_id", "imageId"), ("category_id", "class_id"), ("bbox", "box"), ("segmentation", "polygon"),
     ("segmentation", "segmentations"), ("iscrowd", "is_crowd")],
)  # fmt: skip
def test_fields_of_other_names_are_read_and_said(tmp_path, field, other):
    want = read_dataset(made(tmp_path / "a"))
    found = read_dataset(made(tmp_path / "b", renamed(field, other)))
    assert dict(found.problems) == {f"annotation field `{other}` is read as `{field}`": 4}
    for ours, theirs in zip(want.images, found.images, strict=True):
        for a, b in zip(ours.annotations, theirs.annotations, strict=True):
            assert (a.bbox, a.category_id, a.iscrowd) == (b.bbox, b.category_id, b.iscrowd)
            np.testing.assert_array_equal(decode_mask(a, 40, 60), decode_mask(b, 40, 60))


def test_a_crowd_under_another_name_is_one(tmp_path):
    def change(k, item):
        del item["iscrowd"]
        return {**item, "is_crowd": int(k == 0)}

    dataset = read_dataset(made(tmp_path / "d", change))
    assert [i.annotations[0].iscrowd for i in dataset.images] == [True, False, False, False]


def test_pictures_of_other_fields(tmp_path):
    def pictures(k, image):
        image["filename"] = image.pop("file_name")
        return image

    dataset = read_dataset(made(tmp_path / "d", pictures=pictures))
    assert dict(dataset.problems) == {"picture field `filename` is read as `file_name`": 4}
    assert [i.file.name for i in dataset.images] == ["0.png", "1.png", "2.png", "3.png"]


@pytest.mark.parametrize("field", ["ignore", "difficult"])
def test_marks_of_other_formats_are_said(tmp_path, field):
    change = lambda k, item: {**item, field: [1, 0, True, "0"][k]}
    dataset = read_dataset(made(tmp_path / "d", change))
    assert dict(dataset.problems) == {
        f"annotation field `{field}` is not used (kept as an instance)": 2
    }


@pytest.mark.parametrize(
    "value",
    [
        dict(zip(("x", "y", "width", "height"), BOX)), dict(zip("xywh", BOX)), str(list(BOX)), [list(BOX)],
        {"xmin": 4, "ymin": 6, "xmax": 24, "ymax": 24}, {"left": 4, "top": "6", "right": 24.0, "bottom": 24},
        "4, 6, 20, 18", list(map(str, BOX)),
    ],
)  # fmt: skip
def test_boxes_of_one_meaning_are_read(value):
    assert parse_box(value) == BOX


@pytest.mark.parametrize(
    "value",
    [[4, 6, 20, 18, 0.9], [1, 1, 9, 1, 9, 9, 1, 9], ["4,5"] * 4, "4 6", {"x": 4, "y": 6}, {"x": [4]},
     [[BOX]] * 2, "", "[" * 2000, {}, [None] * 4, {"x1": 1, "y1": math.nan, "x2": 3, "y2": 4}, 7, None],
)  # fmt: skip
def test_boxes_of_several_meanings_or_none_are_not(value):
    assert parse_box(value) is None


def test_what_a_box_was_is_said_where_it_is_left_out(tmp_path):
    change = lambda k, item: {**item, "segmentation": [], "bbox": [4, 6, 20, 18, 0.9]}
    with pytest.raises(DataError, match=r"found \[4, 6, 20, 18, 0.9\]"):
        read_dataset(made(tmp_path / "d", change))


@pytest.mark.parametrize(
    ("text", "pixels"),
    [("4,6,24,6,24,24,4,24", 360), ("((4, 6), (24, 6), (24, 24), (4, 24))", 360)],
)
def test_outlines_as_text(tmp_path, text, pixels):
    dataset = read_dataset(made(tmp_path / "d", lambda k, item: {**item, "segmentation": text}))
    (first, *_) = dataset.images
    assert decode_mask(first.annotations[0], 40, 60).sum() == pixels


@pytest.mark.parametrize(
    "line", [[1, 1, 5, 1, 9, 1], [1, 1, 5, 5, 1, 1], [3, 3, 3, 3, 3, 3], [1, 1, 2, 2, 9, 9, 4, 4]]
)
def test_lines_are_no_masks(tmp_path, line):
    dataset = read_dataset(made(tmp_path / "d", lambda k, item: {**item, "segmentation": [line]}))
    assert dataset.problems["polygon left out: a line, without an area"] == 4
    assert dataset.stated_masks == 4
    assert all(i.annotations[0].segmentation is None for i in dataset.images)
    outline = [2, 2, 9, 2, 9, 9, 2, 9]
    change = lambda k, item: {**item, "segmentation": [line, outline], "bbox": None}
    dataset = read_dataset(made(tmp_path / "e", change))
    assert {i.annotations[0].bbox for i in dataset.images} == {(2, 2, 7, 7)}


@pytest.mark.parametrize(
    ("name", "seen"),
    [("c\u200bup", "cup"), ("\ufeffcup", "cup"), ("cu\u00adp", "cup"), ("cup\u202e", "cup"), ("red\ncup", "red cup"),
     ("cu\u200dp", "cup"), ("\x1b[31mcup", "[31mcup"), ("می\u200cخواهم", "می\u200cخواهم"), ("👩\u200d🍳", "👩\u200d🍳")],
)  # fmt: skip
def test_signs_that_nobody_sees_are_no_part_of_a_name(tmp_path, name, seen):
    assert visible(name) == seen
    assert phrase_key(name) == phrase_key(seen)
    dataset = read_dataset(made(tmp_path / "d", names=("things", name, seen)))
    assert list(dataset.categories.values()) == ["things", seen]
    said = "category name holds signs that nobody sees (left out)"
    assert dataset.problems.get(said, 0) == (name != seen)


@pytest.mark.parametrize("name", ["\u200b", "\x07", float("nan"), float("inf"), 10**400, -(10**30), None, True, ["cup"]])  # fmt: skip
def test_what_is_no_name_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="category"):
        read_dataset(made(tmp_path / "d", names=("things", name, "dog")))


def test_names_that_differ_in_signs_only_are_said(tmp_path):
    dataset = read_dataset(made(tmp_path / "d", names=("red cup", "red-cup", "dog")))
    (sentence,) = dataset.problems
    assert "blanks or signs only" in sentence
    assert str(dataset.problems.entries(sentence)[0]) == "id 1, found 'red-cup beside red cup'"
    assert len(dataset.categories) == 3


def test_a_frame_of_a_film_is_no_page(tmp_path):
    dataset = read_dataset(made(tmp_path / "d", pictures=lambda k, image: {**image, "frame": 7}))
    assert [i.frame for i in dataset.images] == [0] * 4
    assert dict(dataset.problems) == {
        "`frame` of an entry is not used: its picture has one frame": 4
    }
    same = lambda k, image: {**image, "frame": k, "file_name": "0.png"}
    with pytest.raises(DataError, match="has 1 frames"):
        read_dataset(made(tmp_path / "e", pictures=same))
    odd = lambda k, image: {**image, "frame": [-1, "zero", 0.5, None][k]}
    dataset = read_dataset(made(tmp_path / "f", pictures=odd))
    assert dict(dataset.problems) == {"`frame` is no whole number >= 0 (the first is read)": 3}


def test_what_is_annotated_is_not_absent(tmp_path):
    negative = lambda k, image: {**image, "neg_category_ids": [1, "dog"]}
    dataset = read_dataset(made(tmp_path / "d", pictures=negative))
    assert [i.negative_ids for i in dataset.images] == [{2}, {1}, {2}, {1}]
    sentence = "`neg_category_ids` has a category that is annotated there (left out)"
    assert dict(dataset.problems) == {sentence: 4}


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "it is empty"), (b"<html>404", "web page"), (b"version https://git-lfs.x/v1\n", "git lfs pull")],
)  # fmt: skip
def test_what_is_no_picture_at_all_is_named(tmp_path, content, said):
    folder = made(tmp_path / "d")
    (folder / "0.png").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_dataset(folder)


@pytest.mark.parametrize("name", ["0.jpg", "0", "0.png ", "0.png?x=1", "0.PNG", "%30.png"])
def test_near_names_are_offered(tmp_path, name):
    with pytest.raises(DataError, match=r"there is '0\.png'"):
        read_dataset(
            made(tmp_path / "d", pictures=lambda k, i: {**i, "file_name": name if k == 0 else i["file_name"]})
        )  # fmt: skip


def test_a_link_to_itself_hides_no_other_file(tmp_path):
    folder = made(tmp_path / "d")
    for name in ("a.png", "2.png"):
        (folder / name).unlink(missing_ok=True)
        os.symlink(name, folder / name)
    with pytest.raises(DataError, match=r"2\.png is no regular file"):
        read_dataset(folder)


def test_equal_pictures_of_a_split_are_said(tmp_path, capsys):
    folder = made(tmp_path / "d" / "train")
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "3.png").unlink()
    os.symlink("2.png", folder / "3.png")
    dataset = read_dataset(tmp_path / "d")
    assert twins(dataset) == [("0.png", "1.png"), ("2.png", "3.png")]
    assert doctor.main([str(tmp_path / "d"), "--output", str(tmp_path / "o")]) == 0
    assert "(1.png = 0.png, 3.png = 2.png)" in capsys.readouterr().out
    images = tuple(dataclasses.replace(dataset.images[0], frame=k) for k in range(3))
    assert twins(dataclasses.replace(dataset, images=images)) == []  # pages of one file


def test_a_very_wide_picture_is_drawn_in_bounds(tmp_path):
    sheet = row([("wide", Image.new("RGB", (20_000, 2)))], height=100)
    assert sheet.width == WIDEST * 100
    folder = made(tmp_path / "d" / "train")
    picture(folder / "0.png", 20_000, 2)
    raw = json.loads((folder / "_annotations.coco.json").read_text())
    raw["images"][0] |= {"width": 20_000, "height": 2}
    raw["annotations"][0] |= {"bbox": [10, 0, 9000, 2], "segmentation": []}
    (folder / "_annotations.coco.json").write_text(json.dumps(raw))
    options = ["data.allow_missing_masks=true", "--output", str(tmp_path / "o")]
    assert doctor.main([str(tmp_path / "d"), *options]) == 0
    with Image.open(tmp_path / "o" / "train.jpg") as sheet:
        assert max(sheet.size) < 5000


def test_volumes_are_pictures(tmp_path):
    from pathlib import Path

    names = ("a.nii.gz", "a.nii", "a.dcm", "a.HEIC", "a.png")
    assert all(is_picture(Path(name)) for name in names)
    assert not any(is_picture(Path(name)) for name in ("a.gz", "nii.gz.txt", "a"))


def test_nothing_of_the_file_is_changed_where_it_is_not_consumed():
    raw = {
        "images": [{"id": 0, "filename": "0.png", "width": 60, "height": 40}],
        "annotations": [{"imageId": 0, "category_id": 1, "box": str(list(BOX))}],
        "categories": [{"id": 1, "name": "cup"}],
    }
    before = json.dumps(raw)
    from pathlib import Path

    dataset = parse_coco(raw, "d", "d", lambda name: Path(name))
    assert dataset.images[0].annotations[0].bbox == BOX
    assert json.dumps(raw) == before


@pytest.mark.parametrize("slow", [0.0, 1e9])
def test_threads_say_what_one_says(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(pictures, "_CHUNK", 2)
    monkeypatch.setattr(pictures, "_SLOW", slow)
    for k in range(7):
        picture(tmp_path / f"{k}.png", 10 + k, 9)
    listed = [(tmp_path / f"{k}.png", 10 + k, 9, 0) for k in range(7)]
    assert [h.size for h in pictures.check_pictures(listed)] == [(10 + k, 9) for k in range(7)]
    assert pictures.check_pictures([]) == []
    wrong = [(file, width + (k in (1, 5)), height, 0) for k, (file, width, height, _) in enumerate(listed)]  # fmt: skip
    with pytest.raises(DataError, match=r"1\.png is 11 x 9 .* \(and 1 more pictures"):
        pictures.check_pictures(wrong)
