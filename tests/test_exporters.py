"""Results in other tools' formats: read back by our importers, and by what those tools say of the format."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as rle_codec
from scipy import ndimage

from sam3jax.data.coco import decode_mask
from sam3jax.data.exporters import WRITTEN, export, outlines
from sam3jax.data.folders import read_dataset
from sam3jax.data.importers import import_dataset
from sam3jax.data.ledger import DataError

SIZE = (60, 90)  # rows, columns
NAMES = ["glass bottle", "Käse & <Brot>"]


def blob(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=SIZE), 6)
    return smooth > np.quantile(smooth, 0.75)


def encoded(mask: np.ndarray) -> dict:
    rle = rle_codec.encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


@pytest.fixture
def folder(tmp_path):
    """Pictures in two folders, two of one name; the second one is empty."""
    for name in ("a/one.png", "b/one.png", "a/two.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(tmp_path / name)
    return tmp_path


def coco(folder) -> dict:
    files = [str(folder / name) for name in ("a/one.png", "a/two.png", "b/one.png")]
    images = [
        {"id": k, "file_name": f, "width": SIZE[1], "height": SIZE[0]} for k, f in enumerate(files)
    ]
    annotations = [
        {"id": k, "image_id": image, "category_id": category, "segmentation": encoded(blob(k)), "score": 0.5 + k / 10}
        for k, (image, category) in enumerate([(0, 1), (0, 2), (2, 2)])
    ]  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    return {"images": images, "categories": categories, "annotations": annotations}


@pytest.mark.parametrize("seed", range(6))
def test_outlines_hold_the_mask(seed):
    mask = ndimage.binary_fill_holes(blob(seed))
    parts = outlines(mask)
    assert len(parts) == ndimage.label(mask)[1]  # diagonal neighbours do not touch
    x, y = (np.concatenate(parts)[:, k] for k in range(2))
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    assert (x.min(), x.max()) == (columns[0], columns[-1] + 1)
    assert (y.min(), y.max()) == (rows[0], rows[-1] + 1)
    large = 16  # drawn much larger, the outline covers what the mask covers
    picture = Image.new("1", (SIZE[1] * large, SIZE[0] * large))
    for part in parts:
        ImageDraw.Draw(picture).polygon([tuple(p) for p in (part * large).tolist()], fill=1)
    share = np.asarray(picture).reshape(SIZE[0], large, SIZE[1], large).mean((1, 3))
    assert np.array_equal(share > 0.5, mask)
    assert abs(share.sum() - mask.sum()) < 0.05 * mask.sum()


def test_holes_are_no_outlines_of_their_own():
    ring = np.zeros(SIZE, bool)
    ring[10:40, 10:40] = True
    ring[20:30, 20:30] = False
    (part,) = outlines(ring)
    assert (part.min(), part.max()) == (10, 40)
    assert outlines(np.zeros(SIZE, bool)) == []


def test_cvat_comes_back_as_it_went(folder, tmp_path):
    written = export(coco(folder), "cvat", folder)
    assert written.name == WRITTEN["cvat"]
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (folder / name).rename(tmp_path / "data" / name)
    text = written.read_text().replace(f"{folder}/", "")
    (tmp_path / "data" / "cvat.xml").write_text(text)
    list(import_dataset("cvat", tmp_path / "data", tmp_path / "out"))
    back = read_dataset(tmp_path / "out", "train")
    found = {
        (r.file.name, back.categories[a.category_id]): decode_mask(a, *SIZE)
        for r in back.images
        for a in r.annotations
    }
    masks = [found[key] for key in sorted(found)]
    assert len(masks) == 3
    wanted = {blob(k).tobytes() for k in range(3)}
    assert {np.asarray(m, bool).tobytes() for m in masks} == wanted
    assert {name for _, name in found} == set(NAMES)


def test_numbered_names_take_no_place_of_another_picture(folder):
    given = coco(folder)
    for image, name in zip(given["images"], ("a/one.png", "a/one_2.png", "b/one.png"), strict=True):
        image["file_name"] = name
    labels = export(given, "yolo", folder) / "labels"
    lines = {f.stem: len(f.read_text().splitlines()) for f in labels.iterdir()}
    assert lines == {"one": 2, "one_2": 0, "one_3": 1}


def test_yolo_lines_are_classes_and_outlines(folder):
    written = export(coco(folder), "yolo", folder)
    assert sorted(p.name for p in (written / "labels").iterdir()) == ["one.txt", "one_2.txt", "two.txt"]  # fmt: skip
    assert (written / "labels" / "two.txt").read_text() == ""
    lines = (written / "labels" / "one.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1"]
    for k, line in enumerate(lines):
        points = np.array(line.split()[1:], float).reshape(-1, 2) * SIZE[::-1]
        picture = Image.new("1", (SIZE[1] * 8, SIZE[0] * 8))
        ImageDraw.Draw(picture).polygon([tuple(p) for p in (points * 8).tolist()], fill=1)
        share = np.asarray(picture).reshape(SIZE[0], 8, SIZE[1], 8).mean((1, 3))
        mask = ndimage.binary_fill_holes(blob(k))
        assert (np.array(share > 0.5) != mask).mean() < 0.02  # the lines between parts
    assert "Käse & <Brot>" in (written / "data.yaml").read_text(encoding="utf-8")


def test_label_studio_gets_outlines_in_percent(folder):
    tasks = json.loads(export(coco(folder), "labelstudio", folder).read_text(encoding="utf-8"))
    assert [len(t["predictions"][0]["result"]) > 0 for t in tasks] == [True, False, True]
    assert tasks[0]["data"]["image"].endswith("a/one.png")
    results = tasks[0]["predictions"][0]["result"]
    assert {r["value"]["polygonlabels"][0] for r in results} == set(NAMES)
    points = np.concatenate([r["value"]["points"] for r in results])
    assert points.min() >= 0
    assert points.max() <= 100
    assert {r["score"] for r in results} == {0.5, 0.6}


@pytest.mark.parametrize("kind", WRITTEN)
def test_boxes_alone_are_refused_by_name(folder, kind):
    raw = coco(folder)
    raw["annotations"][0]["segmentation"] = None
    with pytest.raises(DataError, match="annotation 0 has no mask"):
        export(raw, kind, folder)


@pytest.mark.parametrize("kind", WRITTEN)
def test_nothing_found_is_written_too(folder, kind):
    assert export({**coco(folder), "annotations": []}, kind, folder).exists()
