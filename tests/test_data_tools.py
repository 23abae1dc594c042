"""Files of other tools in place of COCO are called by their tool, and what lies elsewhere by its place."""

from __future__ import annotations

import json

import pytest

from sam3jax.data.coco import DataError
from sam3jax.data.folders import read_dataset
from tests.coco_folders import annotation, picture, write

POLYGON = {"name": "polygon", "all_points_x": [1, 2, 3], "all_points_y": [1, 2, 3]}
OTHERS = {
    "VIA": {"a.png123": {"filename": "a.png", "size": 123, "regions": [{"shape_attributes": POLYGON}]}},
    "VIA's": {"_via_settings": {}, "_via_img_metadata": {}},
    "Label Studio": [{"id": 1, "annotations": [{"result": []}], "data": {"image": "/data/a.png"}}],
    "Label Studio's": [{"image": "/data/a.png", "label": [{"x": 1, "y": 2, "width": 3, "height": 4}]}],
    "CreateML": [{"image": "a.png", "annotations": [{"label": "x", "coordinates": {"x": 1}}]}],
    "Datumaro": {"info": {}, "categories": {"label": {"labels": []}}, "items": []},
    "SuperAnnotate": {"metadata": {"name": "a.png"}, "instances": []},
    "Supervisely": {"description": "", "objects": [], "size": {"height": 1, "width": 1}},
    "Supervisely's": {"classes": [], "tags": []},
    "FiftyOne": {"samples": []},
    "Labelbox": [{"data_row": {}, "projects": {}}],
}  # fmt: skip


@pytest.mark.parametrize("tool", OTHERS)
def test_what_another_tool_wrote_is_called_by_its_name(tmp_path, tool):
    picture(tmp_path / "a.png", 60, 40)
    (tmp_path / "export.json").write_text(json.dumps(OTHERS[tool]))
    name = tool.removesuffix("'s")
    with pytest.raises(DataError, match=rf"is {name}'s own format, not COCO: export"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("ds/train/_annotations.coco.json", None, r"There is .*ds/train/_annotations.coco.json: give that file"),
        ("export.zip", b"PK\3\4", "export.zip is an archive: unpack it"),
        ("annotations/captions_train.json", None, "is left aside: its name says that it is for another task"),
    ],
)  # fmt: skip
def test_what_lies_elsewhere_is_named(tmp_path, name, content, says):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content or b'{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match=says):
        read_dataset(tmp_path)


@pytest.mark.parametrize(("start", "says"), [(b"PK\3\4", "an archive"), (b"\x1f\x8b\x08", "an archive"), (b"\x89PNG\r\n", "a picture")])  # fmt: skip
def test_what_is_no_text_at_all_is_named(tmp_path, start, says):
    (tmp_path / "file").write_bytes(start + b"\0" * 20)
    with pytest.raises(DataError, match=f"is {says}"):
        read_dataset(tmp_path / "file")


def test_pictures_of_lvis_are_found_by_their_address(tmp_path):
    folder = write(tmp_path / "d", [annotation(0, 0, 1, (2, 3, 20, 18))], images=1)
    file = folder / "_annotations.coco.json"
    raw = json.loads(file.read_text())
    raw["images"][0].pop("file_name")
    raw["images"][0]["coco_url"] = "http://images.cocodataset.org/train2017/0.png"
    file.write_text(json.dumps(raw))
    dataset = read_dataset(folder)
    assert dataset.images[0].file.name == "0.png"
    assert "picture field `coco_url` is read as `file_name`" in dataset.problems


def test_videos_beside_pictures_are_said_to_be_unused(tmp_path):
    folder = write(tmp_path / "d", [annotation(0, 0, 1, (2, 3, 20, 18))], images=1)
    file = folder / "_annotations.coco.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "videos": [{"id": 1}]}))
    (line,) = read_dataset(folder).problems
    assert line.startswith("`videos` of the file is not used")


@pytest.mark.parametrize(("size", "said"), [((400, 300), True), ((120, 90), False)])
def test_many_boxes_in_the_first_hundred_pixels_may_be_percent(tmp_path, size, said):
    boxes = [(1 + 2 * k, 2 + k, 30 + k, 45 + k) for k in range(20)]
    items = [annotation(k, k % 3, 1, box, segmentation=[]) for k, box in enumerate(boxes)]
    problems = read_dataset(write(tmp_path / "d", items, size=size)).problems
    assert any("percent of the picture?" in line for line in problems) == said
