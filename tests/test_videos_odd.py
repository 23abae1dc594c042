"""Folders of videos as they lie on disks: what macOS leaves, lists of DAVIS 2016, capital endings, other names."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sam3jax.data.frames import FrameFiles
from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.video_folders import looks_like_videos, read_videos
from tests import video_folders as made

JUNK = b"\0\5\x16\7"


def put(root, **files):
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


def by_object(root, names=("000", "001")):
    """SA-V's validation layout: a folder of masks for each object."""
    made.write_palette(root)
    folder = root / "Annotations" / "walk"
    for file in list(folder.iterdir()):
        file.unlink()
    for k, name in enumerate(names):
        (folder / name).mkdir()
        for t in (0, 2, 4):
            Image.fromarray(made.object_masks()[t, k]).save(folder / name / f"{t:05d}.png")
    return root


def sav(root):
    made.write_palette(root)
    shutil.move(root / "JPEGImages" / "walk", root / "walk")
    for name in ("Annotations", "JPEGImages"):
        shutil.rmtree(root / name)
    mask = {"size": list(made.SIZE), "counts": [5, 9, made.SIZE[0] * made.SIZE[1] - 14]}
    (root / "walk_manual.json").write_text(json.dumps({"masklet": [[mask], [mask]], "masklet_id": ["a"]}))  # fmt: skip
    return root


def mot(root, rows="1,5,2,3,9,7,1,1,1\n2,5,2,3,9,7,1,1,1\n"):
    made.write_palette(root)
    shutil.move(root / "JPEGImages" / "walk", root / "street" / "img1")
    shutil.rmtree(root / "Annotations")
    put(root, **{"street/gt/gt.txt": rows})
    return root


LEFT_BY_MACOS = [
    (made.write_palette, ["JPEGImages/walk/._00000.jpg", "Annotations/walk/._00000.png", "JPEGImages/.DS_Store", "JPEGImages/.ipynb_checkpoints/0.jpg", "._meta.json"]),
    (by_object, ["Annotations/walk/000/._00000.png", "Annotations/walk/.ipynb_checkpoints/0.png"]),
    (made.write_ytvis, ["._instances.json", "JPEGImages/walk/._00000.jpg", "info.json"]),
    (sav, ["._walk_manual.json", "walk/._00000.jpg"]),
    (mot, ["street/img1/._00000.jpg", "__MACOSX/gt/gt.txt"]),
]  # fmt: skip


@pytest.mark.parametrize(("write", "junk"), LEFT_BY_MACOS)
def test_what_macos_leaves_changes_nothing(tmp_path, write, junk):
    plain = read_videos(write(tmp_path / "a"))
    put(write(tmp_path / "b"), **dict.fromkeys(junk, JUNK))
    assert looks_like_videos(tmp_path / "b")
    found = read_videos(tmp_path / "b")
    assert found.problems == plain.problems
    assert [v.objects() for v in found.videos] == [v.objects() for v in plain.videos]
    assert [len(v.frames) for v in found.videos] == [len(v.frames) for v in plain.videos]


def test_endings_in_capitals_are_endings(tmp_path):
    root = made.write_palette(tmp_path)
    for name in ("00002", "00003"):
        file = root / "Annotations" / "walk" / f"{name}.png"
        file.rename(file.with_suffix(".PNG"))
    assert read_videos(root).videos[0].annotated == (0, 1, 2, 3, 4, 5)


FRAME = "/JPEGImages/480p/walk/{t:05d}.jpg /Annotations/480p/walk/{t:05d}.png\n"


@pytest.mark.parametrize("text", ["".join(FRAME.format(t=t) for t in range(6)), "\ufeffwalk\r\n", "walk\n\nwalk\n"])  # fmt: skip
def test_lists_of_davis(tmp_path, text):
    put(made.write_palette(tmp_path), **{"ImageSets/480p/train.txt": text})
    assert [v.name for v in read_videos(tmp_path, "train").videos] == ["walk"]
    with pytest.raises(DataError, match=r"lists no split 'valid', it lists train"):
        read_videos(tmp_path, "valid")


@pytest.mark.parametrize("text", ["../../etc\n", "gone\n", "a/b\n"])
def test_lists_of_what_is_not_there_are_refused(tmp_path, text):
    put(made.write_palette(tmp_path), **{"ImageSets/train.txt": text})
    with pytest.raises(DataError, match=r"has no frame in|is no folder of frames"):
        read_videos(tmp_path, "train")


@pytest.mark.parametrize(
    ("meta", "names", "counted"),
    [
        ([], ["object"], 0),
        ({"videos": ["walk"]}, ["object"], 0),
        ({"videos": {"walk": {"objects": {"1": "cat", "2": "dog"}}}}, ["cat", "dog"], 0),
        ({"videos": {"walk": {"objects": {"1": {"category": "Cat"}, "2": {"category": "cat "}}}}}, ["Cat"], 0),
        ({"videos": {"walk": {"objects": {"a": {"category": "x"}, "1": {"category": None}}}}}, ["object"], 2),
    ],
)  # fmt: skip
def test_what_meta_json_may_hold(tmp_path, meta, names, counted):
    put(made.write_palette(tmp_path), **{"meta.json": json.dumps(meta)})
    data = read_videos(tmp_path)
    assert list(data.categories.values()) == names
    assert sum(data.problems.values()) == counted


def test_folders_of_objects_keep_their_numbers_and_are_two(tmp_path):
    (video,) = read_videos(by_object(tmp_path, ("left", "1"))).videos
    assert len(video.objects()) == 2
    assert 1 in video.objects()


def test_masks_without_a_frame_are_counted(tmp_path):
    folder = by_object(tmp_path) / "Annotations" / "walk" / "000"
    shutil.copy(folder / "00000.png", folder / "77777.png")
    problems = read_videos(tmp_path).problems
    assert isinstance(problems, Ledger)
    assert problems == {"mask without a frame of its name (left out)": 1}
    assert "000/77777.png" in problems.examples("mask")


@pytest.mark.parametrize("row", ["frame,id,x,y,w,h", "1,5,2,3", "nan,5,2,3,9,7,1,1,1", "1,inf,2,3,9,7", "1,5,nan,3,9,7", "x"])  # fmt: skip
def test_rows_of_mot_that_are_none_are_counted(tmp_path, row):
    data = read_videos(
        mot(tmp_path / "a", f"\ufeff{row}\n\n1 5 2 3 9 7 1 1 1\n1,5,2,3,9,7,1,1,1\n")
    )
    assert data.videos[0].objects() == {5: [0]}
    assert data.problems == {"row left out: not a frame, an object and its box": 1, "row left out: its object is in that frame already": 1}  # fmt: skip
    with pytest.raises(DataError, match=r"no row of gt.txt can be used"):
        read_videos(mot(tmp_path / "b", f"{row}\n"))


NAMES = [lambda n: f"./{n}", lambda n: n.replace("/", "\\"), lambda n: f"/content/JPEGImages/{n}"]


@pytest.mark.parametrize("written", NAMES)
def test_names_of_frames_from_other_machines(tmp_path, written):
    root = made.write_ytvis(tmp_path)
    raw = json.loads((root / "instances.json").read_text())
    for video in raw["videos"]:
        video["file_names"] = [written(name) for name in video["file_names"]]
    (root / "instances.json").write_text(json.dumps(raw))
    frames = read_videos(root).videos[0].frames
    assert isinstance(frames, FrameFiles)
    assert [f.name for f in frames.files] == [f"{t:05d}.jpg" for t in range(6)]


def test_a_lost_folder_of_frames_is_no_other_video(tmp_path):
    root = made.write_ytvis(tmp_path)
    raw = json.loads((root / "instances.json").read_text())
    (video,) = raw["videos"]
    lost = {**video, "id": 8, "file_names": [n.replace("walk", "run") for n in video["file_names"]]}
    raw["videos"].append(lost)
    for file in (root / "JPEGImages" / "walk").iterdir():
        shutil.copy(file, root / file.name)
    (root / "instances.json").write_text(json.dumps(raw))
    shutil.rmtree(root / "JPEGImages")
    with pytest.raises(DataError, match=r"'run/00000.jpg' is missing: the only file of that name"):
        read_videos(root)


def test_videos_further_down_are_named(tmp_path):
    made.write_palette(tmp_path / "DAVIS")
    with pytest.raises(DataError, match=r"there are some in .*DAVIS: give that"):
        read_videos(tmp_path)


def test_absences_of_unknown_categories_are_counted(tmp_path):
    root = made.write_ytvis(tmp_path)
    raw = json.loads((root / "instances.json").read_text())
    raw["videos"][0] |= {"neg_category_ids": [3, 77], "not_exhaustive_category_ids": ["fish"]}
    (root / "instances.json").write_text(json.dumps(raw))
    data = read_videos(root)
    assert data.videos[0].negative_ids == {3}
    assert sum(data.problems.values()) == 2
    assert np.all(["not listed" in problem for problem in data.problems])


def test_a_pascal_voc_folder_is_no_video(tmp_path):
    for name in ("JPEGImages", "Annotations"):
        (tmp_path / name).mkdir()
    (tmp_path / "Annotations" / "1.xml").write_text("<annotation></annotation>")
    assert not looks_like_videos(tmp_path)
    assert not looks_like_videos(tmp_path / "nowhere")


@pytest.mark.parametrize("write", [made.write_palette, made.write_ytvis])
def test_links_that_lead_out_of_the_folder_are_refused(tmp_path, write):
    root = write(tmp_path / "data")
    path = root / "instances.json" if (root / "instances.json").is_file() else root
    frame = root / "JPEGImages" / "walk" / "00002.jpg"
    frame.rename(tmp_path / "elsewhere.jpg")
    frame.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(DataError, match=r"(leads out of|outside) .*allow_outside"):
        read_videos(path, "train")
    assert len(read_videos(path, "train", allow_outside=True).videos) == 1
    frame.unlink()
    (root / "kept.jpg").write_bytes((tmp_path / "elsewhere.jpg").read_bytes())
    frame.symlink_to(root / "kept.jpg")  # a link within the folder is the user's own order
    assert len(read_videos(path, "train").videos) == 1


def test_a_whole_folder_of_frames_that_is_a_link_out_is_refused(tmp_path):
    root = made.write_palette(tmp_path / "data")
    frames = root / "JPEGImages" / "walk"
    frames.rename(tmp_path / "walk")
    frames.symlink_to(tmp_path / "walk")
    with pytest.raises(DataError, match="leads out of"):
        read_videos(root, "train")
