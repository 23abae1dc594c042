"""Readers of videos: what is absent, what is unknown, what is void; films frame by frame."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from sam3jax.config import parse_config
from sam3jax.data.coco import decode_mask
from sam3jax.data.frames import Film, FrameFiles, open_frames
from sam3jax.data.pictures import DataError
from sam3jax.data.video_folders import read_videos
from sam3jax.data.video_sets import open_videos
from sam3jax.data.videos import describe_videos, rename_phrases
from tests import video_folders as made


def masks_of(video, frame: int) -> dict[int, np.ndarray]:
    return {
        a.id: decode_mask(a, video.height, video.width) for a in video.labels[frame].annotations
    }


def test_palette_values_are_objects_and_255_is_void(tmp_path):
    data = read_videos(made.write_palette(tmp_path))
    (video,) = data.videos
    truth = made.index_masks()
    for t in range(made.FRAMES):
        found = masks_of(video, t)
        assert set(found) == set(np.unique(truth[t]).tolist()) - {0, 255}
        for i, mask in found.items():
            np.testing.assert_array_equal(mask, truth[t] == i)
        from pycocotools import mask as rle_codec

        np.testing.assert_array_equal(rle_codec.decode(video.labels[t].void), truth[t] == 255)
    assert video.objects() == {1: [0, 1, 2, 3, 4, 5], 2: [2, 3]}
    assert data.categories == {1: "object"}
    assert rename_phrases(data, {"object": "square"}).categories == {1: "square"}
    assert "2 objects" in describe_videos(data)[0]


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_masks_of_few_bits_keep_their_values(tmp_path, bits):
    root, truth = made.write_palette(tmp_path), made.index_masks()
    truth[truth == 255] = 3
    for t, values in enumerate(truth):
        (root / f"Annotations/walk/{t:05d}.png").write_bytes(made.few_bits(values, bits))
    (video,) = read_videos(root).videos
    found = masks_of(video, 2)
    assert set(found) == {1, 2, 3}
    assert video.labels[2].void is None
    for i, mask in found.items():
        np.testing.assert_array_equal(mask, truth[2] == i)


def test_the_area_of_an_outline_is_that_of_its_pixels(tmp_path):
    root = made.write_ytvis(tmp_path)
    raw = json.loads((root / "instances.json").read_text())
    triangle = [[2.0, 2.0, 22.0, 2.0, 2.0, 22.0]]
    raw["annotations"][0]["segmentations"] = [triangle] * made.FRAMES
    (root / "instances.json").write_text(json.dumps(raw))
    (video,) = read_videos(root).videos
    found = next(a for a in video.labels[0].annotations if a.category_id == 1)
    assert found.area == decode_mask(found, video.height, video.width).sum() < 0.6 * 20 * 20


def test_a_frame_without_a_mask_file_is_not_annotated_and_not_empty(tmp_path):
    (video,) = read_videos(made.write_palette(tmp_path, every=2)).videos
    assert video.annotated == (0, 2, 4)
    assert not video.labels[1].annotated
    assert video.labels[4].annotated


def test_null_is_absent_and_keeps_the_slot(tmp_path):
    data = read_videos(made.write_ytvis(tmp_path))
    (video,) = data.videos
    truth = made.object_masks()
    assert len(video.labels) == made.FRAMES
    assert all(frame.annotated for frame in video.labels)
    for t in range(made.FRAMES):
        found = masks_of(video, t)
        assert set(found) == {k + 1 for k in range(2) if truth[t, k].any()}
        for k, mask in found.items():
            np.testing.assert_array_equal(mask, truth[t, k - 1])
    assert {a.category_id for a in video.labels[2].annotations} == {1, 2}
    assert data.categories == {1: "cat", 2: "dog", 3: "bird"}


def test_phrases_of_objects_and_pairs_of_videos(tmp_path):
    """SA-Co: a noun phrase is a category of its own; pairs without an object are negatives."""
    root = made.write_ytvis(tmp_path)
    raw = json.loads((root / "instances.json").read_text())
    raw["annotations"][0]["noun_phrase"] = "a red square"
    raw["video_np_pairs"] = [
        {"video_id": 7, "noun_phrase": "a red square", "category_id": 1},
        {"video_id": 7, "noun_phrase": "a bird", "category_id": 3},
    ]
    (root / "instances.json").write_text(json.dumps(raw))
    data = read_videos(root)
    names = {data.categories[i] for i in data.videos[0].categories()}
    assert names == {"a red square", "dog"}
    assert {data.categories[i] for i in data.videos[0].negative_ids} == {"a red square", "a bird"}


def test_wrong_lengths_and_unknown_videos_are_counted(tmp_path):
    root = made.write_ytvis(tmp_path)
    raw = json.loads((root / "instances.json").read_text())
    raw["annotations"][0]["segmentations"].pop()
    raw["annotations"].append({"video_id": 99, "category_id": 1})
    raw["annotations"][1]["segmentations"][2] = {"size": [3, 3], "counts": [9]}
    (root / "instances.json").write_text(json.dumps(raw))
    problems = read_videos(root).problems
    assert problems["object left out: not one entry for each frame"] == 1
    assert problems["object left out: its video is not listed"] == 1
    assert problems["mask left out: RLE has another size than its picture"] == 1


def spoilt(tmp_path, change):
    """The data of `write_ytvis` with a changed JSON."""
    root = made.write_ytvis(tmp_path)
    raw = json.loads((root / "instances.json").read_text())
    change(raw)
    (root / "instances.json").write_text(json.dumps(raw))
    return root


def every(key, **values):
    """A change of all entries of a section."""
    return lambda raw: [entry.update(values) for entry in raw[key]]


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: [a.update(video_id="7", category_id=f"{a['category_id']}.0") for a in raw["annotations"]],
        lambda raw: [a.update(category_id=["", "cat", "Dog"][a["category_id"]]) for a in raw["annotations"]],
        lambda raw: [raw["videos"][0].update(id="v"), *(a.update(video_id="v") for a in raw["annotations"])],
        lambda raw: raw["categories"].append({"id": 9, "name": "CAT"}),
        every("annotations", iscrowd="0"),
        every("videos", fps="x", width="36", height="24.0"),
        every("videos", neg_category_ids=[3, "nothing", None]),
    ],
    ids=["text", "names", "named video", "same name", "crowd as text", "text numbers", "negatives"],
)  # fmt: skip
def test_videos_are_read_as_loosely_as_pictures(tmp_path, change):
    data = read_videos(spoilt(tmp_path, change))
    (video,) = data.videos
    assert data.categories == {1: "cat", 2: "dog", 3: "bird"}
    assert [(a.id, a.category_id, a.iscrowd) for a in video.labels[2].annotations] == [(1, 1, False), (2, 2, False)]  # fmt: skip
    truth = made.object_masks()
    for k, mask in masks_of(video, 2).items():
        np.testing.assert_array_equal(mask, truth[2, k - 1])


def test_objects_of_named_ids_stay_apart(tmp_path):
    ids = iter(["left", None])
    change = lambda raw: [a.update(object_id=next(ids)) for a in raw["annotations"]]
    (video,) = read_videos(spoilt(tmp_path, change)).videos
    assert sorted(map(len, video.objects().values())) == [2, 6]


def test_a_box_stays_where_its_mask_cannot_be_read(tmp_path):
    def change(raw):
        raw["annotations"][0]["segmentations"][0] = {"size": [3, 3], "counts": [9]}
        raw["annotations"][0]["bboxes"][1] = [None] * 4
        raw["annotations"][0]["segmentations"][1] = None

    data = read_videos(spoilt(tmp_path, change))
    first, second = (data.videos[0].labels[t].annotations for t in (0, 1))
    assert [(a.bbox, a.segmentation) for a in first] == [((2, 3, 9, 7), None)]
    assert not second
    assert data.problems["annotation left out: no box with an area"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw["videos"][0].pop("id"), "needs an `id`"),
        (lambda raw: raw["videos"].append(None), "video None needs"),
        (lambda raw: raw["videos"].append(raw["videos"][0]), "used twice"),
        (lambda raw: raw["categories"][0].pop("name"), "needs an `id` and a `name`"),
        (lambda raw: raw["categories"].append(None), "category None"),
        (every("annotations", video_id=[7]), "its video is not listed"),
        (every("annotations", category_id=99), "its category is not listed"),
        (every("annotations", segmentations=3), "not one entry for each frame"),
        (every("videos", file_names=3), "lists no frame"),
        (every("videos", file_names=[3]), "lists no frame"),
        (every("videos", file_names=["../../a.jpg"] * 6), "6 of 6 frames of video .* are missing"),
        (every("videos", file_names=["/etc/hostname"] * 6), "outside the data folder"),
    ],
)
def test_what_is_wrong_with_videos_is_a_sentence(tmp_path, change, says):
    with pytest.raises(DataError, match=says):
        read_videos(spoilt(tmp_path, change))


def test_odd_entries_of_videos_are_counted(tmp_path):
    def change(raw):
        raw["annotations"] += [None, 3, {"video_id": 7}]
        raw["annotations"][0]["iscrowd"] = 2
        raw["videos"][0] |= {"neg_category_ids": 3}

    problems = read_videos(spoilt(tmp_path, change)).problems
    assert problems == {
        "object left out: its video is not listed": 2,
        "object left out: its category is not listed": 1,
        "iscrowd is neither 0 nor 1 (read as 0)": 1,
        "`neg_category_ids` is no list (taken as empty)": 1,
    }


def test_masks_of_0_and_255_only_are_binary(tmp_path):
    root = made.write_palette(tmp_path)
    for t, file in enumerate(sorted((root / "Annotations" / "walk").iterdir())):
        Image.fromarray((made.object_masks()[t, 0] * 255).astype(np.uint8)).save(file)
    data = read_videos(root)
    assert set(data.videos[0].objects()) == {1}
    assert any("255 is taken for object 1" in p for p in data.problems)


def test_one_folder_an_object(tmp_path):
    """SA-V's validation layout."""
    root = made.write_palette(tmp_path)
    folder = root / "Annotations" / "walk"
    for file in list(folder.iterdir()):
        file.unlink()
    for k in range(2):
        (folder / f"{k:03d}").mkdir()
        for t in (0, 2, 4):
            Image.fromarray(made.object_masks()[t, k]).save(folder / f"{k:03d}" / f"{t:05d}.png")
    (video,) = read_videos(root).videos
    assert video.objects() == {0: [0, 2, 4], 1: [2]}
    assert video.annotated == (0, 2, 4)


def test_categories_of_youtube_vos(tmp_path):
    root = made.write_palette(tmp_path)
    meta = {"videos": {"walk": {"objects": {"1": {"category": "cat"}, "2": {"category": "dog"}}}}}
    (root / "meta.json").write_text(json.dumps(meta))
    data = read_videos(root)
    assert sorted(data.categories.values()) == ["cat", "dog"]
    names = {a.id: data.categories[a.category_id] for a in data.videos[0].labels[2].annotations}
    assert names == {1: "cat", 2: "dog"}


def test_mot_has_boxes_only(tmp_path):
    folder = tmp_path / "street"
    (folder / "img1").mkdir(parents=True)
    (folder / "gt").mkdir()
    for t, picture in enumerate(made.pictures()):
        Image.fromarray(picture).save(folder / "img1" / f"{t + 1:06d}.jpg")
    rows = ["1,5,-2,3,9,7,1,1,1", "2,5,2,3,9,7,1,1,.5", "2,6,0,0,4,4,0,1,1", "99,5,1,1,2,2,1,1,1"]
    (folder / "gt" / "gt.txt").write_text("\n".join(rows))
    data = read_videos(tmp_path)
    (video,) = data.videos
    assert video.objects() == {5: [0, 1]}
    assert video.labels[0].annotations[0].bbox == (0, 3, 7, 7)
    assert video.labels[0].annotations[0].segmentation is None
    assert data.problems == {
        "box reached over the picture's edge (cut)": 1,
        "row left out: not to be considered, or no such frame": 2,
    }


def broken(tmp_path, kind: str):
    root = made.write_palette(tmp_path)
    file = root / "Annotations" / "walk" / "00002.png"
    frame = root / "JPEGImages" / "walk" / "00003.jpg"
    if kind == "colour":
        Image.open(file).convert("RGB").save(file)
    elif kind == "size":
        Image.new("P", (9, 9)).save(file)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:40])
    elif kind == "mixed":
        Image.new("RGB", (20, 20)).save(frame)
        return read_videos(root).videos[0].frames[3]
    elif kind == "empty":
        for f in (root / "JPEGImages" / "walk").iterdir():
            f.unlink()
    elif kind == "names":
        for k, f in enumerate(sorted((root / "Annotations" / "walk").iterdir())):
            f.rename(f.with_stem(f"mask{k}"))
    return read_videos(root)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("colour", "is in colour"),
        ("size", "9 x 9 pixels, its frame 36 x 24"),
        ("cut", "cannot be read"),
        ("mixed", "20 x 20 pixels, the first frame 36 x 24"),
        ("empty", "has no frame"),
        ("names", "has the name of a frame"),
    ],
)
def test_bad_files_get_a_sentence(tmp_path, kind, says):
    with pytest.raises(DataError, match=says):
        broken(tmp_path, kind)


def test_nothing_there_gets_a_sentence(tmp_path):
    for path, says in ((tmp_path / "no", "no videos at"), (tmp_path, "expected one JSON")):
        with pytest.raises(DataError, match=says):
            read_videos(path)
    (tmp_path / "x.json").write_text(json.dumps({"images": []}))
    with pytest.raises(DataError, match="is not a video data set"):
        read_videos(tmp_path)
    with pytest.raises(DataError, match="holds no frame"):
        open_frames(tmp_path)
    with pytest.raises(DataError, match="no film"):
        open_frames(tmp_path / "x.mp4")


def test_frames_sort_by_number(tmp_path):
    for k in (10, 9, 1):
        Image.new("RGB", (4, 3), (k, 0, 0)).save(tmp_path / f"frame_{k}.png")
    frames = open_frames(tmp_path)
    assert [int(frames[k][0, 0, 0]) for k in range(3)] == [1, 9, 10]
    assert (frames.width, frames.height) == (4, 3)
    Image.new("L", (4, 3)).save(tmp_path / "1²3.png")  # a digit to some, no number
    assert len(open_frames(tmp_path)) >= 4


def test_frames_are_read_as_the_settings_say(tmp_path):
    root = made.write_ytvis(tmp_path / "v")
    files = sorted((root / "JPEGImages").rglob("*.*"))
    with Image.open(files[0]) as first:
        deep = np.full(first.size[::-1], 100, np.uint16)
    for file in files:
        Image.fromarray(deep).save(file, "PNG")
    settings = {"task": "clips", "data": {"train": str(root), "window": [0, 200]}}
    dataset, _, _ = open_videos(parse_config(settings))
    assert np.unique(dataset.videos[0].frames[0]).tolist() == [128]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    pytest.importorskip("av", reason="films need PyAV")
    flat = np.arange(30, dtype=np.uint8)[:, None, None, None] * np.full((1, 32, 48, 3), 8, np.uint8)
    return made.write_film(tmp_path_factory.mktemp("film") / "grey.mp4", flat)


def test_a_film_gives_each_frame_in_any_order(film):
    frames = Film(film)
    assert (len(frames), frames.width, frames.height, frames.rate) == (30, 48, 32, 5.0)
    value = lambda k: round(float(frames[k].mean()) / 8)
    orders = [range(30), range(29, -1, -1), np.random.default_rng(0).permutation(30)]
    for order in orders:
        assert [value(int(k)) for k in order] == [int(k) for k in order]
    again = pickle.loads(pickle.dumps(frames))  # workers get a copy
    np.testing.assert_array_equal(again[17], frames[17])
    assert value(-1) == 29
    with pytest.raises(IndexError):
        frames[30]


@pytest.mark.parametrize(
    ("ending", "codec", "group"),
    [("mpg", "mpeg1video", 6), ("mpg", "mpeg1video", 300), ("mpeg", "mpeg2video", 6), ("avi", "mpeg4", 6)],
)  # fmt: skip
def test_films_without_an_index_give_each_frame_in_any_order(tmp_path, ending, codec, group):
    av = pytest.importorskip("av", reason="films need PyAV")
    flat = np.arange(60, dtype=np.uint8)[:, None, None, None] * np.full((1, 48, 64, 3), 4, np.uint8)
    file = made.write_film(tmp_path / f"grey.{ending}", flat, 25, codec, group)
    with av.open(str(file)) as container:
        truth = [f.to_ndarray(format="rgb24").mean() for f in container.decode(video=0)]
    frames = Film(file)
    assert len(frames) == len(truth) == 60
    for k in (59, 30, 42, 3, 25, 24, 23, 0):
        assert frames[k].mean() == pytest.approx(truth[k], abs=0.5), k


def test_a_film_cut_without_encoding_begins_where_players_begin(film, tmp_path):
    av = pytest.importorskip("av", reason="films need PyAV")
    cut = tmp_path / "cut.mp4"
    with av.open(str(film)) as source, av.open(str(cut), "w") as target:
        stream = source.streams.video[0]
        copy, begin = target.add_stream_from_template(stream), round(2 / stream.time_base)
        for packet in source.demux(stream):  # as `ffmpeg -ss 2 -c copy` does
            if packet.dts is not None and packet.pts >= round(1.6 / stream.time_base):
                packet.pts, packet.dts, packet.stream = packet.pts - begin, packet.dts - begin, copy
                target.mux(packet)
    with av.open(str(cut)) as container:
        truth = [f.to_ndarray(format="rgb24").mean() for f in container.decode(video=0)]
    frames = Film(cut)
    assert len(frames) == len(truth) == 20
    np.testing.assert_allclose([frames[k].mean() for k in range(20)], truth, atol=0.5)


def test_a_damaged_film_gets_a_sentence(film, tmp_path):
    whole = film.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot be read|holds no frame"):
        Film(cut)
    text = tmp_path / "text.mp4"
    text.write_text("no film")
    with pytest.raises(DataError, match="it is damaged or no film"):
        Film(text)


def test_a_film_without_pyav_gets_a_sentence(film, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"needs PyAV: pip install 'sam3jax\[video\]'"):
        Film(film)


@pytest.mark.skipif(not made.SHARED.is_dir(), reason="the shared videos are not here")
def test_the_shared_videos_read_alike_in_both_formats():
    masks = read_videos(made.SHARED)
    boxes = read_videos(made.SHARED / "instances.json")
    assert [v.name for v in boxes.videos] == [
        "car-shadow",
        "libby",
        "blackswan",
        "composite-car-dog",
    ]
    by_name = {v.name: v for v in masks.videos}
    assert sorted(boxes.categories.values()) == ["car", "dog", "swan"]
    for video in boxes.videos:
        twin = by_name[video.name]
        assert isinstance(video.frames, FrameFiles)
        assert len(video.labels) == len(twin.labels) == len(video.frames)
        for t in range(0, len(video.labels), 7):
            a, b = masks_of(video, t), masks_of(twin, t)
            assert set(a) == set(b)
            assert all(np.array_equal(a[i], b[i]) for i in a)


def test_what_cannot_be_read_of_sa_v_is_counted(tmp_path):
    folder = tmp_path / "walk"
    folder.mkdir()
    for t, pixels in enumerate(made.pictures()):
        Image.fromarray(pixels).save(folder / f"{t}.jpg")
    rows, columns = made.SIZE
    there = {"size": [rows, columns], "counts": [5, 9, rows * columns - 14]}
    absent, bad = (
        {"size": [rows, columns], "counts": [rows * columns]},
        {"size": [3, 3], "counts": [9]},
    )
    raw = {"masklet": [[there, absent, bad], [absent, there, None]], "masklet_id": ["a", 7, 8]}
    (tmp_path / "walk_manual.json").write_text(json.dumps(raw))
    data = read_videos(tmp_path)
    assert data.videos[0].annotated == (0, 4)
    assert sorted(map(len, data.videos[0].objects().values())) == [1, 1]
    assert data.problems == {"mask left out: RLE has another size than its picture": 1}
    (tmp_path / "walk_manual.json").write_text(json.dumps({"masklet": 3}))
    with pytest.raises(DataError, match="no list `masklet`"):
        read_videos(tmp_path)
