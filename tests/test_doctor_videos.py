"""What the doctor says and writes about videos, and that it refuses what training refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sam3jax import doctor as command
from sam3jax.config import parse_config
from sam3jax.data.click_loader import make_click_eval_loader, make_click_loader
from sam3jax.data.pictures import DataError
from sam3jax.data.transforms import move_mask, square, unpack_mask
from sam3jax.data.video_sets import open_videos, read_pictures
from tests import video_folders as made


def doctor(path, tmp_path, *words) -> tuple[int, dict]:
    output = tmp_path / "doctor"
    status = command.main([str(path), "--output", str(output), *words])
    report = output / "doctor.json"
    return status, json.loads(report.read_text()) if report.is_file() else {}


@pytest.mark.parametrize("write", [made.write_palette, made.write_ytvis])
def test_doctor_looks_at_videos(tmp_path, capsys, write):
    root = write(tmp_path / "data")
    path = root / "instances.json" if (root / "instances.json").is_file() else root
    status, report = doctor(path, tmp_path, "--decode")
    assert status == 0
    first, second = sorted(report["objects"], key=lambda row: row["object"])
    seen = [("first", 0), ("last", 5), ("frames", 6), ("of", 6), ("gaps", 0)]
    assert [(k, first[k]) for k, _ in seen] == seen
    assert (second["first"], second["last"], second["frames"]) == (2, 3, 2)
    share = made.object_masks()[:, 0].mean()
    assert first["area"] == pytest.approx(share, rel=0.2)
    assert "1 videos, 6 frames (6 annotated), 2 objects" in capsys.readouterr().out
    with Image.open(tmp_path / "doctor" / "train.jpg") as sheet:
        assert min(sheet.size) > 100
    assert len((tmp_path / "doctor" / "objects.csv").read_text().splitlines()) == 3


def test_doctor_counts_how_often_an_object_comes_back(tmp_path):
    root = made.write_ytvis(tmp_path / "data")
    raw = json.loads((root / "instances.json").read_text())
    for name in ("segmentations", "bboxes"):
        raw["annotations"][0][name][2] = raw["annotations"][0][name][4] = None
    (root / "instances.json").write_text(json.dumps(raw))
    _, report = doctor(root / "instances.json", tmp_path)
    assert [row["gaps"] for row in report["objects"]] == [2, 0]


def test_doctor_says_what_training_on_videos_would_refuse(tmp_path, capsys):
    root = made.write_ytvis(tmp_path / "data")
    raw = json.loads((root / "instances.json").read_text())
    (root / "instances.json").write_text(json.dumps({**raw, "annotations": []}))
    assert doctor(root / "instances.json", tmp_path)[0] == 2
    assert "error: " in capsys.readouterr().err


def test_doctor_finds_a_frame_that_cannot_be_read(tmp_path, capsys):
    root = made.write_ytvis(tmp_path / "data")
    broken = root / "JPEGImages" / "walk" / "00003.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    assert doctor(root / "instances.json", tmp_path, "--decode")[0] == 2
    assert "00003.jpg" in capsys.readouterr().err


EVERY = [None, "x", {"size": [3, 3], "counts": [9]}]


def changed(tmp_path, change):
    root = made.write_ytvis(tmp_path / "data")
    raw = json.loads((root / "instances.json").read_text())
    for annotation in raw["annotations"]:
        change(annotation)
    (root / "instances.json").write_text(json.dumps(raw))
    return root


def each(field, new):
    """A change of what an object is in every frame where it is seen."""
    return lambda a: a.update({field: [None if v is None else new(v) for v in a[field]]})


CORNERS = each("bboxes", lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
SHARES = each("bboxes", lambda b: [b[0] / 36, b[1] / 24, b[2] / 36, b[3] / 24])
BARE = lambda change: lambda a: (change(a), a.pop("segmentations"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.update(iscrowd=1), "8 of 8 annotations are marked as crowds"),
        (each("segmentations", lambda _: "x"), "8 of 8 masks .* cannot be read: mask left out: neither"),
        (each("segmentations", lambda s: {**s, "size": s["size"][::-1]}), "8 of 8 masks .* cannot be read: .*exchanged"),
        (CORNERS, "fit them when read as corners"),
        (BARE(CORNERS), "all lie inside when read as corners"),
        (BARE(SHARES), "8 of 8 boxes lie within 0..1"),
    ],
    ids=["crowds", "text", "exchanged", "corners and masks", "corners", "shares"],
)  # fmt: skip
def test_one_fault_of_all_objects_is_one_error(tmp_path, capsys, change, says):
    root = changed(tmp_path, change)
    with pytest.raises(DataError, match=says):
        open_videos(parse_config({"task": "clips", "data": {"train": str(root)}}))
    assert doctor(root, tmp_path)[0] == 2
    assert "error: " in capsys.readouterr().err


def test_phrases_of_videos_are_those_of_pictures(tmp_path):
    root = made.write_ytvis(tmp_path / "data")
    config = lambda phrases: parse_config({"task": "clips", "data": {"train": str(root), "phrases": phrases}})  # fmt: skip
    with pytest.raises(DataError, match=r"names no category .* with 'cta': did you mean 'cat'"):
        open_videos(config({"cta": "tabby", "dog": "hound"}))
    train, _, _ = open_videos(config({"CAT ": "animal", "dog": "Animal"}))
    assert train.categories == {1: "animal", 3: "bird"}
    assert train.videos[0].categories() == {1}


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_the_validation_split_may_be_called_val(tmp_path, name):
    made.write_palette(tmp_path / "data" / "train")
    made.write_palette(tmp_path / "data" / name)
    config = parse_config({"task": "clips", "data": {"train": str(tmp_path / "data")}})
    _, valid, _ = open_videos(config)
    assert valid is not None
    assert valid.name.endswith(name)


@pytest.mark.parametrize("key", ["train_split", "valid_split"])
def test_a_split_of_videos_that_is_not_there_is_refused(tmp_path, key):
    root = made.write_ytvis(tmp_path / "data")
    config = parse_config({"task": "clips", "data": {"train": str(root), key: "vaild"}})
    with pytest.raises(DataError, match="has no split 'vaild' of videos"):
        open_videos(config)


@pytest.mark.parametrize("write", [made.write_palette, made.write_ytvis])
def test_annotated_frames_are_pictures_to_click_on(tmp_path, capsys, write):
    root = write(tmp_path / "data")
    model = dict(preset="tiny", image_size=84, window_size=3, pretrain_image_size=42)
    config = parse_config({"task": "clicks", "model": model, "data": {"train": str(root)}})
    dataset, valid = read_pictures(config)
    assert valid is None
    batches = list(make_click_eval_loader(dataset, config, batch_size=2))
    seen = [(int(b.image_id[i]), unpack_mask(b.masks[i, k], 84)) for b in batches for i, k in np.argwhere(b.valid & b.image_valid[:, None])]  # fmt: skip
    truth = made.object_masks()
    wanted = [(t, move_mask(square(36, 24, 84), truth[t, k])) for t in range(made.FRAMES) for k in range(2) if truth[t, k].any()]  # fmt: skip
    assert [row for row, _ in seen] == [row for row, _ in wanted]
    for (_, found), (_, mask) in zip(seen, wanted):
        np.testing.assert_array_equal(found, mask)
    assert next(make_click_loader(dataset, config)).masks.any()
    assert doctor(root, tmp_path, "task=clicks")[0] == 0
    assert "train on them with" not in capsys.readouterr().out
    assert doctor(root, tmp_path)[0] == 0
    assert "train on them with task=clips or task=clicks" in capsys.readouterr().out


def test_videos_of_boxes_are_nothing_to_click_on(tmp_path, capsys):
    root = changed(tmp_path, lambda a: a.pop("segmentations"))
    assert doctor(root, tmp_path, "task=clicks")[0] == 2
    assert "nothing to click on" in capsys.readouterr().err
