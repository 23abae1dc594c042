"""Other formats written by hand here, converted, and read back: boxes to 1 px, areas to .5 %."""

from __future__ import annotations

import base64
import io
import json
from xml.sax.saxutils import escape

import numpy as np
import pytest
from PIL import Image

from sam3jax import doctor
from sam3jax.data.coco import DataError, decode_mask
from sam3jax.data.folders import read_dataset
from sam3jax.data.importers import FORMATS
from tests.coco_folders import picture

W, H = 160, 120
OUTLINE = [20.0, 30.0, 90.0, 25.0, 110.0, 70.0, 60.0, 100.0, 25.0, 80.0]
BOX = (20.0, 25.0, 90.0, 75.0)  # of the outline
OTHER = (120.0, 10.0, 30.0, 40.0)


def outline_mask():
    from pycocotools import mask as codec

    return codec.decode(codec.merge(codec.frPyObjects([OUTLINE], H, W))).astype(bool)


def pictures(root, names):
    for k, name in enumerate(names):
        picture(root / name, W, H, seed=k)


def write_yolo(root, yaml=True):
    """An outline and a box in train/a, a box in val/b, nothing in train/c."""
    names = ["images/train/a.png", "images/val/b.png", "images/train/c.png"]
    pictures(root, names)
    for name in names:
        (root / name.replace("images", "labels")).parent.mkdir(parents=True, exist_ok=True)
    shares = " ".join(f"{v / (H if k % 2 else W):.6f}" for k, v in enumerate(OUTLINE))
    x, y, w, h = OTHER
    box = f"1 {(x + w / 2) / W} {(y + h / 2) / H} {w / W} {h / H}"
    (root / "labels/train/a.txt").write_text(f"0 {shares}\n{box}\n")
    (root / "labels/val/b.txt").write_text(f"{box}\n\nnot a line\n")
    (root / "labels/train/c.txt").write_text("")
    if yaml:
        (root / "data.yaml").write_text(
            "path: .\ntrain: images/train\nval: images/val\nnames: {0: red cup, 1: dog}\n"
        )
    else:
        (root / "classes.txt").write_text("red cup\ndog\n")


def voc_object(name, box, outline=None, first=1):
    x, y, w, h = box
    corners = f"<xmin>{x + first:g}</xmin><ymin>{y + first:g}</ymin><xmax>{x + w:g}</xmax><ymax>{y + h:g}</ymax>"
    points = ""
    if outline:
        pairs = zip(outline[0::2], outline[1::2])
        points = "".join(f"<x{k}>{u}</x{k}><y{k}>{v}</y{k}>" for k, (u, v) in enumerate(pairs, 1))
        points = f"<polygon>{points}</polygon>"
    return f"<object><name>{escape(name)}</name><bndbox>{corners}</bndbox>{points}</object>"


def write_voc(root):
    pictures(root, ["JPEGImages/a.png", "JPEGImages/b.png"])
    (root / "Annotations").mkdir()
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    (root / "ImageSets/Main/val.txt").write_text("b\n")
    found = {"a": voc_object("red cup", BOX, OUTLINE) + voc_object("dog", OTHER), "b": voc_object("dog", OTHER)}  # fmt: skip
    for name, objects in found.items():
        text = f"<annotation><filename>{name}.png</filename>{objects}</annotation>"
        (root / f"Annotations/{name}.xml").write_text(text)


def write_labelme(root):
    pictures(root, ["train/a.png", "val/b.png"])
    x, y, w, h = OTHER
    points = [list(p) for p in zip(OUTLINE[0::2], OUTLINE[1::2])]
    rectangle = {"label": "dog", "points": [[x + w, y + h], [x, y]], "shape_type": "rectangle"}
    shapes = {"train/a": [{"label": "red cup", "points": points, "shape_type": "polygon"}, rectangle],
              "val/b": [rectangle, {"label": "dog", "points": [[1, 1]], "shape_type": "point"}]}  # fmt: skip
    for name, found in shapes.items():
        raw = {"imagePath": f"{name[-1]}.png", "shapes": found, "imageData": None}
        (root / f"{name}.json").write_text(json.dumps(raw))


def write_cvat(root):
    pictures(root, ["images/a.png", "images/b.png"])
    x, y, w, h = OTHER
    points = ";".join(f"{u},{v}" for u, v in zip(OUTLINE[0::2], OUTLINE[1::2]))
    box = f'<box label="dog" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/>'
    (root / "annotations.xml").write_text(
        f'<annotations><image name="a.png" subset="Train"><polygon label="red cup" points="{points}"/>'
        f'{box}</image><image name="b.png" subset="Validation">{box}<points label="dog" points="1,1"/>'
        f"</image></annotations>"
    )


def write_masks(root):
    pictures(root, ["images/train/a.png", "images/val/b.png"])
    x, y, w, h = (int(v) for v in OTHER)
    values = np.zeros((H, W), np.uint8)
    values[y : y + h, x : x + w] = 2
    for name, with_outline in (("train/a", True), ("val/b", False)):
        here = values.copy()
        if with_outline:
            here[outline_mask()] = 1
        file = root / "masks" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(here).save(file)
    (root / "classes.txt").write_text("background\nred cup\ndog\n")


def write_huggingface(root):
    pictures(root, ["train/a.png", "validation/b.png"])
    both = {"bbox": [BOX, OTHER], "category": ["red cup", "dog"], "segmentation": [[OUTLINE], None]}
    lines = {"train": ("a.png", both), "validation": ("b.png", {"bbox": [OTHER], "category": ["dog"]})}  # fmt: skip
    for split, (name, objects) in lines.items():
        line = json.dumps({"file_name": name, "objects": objects})
        (root / split / "metadata.jsonl").write_text(f"{line}\n\n")


WRITERS = {
    "yolo": write_yolo, "voc": write_voc, "labelme": write_labelme, "cvat": write_cvat, "masks": write_masks,
    "huggingface": write_huggingface,
}  # fmt: skip


def convert(kind, root, out):
    return doctor.main([str(root), "--import", kind, "--out", str(out)])


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_comes_back_as_it_was(tmp_path, capsys, kind):
    WRITERS[kind](tmp_path / "d")
    assert convert(kind, tmp_path / "d", tmp_path / "coco") == 0
    capsys.readouterr()
    train, valid = (read_dataset(tmp_path / "coco", split) for split in ("train", "valid"))
    assert set(train.categories.values()) == set(valid.categories.values()) == {"red cup", "dog"}
    found = {train.categories[a.category_id]: a for a in train.images[0].annotations}
    np.testing.assert_allclose(found["red cup"].bbox, BOX, atol=1)
    np.testing.assert_allclose(found["dog"].bbox, OTHER, atol=1)
    area = decode_mask(found["red cup"], H, W).sum()
    assert abs(area - outline_mask().sum()) <= 0.005 * outline_mask().sum() + 1
    (dog,) = valid.images[0].annotations
    np.testing.assert_allclose(dog.bbox, OTHER, atol=1)
    # The pictures are the same bytes.
    source = next((tmp_path / "d").rglob("a.png"))
    assert train.images[0].file.read_bytes() == source.read_bytes()
    # It can be looked at and trained, boxes and masks mixed as they were.
    options = ["--output", str(tmp_path / "o"), "data.allow_missing_masks=true"]
    assert doctor.main([str(tmp_path / "coco"), *options]) == 0


@pytest.mark.parametrize("kind", FORMATS)
def test_such_a_folder_is_named_with_its_command(tmp_path, capsys, kind):
    WRITERS[kind](tmp_path / "d")
    with pytest.raises(DataError, match="no COCO annotations") as caught:
        read_dataset(tmp_path / "d")
    assert f"--import {kind} --out COCO_DIR" in str(caught.value)
    assert doctor.main([str(tmp_path / "d")]) == 2
    assert f"--import {kind}" in capsys.readouterr().err


def test_what_is_left_out_is_said(tmp_path, capsys):
    write_yolo(tmp_path / "d")
    assert convert("yolo", tmp_path / "d", tmp_path / "coco") == 0
    out = capsys.readouterr().out
    assert "1 x line left out" in out
    assert "b.txt, id 3, found 'not a line'" in out
    write_labelme(tmp_path / "l")
    convert("labelme", tmp_path / "l", tmp_path / "coco2")
    assert "1 x shape left out" in capsys.readouterr().out


def test_yolo_without_a_description_of_the_data(tmp_path):
    write_yolo(tmp_path / "d", yaml=False)
    assert convert("yolo", tmp_path / "d", tmp_path / "coco") == 0
    assert len(read_dataset(tmp_path / "coco", "train").images) == 2
    assert len(read_dataset(tmp_path / "coco", "valid").images) == 1


def test_brush_masks_of_cvat_and_labelme_keep_their_pixels(tmp_path):
    part = np.random.default_rng(0).random((20, 30)) < 0.5
    part[0, 0] = part[-1, -1] = True
    flat = part.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = [0, *np.diff([0, *edges, flat.size]).tolist()]
    picture(tmp_path / "c" / "a.png", W, H)
    (tmp_path / "c" / "annotations.xml").write_text(
        f'<annotations><image name="a.png"><mask label="x" left="7" top="9" width="30" height="20" '
        f'rle="{", ".join(map(str, runs))}"/></image></annotations>'
    )
    buffer = io.BytesIO()
    Image.fromarray(part).save(buffer, "PNG")
    picture(tmp_path / "l" / "a.png", W, H)
    shape = {"label": "x", "shape_type": "mask", "points": [[7, 9], [36, 28]], "mask": base64.b64encode(buffer.getvalue()).decode()}  # fmt: skip
    (tmp_path / "l" / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": [shape]}))
    whole = np.zeros((H, W), bool)
    whole[9:29, 7:37] = part
    for kind, folder in (("cvat", "c"), ("labelme", "l")):
        assert convert(kind, tmp_path / folder, tmp_path / f"{kind}-out") == 0
        (found,) = read_dataset(tmp_path / f"{kind}-out").images[0].annotations
        np.testing.assert_array_equal(decode_mask(found, H, W), whole)


def test_equal_file_names_of_several_folders_stay_two(tmp_path):
    for camera in ("cam0", "cam1"):
        picture(tmp_path / "d" / camera / "1.png", W, H)
        raw = {
            "imagePath": "1.png",
            "shapes": [{"label": camera, "points": [[1, 1], [9, 1], [9, 9]]}],
        }
        (tmp_path / "d" / camera / "1.json").write_text(json.dumps(raw))
    assert convert("labelme", tmp_path / "d", tmp_path / "coco") == 0
    dataset = read_dataset(tmp_path / "coco")
    names = {i.file.name: dataset.categories[i.annotations[0].category_id] for i in dataset.images}
    assert names == {"1.png": "cam0", "cam1_1.png": "cam1"}


def test_what_cannot_be_converted_is_one_sentence(tmp_path, capsys):
    write_yolo(tmp_path / "d")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert convert("yolo", tmp_path / "d", tmp_path / "full") == 2
    assert convert("voc", tmp_path / "d", tmp_path / "new") == 2
    assert convert("yolo", tmp_path / "nowhere", tmp_path / "new") == 2
    assert doctor.main([str(tmp_path / "d"), "--import", "yolo"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert all(line.startswith("error: ") for line in errors)
    bomb = "<!DOCTYPE a [<!ENTITY a 'aaaa'>]><annotation>&a;</annotation>"
    picture(tmp_path / "x" / "a.png", W, H)
    (tmp_path / "x" / "a.xml").write_text(bomb)
    assert convert("voc", tmp_path / "x", tmp_path / "new") == 2
    assert "entities" in capsys.readouterr().err


def test_video_folders_are_called_video(tmp_path):
    for name in ("JPEGImages/480p/bear", "Annotations/480p/bear", "ImageSets/480p"):
        (tmp_path / "davis" / name).mkdir(parents=True)
    picture(tmp_path / "davis/JPEGImages/480p/bear/00000.jpg", 64, 48)
    (tmp_path / "davis/ImageSets/480p/train.txt").write_text("bear\n")
    with pytest.raises(DataError, match=r"looks like video \(DAVIS.*task=clips"):
        read_dataset(tmp_path / "davis")


def changed(kind, file, old, new):
    """A writer of a format whose `file` then says `new` for `old` (all of it where that is empty)."""

    def make(root):
        WRITERS[kind](root)
        text = (root / file).read_text()
        (root / file).write_text(text.replace(old, new) if old else new)

    return make


@pytest.mark.parametrize(
    ("kind", "make", "said"),
    [
        ("yolo", changed("yolo", "data.yaml", "0: red cup", "a: red cup"), "keys that are no numbers"),
        ("masks", changed("masks", "masks/train/a.png", "", "x"), "cannot be read"),
        ("huggingface", changed("huggingface", "train/metadata.jsonl", '"file_name"', '"name"'), None),
    ],
    ids=["yolo names", "broken mask", "no file name"],
)  # fmt: skip
def test_damaged_folders_end_in_a_sentence(tmp_path, capsys, kind, make, said):
    if kind == "masks":  # no text
        make = lambda root: (write_masks(root), (root / "masks/train/a.png").write_bytes(b"x"))
    make(tmp_path / "d")
    assert convert(kind, tmp_path / "d", tmp_path / "out") == (2 if said else 0)
    printed = capsys.readouterr()
    assert said is None or said in printed.err
    assert said or "1 x line left out: no file_name" in printed.out


@pytest.mark.parametrize(
    "line", ["1 50 40 10 10", "9 .5 .4 .1 .1", "1.5 .5 .4 .1 .1", "-1 .5 .4 .1 .1", "1 .5 .4 0 .1", "1 nan .5 .1 .1"]
)  # fmt: skip
def test_wrong_lines_of_yolo_are_left_out_and_all_of_them_are_an_error(tmp_path, capsys, line):
    write_yolo(tmp_path / "d")
    (tmp_path / "d/labels/train/a.txt").write_text(f"{line}\n")
    assert convert("yolo", tmp_path / "d", tmp_path / "out") == 0
    assert f"a.txt, id 1, found '{line}'" in capsys.readouterr().out
    (tmp_path / "d/labels/val/b.txt").write_text(f"{line}\n")
    assert convert("yolo", tmp_path / "d", tmp_path / "out2") == 2
    assert "no annotation found as yolo: line left out" in capsys.readouterr().err
    (tmp_path / "d/labels/val/b.txt").write_text(f"{line}\n" * 40 + "1 .5 .5 .1 .1\n")
    assert convert("yolo", tmp_path / "d", tmp_path / "out3") == 2
    assert "41 of 42 annotations cannot be read as yolo" in capsys.readouterr().err


def test_exchanged_corners_of_voc_are_read(tmp_path):
    write_voc(tmp_path / "d")
    file = tmp_path / "d/Annotations/b.xml"
    text = file.read_text()
    for axis in "xy":
        text = text.replace(f"{axis}min", "tmp").replace(f"{axis}max", f"{axis}min").replace("tmp", f"{axis}max")  # fmt: skip
    file.write_text(text)
    assert convert("voc", tmp_path / "d", tmp_path / "out") == 0
    (found,) = read_dataset(tmp_path / "out", "valid").images[0].annotations
    np.testing.assert_allclose(found.bbox, OTHER, atol=1)


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [("group_id", [1], 2), ("label", ["a"], 0), ("label", 7, 2), ("label", True, 0), ("points", [[float("nan"), 1]] * 3, 0)],
)  # fmt: skip
def test_odd_fields_of_labelme(tmp_path, field, value, kept):
    write_labelme(tmp_path / "d")
    file = tmp_path / "d/train/a.json"
    raw = json.loads(file.read_text())
    for shape in raw["shapes"]:
        shape[field] = value
    file.write_text(json.dumps(raw))
    assert convert("labelme", tmp_path / "d", tmp_path / "out") == 0
    assert len(read_dataset(tmp_path / "out", "train").images[0].annotations) == kept


def test_pictures_outside_the_folder_are_not_taken_in(tmp_path, capsys):
    write_labelme(tmp_path / "d")
    picture(tmp_path / "secret.png", W, H)
    (tmp_path / "d/train/a.png").unlink()
    raw = json.loads((tmp_path / "d/train/a.json").read_text())
    (tmp_path / "d/train/a.json").write_text(json.dumps({**raw, "imagePath": "../../secret.png"}))
    assert convert("labelme", tmp_path / "d", tmp_path / "out") == 0
    assert "1 x annotation file left out: its picture is missing" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("secret.png"))
