"""Which files are taken: splits, pictures, and what lies beside them by accident or by malice."""

from __future__ import annotations

import json
import os
import threading
import unicodedata

import pytest

from sam3jax import doctor
from sam3jax.config import parse_config
from sam3jax.data.coco import DataError
from sam3jax.data.datasets import open_datasets
from sam3jax.data.folders import find_splits, read_dataset
from tests.coco_folders import annotation, picture, write

ITEMS = [annotation(k, k, 1, (2 + k, 2, 20, 18)) for k in range(2)]


def config_of(folder, **data):
    return parse_config({"model": {"preset": "tiny"}, "data": {"train": str(folder), **data}})


def entry(id, name, **more):
    return {"id": id, "file_name": name, "width": 60, "height": 40, **more}


def listed(tmp_path, images, files, items=ITEMS):
    """A folder whose JSON lists `images`, and which holds `files`."""
    for k, name in enumerate(files):
        picture(tmp_path / "d" / name, 60, 40, seed=k)
    return write(tmp_path / "d", list(items), images=images, pictures=False)


# ---- splits


@pytest.mark.parametrize("stray", [
    ".vscode/settings.json", "__MACOSX/._x.json", "metadata/info.json", "labels/classes.json",
    "runs/summary.json", "._train.json", ".DS_Store.json", "annotations/._instances_train.json",
])  # fmt: skip
@pytest.mark.parametrize("layout", ["roboflow", "classic", "flat"])
def test_foreign_files_hide_nothing(tmp_path, stray, layout):
    root = tmp_path / "d"
    if layout == "roboflow":
        write(root / "train", ITEMS)
        write(root / "valid", ITEMS)
    elif layout == "classic":
        for split in ("train", "val"):
            write(root / split, ITEMS, name="x.json")
            (root / "annotations").mkdir(exist_ok=True)
            (root / split / "x.json").rename(root / "annotations" / f"instances_{split}.json")
    else:
        write(root, ITEMS, name="labels.json")
    before = find_splits(root)
    (root / stray).parent.mkdir(parents=True, exist_ok=True)
    (root / stray).write_bytes(b"\0\5\x16\7 not JSON" if "._" in stray else b'{"a": 1}')
    assert find_splits(root) == before
    assert len(open_datasets(config_of(root))[0].images) == 3


@pytest.mark.parametrize("split", ["train", "valid"])
def test_two_coco_files_in_a_split_are_asked_about(tmp_path, capsys, split):
    for name in ("train", "valid"):
        write(tmp_path / "d" / name, ITEMS, name="train.json")
    write(tmp_path / "d" / split, ITEMS, name="backup.json")
    with pytest.raises(DataError, match=r"holds backup\.json and .*train\.json: which\?"):
        open_datasets(config_of(tmp_path / "d"))
    assert doctor.main([str(tmp_path / "d")]) == 2
    assert "which?" in capsys.readouterr().err


def test_a_json_of_something_else_beside_the_annotations_is_no_second_one(tmp_path):
    write(tmp_path / "d" / "train", ITEMS, name="labels.json")
    (tmp_path / "d" / "train" / "settings.json").write_text("{}")
    assert find_splits(tmp_path / "d")["train"].name == "labels.json"


def test_a_damaged_split_is_said_and_not_left_out(tmp_path, capsys):
    write(tmp_path / "d" / "train", ITEMS)
    (tmp_path / "d" / "valid").mkdir()
    (tmp_path / "d" / "valid" / "labels.json").write_text("{oh")
    with pytest.raises(DataError, match="is not JSON"):
        open_datasets(config_of(tmp_path / "d"))
    assert doctor.main([str(tmp_path / "d"), "--output", str(tmp_path / "o")]) == 2
    captured = capsys.readouterr()
    assert "split train" in captured.out
    assert "is not JSON" in captured.err
    assert json.loads((tmp_path / "o" / "doctor.json").read_text())["errors"]


def test_annotations_beside_split_folders_count_for_other_splits(tmp_path):
    write(tmp_path / "d" / "train", ITEMS)
    write(tmp_path / "d" / "val", ITEMS, name="x.json")
    (tmp_path / "d" / "annotations").mkdir()
    (tmp_path / "d" / "val" / "x.json").rename(
        tmp_path / "d" / "annotations" / "instances_val.json"
    )
    assert list(find_splits(tmp_path / "d")) == ["train", "val"]
    assert open_datasets(config_of(tmp_path / "d"))[1] is not None


def test_a_split_that_is_not_there_is_refused_with_the_list(tmp_path):
    write(tmp_path / "d" / "train", ITEMS)
    write(tmp_path / "d" / "dev", ITEMS)
    assert open_datasets(config_of(tmp_path / "d"))[1] is None  # nothing was asked for
    with pytest.raises(DataError, match=r"no split 'validation', it has train, dev: set data\.valid_split"):  # fmt: skip
        open_datasets(config_of(tmp_path / "d", valid_split="validation"))
    assert open_datasets(config_of(tmp_path / "d", valid_split="dev"))[1] is not None


@pytest.mark.parametrize("layout", ["d/train", "d"])
@pytest.mark.parametrize("key", ["train_split", "valid_split"])
def test_doctor_refuses_the_splits_that_training_refuses(tmp_path, capsys, layout, key):
    write(tmp_path / layout, ITEMS)
    with pytest.raises(DataError, match="has no split 'vaild'"):
        open_datasets(config_of(tmp_path / "d", **{key: "vaild"}))
    words = [str(tmp_path / "d"), "--output", str(tmp_path / "o")]
    assert doctor.main([*words, f"data.{key}=vaild"]) == 2
    assert "has no split 'vaild'" in capsys.readouterr().err
    assert doctor.main(words) == 0


def test_a_folder_without_splits_answers_no_split(tmp_path):
    flat = write(tmp_path / "d", ITEMS)
    for split in ("train", "valid", "all"):
        assert len(read_dataset(flat, split).images) == 3
    with pytest.raises(DataError, match="has no split 'test', it has no splits"):
        read_dataset(flat, "test")
    assert len(read_dataset(write(tmp_path / "test", ITEMS), "test").images) == 3


# ---- JSON


DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (DEEP, "nested too deeply"),
        ("", "is empty"),
        ("{oh", "is not JSON"),
        ('{"images": [' + "9" * 5000 + "]}", "is not JSON"),
        ("\x93\x94", "is not JSON"),
        ("null", "is not COCO"),
        ("7", "is not COCO"),
        ('"text"', "is not COCO"),
        ('{"videos": [], "annotations": [], "categories": []}', "is video data"),
        ('{"images": {}, "annotations": [], "categories": [{}]}', "no list `images`"),
    ],
)
def test_what_is_no_coco_is_one_sentence(tmp_path, capsys, text, sentence):
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "_annotations.coco.json"
    file.write_bytes(text.encode("latin-1"))
    for path in (tmp_path / "d", file):
        with pytest.raises(DataError, match=sentence):
            read_dataset(path)
        assert doctor.main([str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_section_that_stands_twice_is_not_lost(tmp_path):
    folder = write(tmp_path / "d", ITEMS)
    file = folder / "_annotations.coco.json"
    text = file.read_text()
    file.write_text(text[:-1] + ', "annotations": []}')
    with pytest.raises(DataError, match="`annotations` stands in it twice"):
        read_dataset(folder)
    # The word in a text is no second section.
    coco = json.loads(text) | {"info": {"note": 'has "annotations" and "images"', "images": 3}}
    file.write_text(json.dumps(coco))
    assert len(read_dataset(folder).images) == 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_of_other_encodings_is_read(tmp_path, encoding):
    folder = write(tmp_path / "d" / "train", ITEMS, name="labels.json")
    file = folder / "labels.json"
    file.write_bytes(file.read_text().encode(encoding))
    assert len(read_dataset(tmp_path / "d").images) == 3


# ---- pictures


def test_a_missing_subfolder_is_no_other_picture(tmp_path):
    folder = listed(tmp_path, [entry(0, "0001.png"), entry(1, "cam1/0001.png")], ["0001.png"])
    with pytest.raises(DataError, match=r"'cam1/0001\.png' is missing"):
        read_dataset(folder)
    folder = listed(tmp_path / "b", [entry(0, "a/1.png"), entry(1, "b/1.png")], ["1.png"])
    with pytest.raises(DataError, match=r"'[ab]/1\.png' is missing"):
        read_dataset(folder)


def test_equal_names_in_subfolders_are_two_pictures(tmp_path):
    images = [entry(0, "cam0/1.png"), entry(1, "cam1\\1.png")]
    dataset = read_dataset(listed(tmp_path, images, ["cam0/1.png", "cam1/1.png"]))
    assert [i.file.parent.name for i in dataset.images] == ["cam0", "cam1"]
    assert [len(i.annotations) for i in dataset.images] == [1, 1]


@pytest.mark.parametrize("name", ["1.png", "./1.png", "train/1.png"])
def test_one_file_under_two_ids_is_one_picture_with_the_annotations_of_both(tmp_path, name):
    """Else each half teaches that the other is absent."""
    root = tmp_path / "d" / "train"
    picture(root / "1.png", 60, 40)
    twin = dict(ITEMS[0], id=9, image_id=1)  # the same object again, under the other id
    write(root, [*ITEMS, twin], images=[entry(0, "1.png"), entry(1, name)], pictures=False)
    dataset = read_dataset(tmp_path / "d")
    (found,) = dataset.images
    assert sorted(a.id for a in found.annotations) == [0, 1]
    assert dataset.problems["picture listed more than once under different ids (made one)"] == 1
    assert dataset.problems.total("annotation left out") == 1


def test_one_file_under_two_sizes_is_two_pictures_that_lost_their_folders(tmp_path):
    folder = listed(tmp_path, [entry(0, "1.png"), entry(1, "1.png", width=99)], ["1.png"])
    with pytest.raises(DataError, match="two ids as 60 x 40 and as 99 x 40: two pictures"):
        read_dataset(folder)


def test_absences_of_two_entries_of_a_file_are_joined(tmp_path):
    images = [entry(0, "1.png", neg_category_ids=[2]), entry(1, "1.png", neg_category_ids=[3])]
    (found,) = read_dataset(listed(tmp_path, images, ["1.png"])).images
    assert found.negative_ids == {2, 3}


NEAR = [
    ("IMG.JPG", "img.jpg"),
    ("a%20b.png", "a b.png"),
    ("a b.png", "a%20b.png"),
    (unicodedata.normalize("NFC", "café.png"), unicodedata.normalize("NFD", "café.png")),
    (unicodedata.normalize("NFD", "café.png"), unicodedata.normalize("NFC", "café.png")),
    ("a.jpeg", "a.jpg"),
    ("0a1b2c3d-a.png", "a.png"),
    ("1.png", "\uff11.png"),
    ("lost.png", "deep/er/lost.png"),
]


@pytest.mark.parametrize(("stated", "there"), NEAR)
def test_near_names_are_offered(tmp_path, stated, there):
    folder = listed(tmp_path, [entry(0, stated)], [there], ITEMS[:1])
    with pytest.raises(DataError, match=r"1 of 1 pictures listed .* are missing") as caught:
        read_dataset(folder)
    assert f"there is {there!r}" in str(caught.value)


@pytest.mark.parametrize("bad", [None, "", " ", [], {}, True, "/", "..", ".", "a/..", "x" * 5000, "a\0b.png"])  # fmt: skip
def test_names_of_no_file_are_refused(tmp_path, bad):
    folder = listed(tmp_path, [entry(0, bad), entry(1, "1.png")], ["1.png"])
    with pytest.raises(DataError, match=r"needs an `id`|missing"):
        read_dataset(folder)


@pytest.mark.parametrize("how", ["dots", "absolute", "link", "linked folder"])
def test_pictures_outside_the_folder_are_refused_unless_allowed(tmp_path, how):
    secret = tmp_path / "elsewhere" / "secret.png"
    picture(secret, 60, 40)
    inside = tmp_path / "d" / "train"
    inside.mkdir(parents=True)
    name = {"dots": "../../elsewhere/secret.png", "absolute": str(secret), "link": "a.png", "linked folder": "sub/secret.png"}[how]  # fmt: skip
    if how == "link":
        (inside / "a.png").symlink_to(secret)
    elif how == "linked folder":
        (inside / "sub").symlink_to(secret.parent)
    write(inside, ITEMS[:1], images=[entry(0, name)], pictures=False)
    with pytest.raises(DataError, match=r"outside the data folder .*data\.allow_outside=true"):
        open_datasets(config_of(tmp_path / "d"))
    train, _ = open_datasets(config_of(tmp_path / "d", allow_outside=True))
    assert train.images[0].file.resolve() == secret


def test_links_and_dots_that_stay_inside_are_fine(tmp_path):
    picture(tmp_path / "d" / "images" / "0.png", 60, 40)
    folder = tmp_path / "d" / "annotations"
    write(
        folder, ITEMS[:1], images=[entry(0, "../images/0.png")], pictures=False, name="train.json"
    )
    (tmp_path / "d" / "images" / "1.png").symlink_to("0.png")
    assert len(read_dataset(tmp_path / "d").images) == 1
    assert len(read_dataset(folder / "train.json").images) == 1
    (tmp_path / "linked").symlink_to(tmp_path / "d")  # the data folder itself may be a link
    assert len(read_dataset(tmp_path / "linked").images) == 1


@pytest.mark.parametrize("kind", ["pipe", "broken link", "folder", "socket"])
def test_only_regular_files_are_opened(tmp_path, kind):
    folder = listed(tmp_path, [entry(0, "0.png"), entry(1, "1.png")], ["1.png"])
    path = folder / "0.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "broken link":
        path.symlink_to("nowhere.png")
    elif kind == "folder":
        path.mkdir()
    else:
        import socket

        cwd = os.getcwd()
        os.chdir(folder)  # names of sockets are short
        server = socket.socket(socket.AF_UNIX)
        server.bind("0.png")
        os.chdir(cwd)
        server.close()
    found = []

    def read():
        try:
            read_dataset(folder)
        except DataError as error:
            found.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "reading waits for ever"
    assert found
    assert "no regular file" in found[0] or "missing" in found[0]


def test_a_pipe_in_place_of_the_json_is_no_data_set(tmp_path):
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / "labels.json")
    for path in (tmp_path / "d", tmp_path / "d" / "labels.json"):
        with pytest.raises(DataError, match=r"no COCO annotations|no regular file"):
            read_dataset(path)


def test_pictures_beside_the_json_are_counted_by_name_but_not_what_macos_left(tmp_path):
    folder = listed(tmp_path, [entry(0, "0.png")], ["0.png", "extra.png"], ITEMS[:1])
    (folder / "._0.png").write_bytes(b"\0")
    problems = read_dataset(folder).problems
    assert [str(e) for s in problems for e in problems.entries(s)] == ["extra.png"]
