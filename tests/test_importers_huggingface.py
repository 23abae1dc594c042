"""Hugging Face `datasets`: what its folders say in their several ways, boxes to 1 px, refusals by name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sam3jax import doctor
from sam3jax.data.coco import decode_mask
from sam3jax.data.folders import read_dataset
from tests.coco_folders import picture

W, H = 160, 120
BOXES = [(20.0, 25.0, 90.0, 75.0), (120.0, 10.0, 30.0, 40.0), (0.0, 0.0, 160.0, 120.0)]
SHAPE = [20.0, 25.0, 110.0, 25.0, 110.0, 100.0, 20.0, 100.0]


def convert(root, out):
    return doctor.main([str(root), "--import", "huggingface", "--out", str(out)])


def found(out, split="train"):
    dataset = read_dataset(out, split)
    return {
        i.file.name: [(dataset.categories[a.category_id], a) for a in i.annotations]
        for i in dataset.images
    }


def write_lines(root, *lines, names=None):
    for line in lines:
        if isinstance(line, dict) and "file_name" in line and ".." not in line["file_name"]:
            picture(root / line["file_name"], W, H)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "metadata.jsonl").write_text(text)
    if names:
        (root / "classes.txt").write_text("\n".join(names))
    return root


def objects(boxes, label="category", value="dog", key="bbox", **more):
    return {key: boxes, label: [value] * len(boxes), **more}


@pytest.mark.parametrize(
    "columns",
    [
        {"objects": objects(BOXES)},
        {"objects": objects(BOXES, label="label", value=1)},
        {"objects": [{"bbox": box, "category_id": 1} for box in BOXES]},
        {"annotations": objects(BOXES, key="boxes", label="categories")},
        objects(BOXES, key="bboxes", label="labels"),
        {"objects": objects([(x, y, x + w, y + h) for x, y, w, h in BOXES])},
    ],
    ids=["lists", "numbers", "dictionaries", "other names", "flat", "corners"],
)
def test_the_usual_ways_to_write_objects(tmp_path, columns, capsys):
    root = write_lines(tmp_path / "d", {"file_name": "a.png", **columns}, names=["cat", "dog"])
    assert convert(root, tmp_path / "out") == 0
    (annotations,) = found(tmp_path / "out").values()
    assert [name for name, _ in annotations] == ["dog"] * 3
    np.testing.assert_allclose([a.bbox for _, a in annotations], BOXES, atol=1)
    corners = columns.get("objects", {})
    said = "3 x box read as corners" in capsys.readouterr().out
    assert said == (isinstance(corners, dict) and corners.get("bbox") not in (None, BOXES))


def test_masks_crowds_and_pictures_without_objects(tmp_path):
    rle = {"size": [H, W], "counts": [0, 10, W * H - 10]}
    more = {"segmentation": [[SHAPE], rle, None], "iscrowd": [0, 1, 0]}
    root = write_lines(
        tmp_path / "d",
        {"file_name": "a.png", "objects": objects([BOXES[0], (0, 0, 1, 10), BOXES[1]], **more)},
        {"file_name": "b.png", "objects": None},
        {"file_name": "c.png", "objects": objects([])},
    )
    assert convert(root, tmp_path / "out") == 0
    pictures = found(tmp_path / "out")
    assert [len(a) for a in pictures.values()] == [3, 0, 0]
    masks = [decode_mask(a, H, W).sum() for _, a in pictures["a.png"]]
    assert masks == [90 * 75, 10, 0]
    assert [a.iscrowd for _, a in pictures["a.png"]] == [False, True, False]
    assert pictures["a.png"][0][1].area == 90 * 75


@pytest.mark.parametrize(
    ("lines", "names", "said"),
    [
        ([{"file_name": "a.png", "objects": objects(BOXES, value=1)}], None, "classes.txt"),
        ([{"file_name": "a.png", "objects": objects(BOXES, value=7)}], ["cat"], "no annotation found"),
        ([{"file_name": "a.png", "text": "a dog"}], None, "no column `objects`"),
        ([{"file_name": "a.png", "objects": objects([(0.1, 0.2, 0.3, 0.3)])}], None, "within 0..1"),
        (["{", ""], None, "line 1 is not JSON"),
        (["[]", "3", '{"file_name": 3}'], None, "no annotation found"),
        ([{"file_name": "../a.png", "objects": objects(BOXES)}], None, "no annotation found"),
    ],
    ids=["numbers", "no name", "captions", "shares", "json", "no file name", "outside"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, capsys, lines, names, said):
    picture(tmp_path / "a.png", W, H)
    root = tmp_path / "d"
    root.mkdir()
    write_lines(root, *lines, names=names)
    assert convert(root, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_counted(tmp_path, capsys):
    bad = objects([*BOXES, None, [1, 2, 3]])
    bad["category"][1] = None
    root = write_lines(tmp_path / "d", {"file_name": "a.png", "objects": bad}, {"file_name": "b.png"})  # fmt: skip
    (root / "b.png").unlink()
    assert convert(root, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "1 x object left out: no category" in out
    assert "2 x object left out: neither area nor box" in out
    assert "1 x picture left out: its file is missing (b.png, id 2)" in out


@pytest.fixture
def stored(tmp_path):
    """Three pictures as the library holds them: two of one name, one by path alone."""
    datasets = pytest.importorskip("datasets", reason="parquet and arrow need datasets")
    rows = []
    for k, folder in enumerate("xyz"):
        file = tmp_path / folder / "p.png"
        picture(file, W, H, seed=k)
        rows.append({"image": str(file), "objects": {"bbox": BOXES[:k], "category": [1] * k}})
    names = datasets.ClassLabel(names=["cat", "dog"])
    inner = {"bbox": datasets.Sequence(datasets.Value("float32")), "category": names}
    features = datasets.Features(image=datasets.Image(), objects=datasets.Sequence(inner))
    return datasets, datasets.Dataset.from_list(rows, features=features), tmp_path


def check_stored(out, split):
    pictures = found(out, split)
    assert [len(a) for a in pictures.values()] == [0, 1, 2]
    assert len(pictures) == 3
    for k, inside in enumerate(pictures.values()):
        assert all(name == "dog" for name, _ in inside)
        boxes = np.reshape([a.bbox for _, a in inside], (-1, 4))
        np.testing.assert_allclose(boxes, np.reshape(BOXES[:k], (-1, 4)), atol=1)


def test_saved_to_disk_with_splits_and_without(stored):
    datasets, dataset, folder = stored
    datasets.DatasetDict(train=dataset, validation=dataset).save_to_disk(str(folder / "both"))
    dataset.save_to_disk(str(folder / "one"))
    assert convert(folder / "both", folder / "out") == 0
    assert convert(folder / "one", folder / "out1") == 0
    for out, split in (("out", "train"), ("out", "valid"), ("out1", "train")):
        check_stored(folder / out, split)
    first = (folder / "x" / "p.png").read_bytes()
    assert next(iter((folder / "out" / "train").glob("p.png"))).read_bytes() == first


def test_parquet_with_pictures_inside_and_outside(stored, capsys, monkeypatch):
    datasets, dataset, folder = stored
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    dataset.to_parquet(str(folder / "outside" / "train.parquet"))
    assert convert(folder / "outside", folder / "out") == 2
    assert "lies outside the folder" in capsys.readouterr().err
    embedded = dataset.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)
    embedded.with_format(None).to_parquet(str(folder / "inside" / "data" / "train-00000.parquet"))
    assert convert(folder / "inside", folder / "out") == 0
    check_stored(folder / "out", "train")


def test_without_the_library_its_name_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.parquet").write_bytes(b"PAR1")
    assert convert(tmp_path / "d", tmp_path / "out") == 2
    assert "pip install sam3jax[huggingface]" in capsys.readouterr().err
