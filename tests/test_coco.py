"""What is read from a COCO folder, tidy or not; pycocotools is the judge of masks."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO

from sam3jax import doctor
from sam3jax.config import parse_config
from sam3jax.data.coco import (
    DataError,
    decode_mask,
    rename_categories,
    require_masks,
    used_categories,
)
from sam3jax.data.datasets import open_datasets
from sam3jax.data.folders import find_splits, has_split, read_dataset
from sam3jax.data.pictures import open_rgb, read_picture
from tests.coco_folders import BOTTLES, annotation, picture, polygon, write

ORIENTATION = 0x0112


def test_bottles_hold_what_their_record_expects():
    if not BOTTLES.is_dir():
        pytest.skip("shared/data/bottles is not here")
    expected = json.loads((BOTTLES / "expected.json").read_text())
    for split, pictures in expected.items():
        dataset = read_dataset(BOTTLES, split)
        assert not dataset.problems
        oracle = COCO(str(BOTTLES / split / "_annotations.coco.json"))
        assert {i.file.name for i in dataset.images} == set(pictures)
        for image in dataset.images:
            want = pictures[image.file.name]
            assert [image.width, image.height] == want["size"]
            assert len(image.annotations) == len(want["annotations"])
            for found, wanted in zip(image.annotations, want["annotations"]):
                mask = decode_mask(found, image.height, image.width)
                assert found.id == wanted["id"]
                assert dataset.categories[found.category_id] == wanted["category"]
                assert mask.sum() == wanted["area_px"]
                x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
                assert [x[0], y[0], x[-1] + 1 - x[0], y[-1] + 1 - y[0]] == wanted["mask_bbox"]
                np.testing.assert_array_equal(mask, oracle.annToMask(oracle.anns[found.id]))
        used = [dataset.categories[i] for i in used_categories(dataset)]
        assert used == ["glass bottle", "plastic bottle"]  # not "Bottle", Roboflow's class 0


def test_every_kind_of_segmentation_decodes_as_pycocotools_does(tmp_path):
    rng = np.random.default_rng(0)
    blob = np.asfortranarray(rng.random((40, 60)) < 0.3)
    compressed = rle_codec.encode(blob)
    compressed = {"size": [40, 60], "counts": compressed["counts"].decode()}
    column = blob.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(column)) + 1
    runs = np.diff([0, *edges, column.size]).tolist()
    uncompressed = {"size": [40, 60], "counts": [0, *runs] if column[0] else runs}
    two = [polygon(3, 4, 20, 9), polygon(30, 20, 20, 15)]
    over = [polygon(-8, -6, 30, 20)]
    kinds = [compressed, uncompressed, two, over, [polygon(1.3, 2.7, 17.9, 11.1)]]
    items = [annotation(k, k % 3, 1, (2, 3, 40, 30), segmentation=s) for k, s in enumerate(kinds)]
    folder = write(tmp_path / "d", items)
    oracle = COCO(str(folder / "_annotations.coco.json"))
    dataset = read_dataset(folder)
    seen = 0
    for image in dataset.images:
        for found in image.annotations:
            mask = decode_mask(found, image.height, image.width)
            assert mask.dtype == bool
            np.testing.assert_array_equal(mask, oracle.annToMask(oracle.anns[found.id]))
            seen += 1
    assert seen == 5


# name, fields of the annotation, sentence, kept, has a mask
AWKWARD = [
    ("two points", {"segmentation": [[1, 1, 9, 9]]}, "polygon left out", True, False),
    ("empty", {"segmentation": []}, None, True, False),
    ("empty polygon", {"segmentation": [[]]}, "polygon left out", True, False),
    ("null", {"segmentation": None}, None, True, False),
    ("bare", {"segmentation": polygon(10, 8, 20, 16)}, None, True, True),
    ("words", {"segmentation": [["a", "b", 1, 2, 3, 4]]}, "polygon left out", True, False),
    ("nan", {"segmentation": [[1, 1, 9, float("nan"), 9, 9]]}, "polygon left out", True, False),
    ("far", {"segmentation": [[5, 5, 1e9, 5, 1e9, 1e9]]}, "far outside", True, True),
    ("beside", {"segmentation": [[99, 5, 120, 5, 110, 30]]}, "outside the picture", True, False),
    ("short", {"segmentation": {"size": [40, 60], "counts": [3, 4]}}, "fill", True, False),
    ("short string", {"segmentation": {"size": [40, 60], "counts": "11"}}, "fill", True, False),
    ("cut string", {"segmentation": {"size": [40, 60], "counts": "o"}}, "cannot", True, False),
    ("no counts", {"segmentation": {"size": [40, 60]}}, "cannot be read", True, False),
    ("long", {"segmentation": {"size": [40, 60], "counts": [9, 9999]}}, "fill", True, False),
    ("other size", {"segmentation": {"size": [2, 3], "counts": [1, 5]}}, "size", True, False),
    ("no pixel", {"segmentation": {"size": [40, 60], "counts": [2400]}}, "pixel", True, False),
    ("flat box", {"bbox": [5, 5, 0, 7], "segmentation": []}, "no box", False, False),
    ("flat box, mask", {"bbox": [5, 5, 0, 7]}, "taken from the mask", True, True),
    ("no box", {"bbox": None}, "taken from the mask", True, True),
    ("nan box", {"bbox": [1, 2, float("nan"), 4], "segmentation": []}, "no box", False, False),
    ("over", {"bbox": [40, 30, 50, 50], "segmentation": []}, "cut", True, False),
    ("outside", {"bbox": [70, 5, 9, 9], "segmentation": []}, "box outside", False, False),
    ("misfit", {"bbox": [30, 5, 9, 9]}, "does not fit", True, True),
    ("lost picture", {"image_id": 77}, "picture is not listed", False, False),
    ("lost category", {"category_id": 77}, "category is not listed", False, False),
    ("phrase", {"noun_phrase": "the cup"}, "`noun_phrase` is not used", True, True),
]


@pytest.mark.parametrize(("fields", "sentence", "kept", "mask"), [a[1:] for a in AWKWARD])
def test_awkward_annotations_are_handled_and_counted(tmp_path, fields, sentence, kept, mask):
    item = annotation(0, 0, 1, (10, 8, 20, 16)) | fields
    dataset = read_dataset(write(tmp_path / "d", [item, annotation(1, 1, 2, (1, 1, 9, 9))]))
    found = dataset.images[0].annotations
    assert len(found) == kept
    assert bool(dataset.problems) == (sentence is not None), dataset.problems
    if sentence:
        assert any(sentence in line for line in dataset.problems), dataset.problems
    if kept:
        x, y, w, h = found[0].bbox
        assert min(x, y) >= 0
        assert min(w, h) > 0
        assert x + w <= 60
        assert y + h <= 40
        assert (found[0].segmentation is not None) == mask
        assert decode_mask(found[0], 40, 60).any() == mask


def test_ids_may_start_at_zero_and_repeat(tmp_path):
    items = [annotation(0, 0, 1, (2, 2, 9, 9)), annotation(0, 0, 2, (20, 2, 9, 9))]
    dataset = read_dataset(write(tmp_path / "d", items))
    assert [a.category_id for a in dataset.images[0].annotations] == [1, 2]
    assert dataset.problems == {"annotation id used more than once (kept)": 1}


def test_pictures_that_share_an_id_are_left_out(tmp_path):
    images = [{"id": k // 2, "file_name": f"{k}.png", "width": 60, "height": 40} for k in range(3)]
    items = [annotation(0, 0, 1, (2, 2, 9, 9)), annotation(1, 1, 1, (2, 2, 9, 9))]
    dataset = read_dataset(write(tmp_path / "d", items, images=images))
    assert [i.id for i in dataset.images] == [1]
    assert any("several files" in line for line in dataset.problems)


def test_categories_of_one_name_are_one_concept(tmp_path):
    items = [annotation(k, 0, k, (2 + 9 * k, 2, 9, 9)) for k in range(1, 4)]
    dataset = read_dataset(write(tmp_path / "d", items, categories=("x", "cup", "dog", "cup")))
    assert used_categories(dataset) == (1, 2)
    assert [a.category_id for a in dataset.images[0].annotations] == [1, 2, 1]
    renamed = rename_categories(dataset, {"dog": "cup"})
    assert used_categories(renamed) == (1,)
    with pytest.raises(DataError, match=r"names no category.*cat; the data has"):
        rename_categories(dataset, {"cat": "dog"})


def test_box_only_data_pass_and_one_category_without_masks_does_not(tmp_path):
    bare = [annotation(k, k, k + 1, (2, 2, 9, 9), segmentation=[]) for k in range(3)]
    require_masks(read_dataset(write(tmp_path / "a", bare)))
    mixed = [*bare[:2], annotation(2, 2, 3, (2, 2, 9, 9))]
    dataset = read_dataset(write(tmp_path / "b", mixed))
    with pytest.raises(DataError, match=r"'red cup', 'blue cup'.*loss\.masks=false"):
        require_masks(dataset)
    config = parse_config({"data": {"train": str(tmp_path / "b")}, "loss": {"masks": False}})
    assert open_datasets(config)[1] is None


def test_training_data_without_annotations_or_path_are_refused(tmp_path):
    write(tmp_path / "d", [])
    with pytest.raises(DataError, match=r"no usable annotation.*sam3jax\.doctor"):
        open_datasets(parse_config({"data": {"train": str(tmp_path / "d")}}))
    with pytest.raises(DataError, match=r"set data\.train to a COCO folder, or to shapes"):
        open_datasets(parse_config({}))


# ---- folders


def classic(root, pictures="{split}2017", json_name="annotations/instances_{split}2017.json"):
    for split in ("train", "val"):
        folder = root / pictures.format(split=split)
        write(folder, [annotation(0, 0, 1, (2, 2, 9, 9))], name="x.json")
        file = root / json_name.format(split=split)
        file.parent.mkdir(exist_ok=True)
        (folder / "x.json").rename(file)
    (root / "annotations" / "captions_train2017.json").write_text("{}")


@pytest.mark.parametrize("pictures", ["{split}2017", "images/{split}2017", "images/{split}"])
def test_classic_coco_layouts(tmp_path, pictures):
    classic(tmp_path, pictures)
    assert list(find_splits(tmp_path)) == ["train2017", "val2017"]
    for split, folder in (("train", "train"), ("valid", "val"), ("val2017", "val")):
        dataset = read_dataset(tmp_path, split)
        assert len(dataset.images) == 3
        assert dataset.images[0].file.parent == tmp_path / pictures.format(split=folder)
    config = parse_config({"data": {"train": str(tmp_path)}})
    train, valid = open_datasets(config)
    assert train.images[0].file != valid.images[0].file


def test_roboflow_flat_and_explicit_layouts(tmp_path):
    items = [annotation(0, 0, 1, (2, 2, 9, 9))]
    for split in ("train", "valid", "test"):
        write(tmp_path / "r" / split, items)
    assert set(find_splits(tmp_path / "r")) == {"train", "valid", "test"}
    assert has_split(tmp_path / "r", "val")
    flat = write(tmp_path / "f", items, name="labels.json")
    assert not has_split(flat, "valid")
    above = tmp_path / "g"
    write(above / "images", items, name="x.json")
    (above / "images" / "x.json").rename(above / "instances_default.json")
    for path in (flat, flat / "labels.json", above, tmp_path / "r" / "valid"):
        assert len(read_dataset(path, "train").images) == 3


def test_file_names_of_other_machines_are_found(tmp_path):
    images = [
        {"id": k, "file_name": name, "width": 60, "height": 40}
        for k, name in enumerate(["C:\\work\\0.png", "/home/me/1.png", "sub/2.png"])
    ]
    for name in ("0.png", "1.png", "sub/2.png"):
        picture(tmp_path / name, 60, 40)
    write(tmp_path, [annotation(0, 0, 1, (2, 2, 9, 9))], images=images, pictures=False)
    files = [i.file.relative_to(tmp_path).as_posix() for i in read_dataset(tmp_path).images]
    assert files == ["0.png", "1.png", "sub/2.png"]


def damage(folder, what):
    file, json_file = folder / "1.png", folder / "_annotations.coco.json"
    coco = json.loads(json_file.read_text())
    if what == "missing":
        file.unlink()
    elif what == "truncated":
        file.write_bytes(file.read_bytes()[:-400])
    elif what == "not a picture":
        file.write_bytes(b"GIF89a no")
    elif what == "other size":
        picture(file, 61, 40)
    elif what == "not JSON":
        json_file.write_text("{oh")
    elif what == "list":
        json_file.write_text("[]")
    elif what == "not COCO":
        json_file.write_text('{"frames": []}')
    elif what == "no categories":
        json_file.write_text(json.dumps(coco | {"categories": []}))
    elif what == "nameless":
        json_file.write_text(json.dumps(coco | {"categories": [{"id": 1}]}))
    elif what == "no pictures":
        json_file.write_text(json.dumps(coco | {"images": []}))
    elif what == "no JSON":
        json_file.unlink()


DAMAGE = {
    "missing": r"1 of 3 pictures .* are missing: 1\.png; put them",
    "truncated": r"1\.png cannot be read .*truncated.*replace the file",
    "not a picture": r"1\.png cannot be read",
    "other size": r"1\.png is 61 x 40 pixels, its annotations are for 60 x 40",
    "not JSON": r"coco\.json is not JSON .*export",
    "list": r"is a list, expected a COCO dictionary",
    "not COCO": r"is not COCO: no list `images`, `annotations`, `categories` \(found: frames\)",
    "no categories": r"has no categories",
    "nameless": r"category \{'id': 1\} needs an `id` and a `name`",
    "no pictures": r"no usable picture",
    "no JSON": r"no COCO annotations in .*expected train/_annotations\.coco\.json",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_gives_one_clear_line_and_exit_code_2(tmp_path, capsys, what):
    folder = write(tmp_path / "d", [annotation(0, 0, 1, (2, 2, 9, 9))])
    damage(folder, what)
    with pytest.raises(DataError, match=DAMAGE[what]):
        read_dataset(folder)
    assert doctor.main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_a_missing_folder_and_a_missing_split_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no data set at .*nowhere"):
        read_dataset(tmp_path / "nowhere")
    write(tmp_path / "train", [])
    with pytest.raises(DataError, match="has no split 'valid', it has train"):
        read_dataset(tmp_path, "valid")


# ---- pictures


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("frame", ["displayed", "stored"])
def test_exif_orientation_follows_the_frame_of_the_annotations(tmp_path, orientation, frame):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = tmp_path / "a.png"
    picture(file, 60, 40, exif=exif)
    stored = np.asarray(Image.open(file).convert("RGB"))
    # EXIF's table: what the stored first row and first column are, as displayed.
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }[orientation]
    # Where the frame cannot be told from the size, annotations are in the displayed one.
    want = stored if frame == "stored" and orientation >= 5 else shown
    found = read_picture(file, want.shape[1], want.shape[0])
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(np.asarray(open_rgb(file)), shown)


def test_unstated_sizes_are_those_displayed(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture(tmp_path / "a.png", 60, 40, exif=exif)
    images = [{"id": 0, "file_name": "a.png"}]
    items = [annotation(0, 0, 1, (2, 2, 9, 30))]
    dataset = read_dataset(write(tmp_path, items, images=images, pictures=False))
    assert (dataset.images[0].width, dataset.images[0].height) == (40, 60)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tif"])
def test_cut_files_are_found_before_training(tmp_path, kind):
    file = tmp_path / f"0.{kind}"
    images = [{"id": 0, "file_name": file.name, "width": 60, "height": 40}]
    write(tmp_path, [annotation(0, 0, 1, (2, 2, 9, 9))], images=images)
    read_dataset(tmp_path)
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(DataError, match=f"0.{kind} cannot be read"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    values = np.linspace(0, 255, 60 * 40).reshape(40, 60).astype(np.uint8)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(values.astype(np.uint16) * 257).save(file)
    else:
        Image.fromarray(values).convert("RGB").convert(mode).save(file)
    found = read_picture(file, 60, 40)
    assert found.shape == (40, 60, 3)
    if mode not in ("1", "P"):
        np.testing.assert_allclose(found[..., 1], values, atol=1)


def test_a_hundred_megapixels_are_no_bomb(tmp_path):
    Image.new("L", (10_400, 10_000)).save(tmp_path / "a.png")
    assert open_rgb(tmp_path / "a.png").size == (10_400, 10_000)


# ---- doctor


def test_doctor_says_what_was_read_and_what_was_odd(tmp_path, capsys):
    items = [
        annotation(0, 0, 1, (2, 2, 9, 9)),
        annotation(0, 0, 2, (2, 20, 9, 9), iscrowd=1, segmentation={"size": [40, 60], "counts": [9, 2391]}),
        annotation(2, 1, 1, (2, 2, 9, 9), segmentation=[[1, 1, 2, 2]], phrase="a cup"),
    ]  # fmt: skip
    write(tmp_path, items, categories=("things", "GlassBottle_Close", "dog"))
    assert doctor.main([str(tmp_path), "--decode"]) == 0
    text = capsys.readouterr().out
    for part in (
        "3, 1 of them without annotations",
        "60 x 40 (3)",
        "1 polygons, 1 RLE, 1 without mask; 1 crowd",
        "GlassBottle_Close        2 instances in 2 pictures",
        "no annotations, never asked: things",
        "1 x polygon left out",
        "`phrase` is not used",
        "data.phrases={GlassBottle_Close: ...}",
    ):
        assert part in text, text


def test_reading_data_needs_no_torch():
    assert "sam3jax.data.folders" in sys.modules
    import subprocess

    code = "import sys, sam3jax.data.loader, sam3jax.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
