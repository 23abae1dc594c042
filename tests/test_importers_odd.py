"""What exporters really write: every neighbour of the usual layout is read right, or left out by name."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from sam3jax import doctor
from sam3jax.config import parse_config
from sam3jax.data.click_loader import make_click_loader
from sam3jax.data.datasets import read_datasets
from sam3jax.data.transforms import unpack_mask
from tests.coco_folders import picture
from tests.test_importers import OTHER, H, W, voc_object
from tests.video_folders import few_bits

DOG, CAT = tuple(round(v) for v in OTHER), (10, 20, 40, 30)


def put(root, files):
    """Files by their names: None is a picture, an array a mask, text and bytes are themselves."""
    for k, (name, content) in enumerate(files.items()):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            picture(file, W, H, seed=k)
        elif isinstance(content, np.ndarray):
            Image.fromarray(content).save(file)
        else:
            file.write_bytes(content.encode() if isinstance(content, str) else content)


def converted(tmp_path, kind, files, *words):
    """(status, split/picture -> [(label, box)]), the boxes rounded."""
    put(tmp_path / "d", files)
    out = tmp_path / "out"
    status = doctor.main([str(tmp_path / "d"), "--import", kind, "--out", str(out), *words])
    found = {}
    for file in sorted(out.glob("*/_annotations.coco.json")):
        raw = json.loads(file.read_text())
        names = {c["id"]: c["name"] for c in raw["categories"]}
        for image in raw["images"]:
            own = [a for a in raw["annotations"] if a["image_id"] == image["id"]]
            found[f"{file.parent.name}/{image['file_name']}"] = [
                (names[a["category_id"]], tuple(round(v) for v in a["bbox"])) for a in own
            ]
    return status, found


LINE = f"0 {(DOG[0] + DOG[2] / 2) / W} {(DOG[1] + DOG[3] / 2) / H} {DOG[2] / W} {DOG[3] / H}\n"
ROBOFLOW = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 1\nnames: ['dog']\n"  # fmt: skip
BOTH = {"train/a.png": [("dog", DOG)], "valid/b.png": [("dog", DOG)]}


def yolo(yaml=None, images=("train/images/a.png", "valid/images/b.png"), line=LINE, **more):
    files = dict.fromkeys(images)
    for name in images:
        files[name.replace("images", "labels").rpartition(".")[0] + ".txt"] = line
    return {**files, **({"data.yaml": yaml} if yaml else {}), **{k.replace("__", "/").replace("_txt", ".txt"): v for k, v in more.items()}}  # fmt: skip


YOLO = {
    "Roboflow": (yolo(ROBOFLOW), BOTH, "not there (left out) (../test/images"),
    "another machine's": (yolo("path: /content/ds\ntrain: train/images\nval: valid/images\nnames: [dog]"), BOTH, ""),
    "Windows": (yolo("train: C:\\ds\\train\\images\nval: C:\\ds\\valid\\images\nnames: [dog]"), BOTH, ""),
    "ultralytics": (
        yolo("path: ../datasets/x\ntrain: images/train2017\nval: images/val2017\nnames: {0: dog}", ("images/train2017/a.png", "images/val2017/b.png")),
        BOTH, "",
    ),
    "no yaml, folders with years": (yolo(None, ("images/train2017/a.png", "images/val2017/b.png"), classes_txt="dog"), BOTH, ""),
    "lists": (
        yolo("train: train.txt\nval: val.txt\nnames: [dog]", ("images/a.png", "images/b.png"), train_txt="./images/a.png\n./images/gone.png\n", val_txt="/home/me/images/b.png\r\n"),
        BOTH, "its file is missing (./images/gone.png)",
    ),
    "a split that is not there": (
        yolo("train: train/images\nval: val2/images\nnames: [dog]"), {"train/a.png": BOTH["train/a.png"]}, "in no split (not used) (b.png)",
    ),
    "one folder for both": (
        yolo("train: images\nval: images\nnames: [dog]", ("images/a.png",)), {"train/a.png": [("dog", DOG)]}, "in train and in valid (kept in the first) (a.png)",
    ),
    "mark of order": (yolo(None, line="\ufeff" + LINE, classes_txt="\ufeffdog\n"), BOTH, ""),
    "Latin": (yolo(None, classes_txt="D\xf6g".encode("latin-1")), {k: [("Dög", DOG)] for k in BOTH}, "read as Windows-1252"),
    "a class called no": (yolo(ROBOFLOW.replace("'dog'", "no, yes")), {k: [("no", DOG)] for k in BOTH}, ""),
    "names for numbers": (yolo(ROBOFLOW, line=LINE.replace("0 ", "dog ", 1)), BOTH, ""),
    "other endings": (yolo(ROBOFLOW, ("train/images/a.jpeg", "valid/images/b.jfif")), {"train/a.jpeg": [("dog", DOG)], "valid/b.jfif": [("dog", DOG)]}, ""),
    "labels without a picture": (yolo(ROBOFLOW, train__labels__lost_txt=LINE), BOTH, "no picture of its name (lost.txt)"),
    "a file of its own name": ({**yolo(), "coco8.yaml": "train: train/images\nval: valid/images\nnames: {0: dog}", "hyp.yaml": "lr: 1"}, BOTH, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", YOLO)
def test_yolo_as_it_comes(tmp_path, capsys, case):
    files, wanted, said = YOLO[case]
    assert converted(tmp_path, "yolo", files) == (0, wanted)
    assert said in capsys.readouterr().out


def test_the_folder_itself_goes_before_what_lies_beside_it(tmp_path):
    put(tmp_path, yolo(None, ("train/images/other.png",)))
    assert converted(tmp_path, "yolo", yolo(ROBOFLOW)) == (0, BOTH)


@pytest.mark.parametrize("how", ["path", "absolute", "link", "list"])
def test_what_leads_out_of_a_yolo_folder_is_refused_unless_allowed(tmp_path, capsys, how):
    put(tmp_path / "e", yolo(None, ("images/x.png",)))
    yaml = {"path": "path: ../e\ntrain: images", "absolute": f"train: {tmp_path}/e/images", "link": "train: train/images", "list": "train: train.txt"}[how]  # fmt: skip
    files = yolo(f"{yaml}\nnames: [dog]", train_txt=f"{tmp_path}/e/images/x.png")
    put(tmp_path / "d", files)
    if how == "link":
        (tmp_path / "d/train/images/x.png").symlink_to(tmp_path / "e/images/x.png")
    assert converted(tmp_path, "yolo", files) == (2, {})
    assert "x.png lies outside the data folder" in capsys.readouterr().err
    status, found = converted(tmp_path, "yolo", files, "data.allow_outside=true")
    assert status == 0
    assert "train/x.png" in found


def test_what_yolo_cannot_mean_is_a_sentence(tmp_path, capsys):
    yaml = ROBOFLOW.replace("['dog']", "{0: dog, 00: cat}")
    assert converted(tmp_path, "yolo", yolo(yaml))[0] == 2
    assert "or one twice" in capsys.readouterr().err
    two = {"a.yaml": "names: [dog]", "b.yaml": "names: [cat]"}
    assert converted(tmp_path / "b", "yolo", {**yolo(), **two})[0] == 2
    assert "a.yaml and b.yaml: which?" in capsys.readouterr().err
    assert converted(tmp_path / "c", "yolo", yolo(ROBOFLOW, line=f"7{LINE[1:]}"))[0] == 2
    assert "its class has no name" in capsys.readouterr().err


def voc(name="dog", box=DOG, file="a.png", size=""):
    return f"<annotation><filename>{file}</filename>{size}{voc_object(name, box)}</annotation>"


def labelme(label="dog", box=DOG, path="a.png", **more):
    x, y, w, h = box
    shape = {"label": label, "points": [[x, y], [x + w, y + h]], "shape_type": "rectangle"}
    return json.dumps({"imagePath": path, "shapes": [shape], **more})


def cvat(*images, size=""):
    box = lambda label, b: f'<box label="{label}" xtl="{b[0]}" ytl="{b[1]}" xbr="{b[0] + b[2]}" ybr="{b[1] + b[3]}"/>'  # fmt: skip
    inner = "".join(f'<image name="{name}" {size}>{box(label, b)}</image>' for name, label, b in images)  # fmt: skip
    return f"<annotations>{inner}</annotations>"


def inside_json():
    stream = io.BytesIO()
    Image.new("RGB", (W, H), (90, 9, 9)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def hugging_face(objects=None, **columns):
    objects = {"bbox": [DOG], "category": ["dog"]} if objects is None else objects
    return json.dumps({"file_name": "a.png", "objects": objects, **columns}, ensure_ascii=False)


TWINS = {"train/1.png": [("dog", DOG)], "train/c1_1.png": [("cat", CAT)]}
ONE = {"train/a.png": [("dog", DOG)]}
OF_BOTH = {"train/a.png": [("dog", DOG), ("cat", CAT)]}
BLANK = np.zeros((H, W), np.uint8)
OTHERS = {
    "voc twins": ("voc", {"JPEGImages/c0/1.png": None, "JPEGImages/c1/1.png": None, "Annotations/c0/1.xml": voc(), "Annotations/c1/1.xml": voc("cat", CAT)}, TWINS, ""),
    "voc masks": ("voc", {"JPEGImages/a.png": None, "SegmentationObject/a.png": BLANK, "Annotations/a.xml": voc()}, ONE, "1 x mask picture not used"),
    "voc left over": ("voc", {"a.png": None, "a.xml": voc(), ".ipynb_checkpoints/a-checkpoint.xml": voc("cat"), "__MACOSX/._a.xml": "\0"}, ONE, ""),
    "voc unknown picture": ("voc", {"a.png": None, "b.png": None, "a.xml": voc()}, ONE, "no annotation file (b.png)"),
    "voc no size": ("voc", {"a.png": None, "a.xml": voc(size="<size><width>0</width><height>0</height></size>")}, ONE, ""),
    "voc other polygon": ("voc", {"a.png": None, "a.xml": voc().replace("</object>", "<polygon><pt><x>1</x><y>2</y></pt></polygon></object>")}, ONE, "polygon left out"),
    "voc by file name": ("voc", {"p/a.png": None, "x/0001.xml": voc(file="C:\\p\\a.png")}, ONE, ""),
    "cvat twins": ("cvat", {"c0/1.png": None, "c1/1.png": None, "a.xml": cvat(("c0/1.png", "dog", DOG), ("c1\\1.png", "cat", CAT))}, TWINS, ""),
    "cvat one of two": ("cvat", {"c0/1.png": None, "c1/1.png": None, "a.png": None, "a.xml": cvat(("1.png", "dog", DOG), ("a.png", "dog", DOG))}, ONE, "one of several (1.png)"),
    "cvat in two files": ("cvat", {"a.png": None, "a.xml": cvat(("a.png", "dog", DOG)), "b.xml": cvat(("a.png", "cat", CAT))}, OF_BOTH, "made one"),
    "labelme inside": ("labelme", {"a.json": labelme(imageData=inside_json())}, ONE, ""),
    "labelme in two files": ("labelme", {"a.png": None, "a.json": labelme(), "b.json": labelme("cat", CAT)}, OF_BOTH, "made one"),
    "labelme left over": ("labelme", {"a.png": None, "b.png": None, "a.json": labelme(), ".ipynb_checkpoints/a.json": labelme("cat")}, ONE, "no annotation file (b.png)"),
    "huggingface mark": ("huggingface", {"train/a.png": None, "train/metadata.jsonl": "\ufeff" + hugging_face()}, ONE, ""),
    "huggingface line sign": ("huggingface", {"train/a.png": None, "train/metadata.jsonl": hugging_face(note="a\u2028b") + "\r\n"}, ONE, ""),
    "huggingface classes": ("huggingface", {"train/a.png": None, "classes.txt": "\ufeffcat\n\ndog", "train/metadata.jsonl": hugging_face({"bbox": [DOG], "category": [2]})}, ONE, ""),
    "huggingface unknown picture": ("huggingface", {"train/a.png": None, "train/b.png": None, "train/metadata.jsonl": hugging_face(), ".ipynb_checkpoints/metadata.jsonl": hugging_face()}, ONE, "no line names it (b.png)"),
    "huggingface text": ("huggingface", {"train/a.png": None, "train/metadata.jsonl": hugging_face(json.dumps([{"bbox": DOG, "category": "dog"}, None]))}, ONE, "1 x object left out: no category"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_other_formats_as_they_come(tmp_path, capsys, case):
    kind, files, wanted, said = OTHERS[case]
    assert converted(tmp_path, kind, files) == (0, wanted)
    assert said in capsys.readouterr().out


SIZE = "<size><width>320</width><height>240</height></size>"
REFUSED = {
    "voc size": ("voc", {"a.png": None, "a.xml": voc(size=SIZE)}, "its annotations are for 320 x 240"),
    "voc lost folder": ("voc", {"JPEGImages/c0/1.png": None, "Annotations/c0/1.xml": voc(), "Annotations/c1/1.xml": voc()}, "are two pictures"),
    "voc encoding": ("voc", {"a.png": None, "a.xml": '<?xml version="1.0" encoding="GBK"?>' + voc()}, "is not XML (multi-byte"),
    "cvat size": ("cvat", {"a.png": None, "a.xml": cvat(("a.png", "dog", DOG), size='width="320" height="240"')}, "its annotations are for 320 x 240"),
    "cvat lost folder": ("cvat", {"c0/1.png": None, "a.xml": cvat(("c0/1.png", "dog", DOG), ("c1/1.png", "cat", CAT))}, "are two pictures"),
    "cvat shapes": ("cvat", {"a.png": None, "a.xml": '<annotations><image name="a.png"><polygon label="x" points="1,2;3;4,5;6,7"/><mask label="x" rle="0,400000000000" left="1" top="0" width="200000" height="2000000"/></image></annotations>'}, "shape left out: neither area nor box"),
    "labelme size": ("labelme", {"a.png": None, "a.json": labelme(imageWidth=320, imageHeight=240)}, "its annotations are for 320 x 240"),
    "labelme broken inside": ("labelme", {"a.json": labelme(imageData="!")}, "no known format"),
    "huggingface size": ("huggingface", {"train/a.png": None, "train/metadata.jsonl": hugging_face(width=320, height=240)}, "its annotations are for 320 x 240"),
    "huggingface labels": ("huggingface", {"train/a.png": None, "train/metadata.jsonl": hugging_face({"bbox": [DOG], "category": ["dog", "cat"]})}, "not one for each box"),
    "masks photographs": ("masks", {"images/a.png": None, "masks/a.png": np.random.default_rng(0).integers(0, 255, (H, W), np.uint8)}, "values without names"),
    "masks of two kinds": ("masks", {"images/a.png": None, "masks/a.png": BLANK, "masks/a.tif": BLANK}, "several masks of its name (for example a.png)"),
    "masks one an object": ("masks", {"x/images/x.png": None, "x/masks/1.png": BLANK + 1, "x/masks/2.png": BLANK + 1}, "mask left out: no picture of its name"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(tmp_path, capsys, case):
    kind, files, said = REFUSED[case]
    assert converted(tmp_path, kind, files) == (2, {})
    assert said in capsys.readouterr().err


def test_turned_boxes_give_their_bounds_and_turned_ellipses_turn(tmp_path, capsys):
    xml = cvat(("a.png", "dog", (50, 50, 40, 20))).replace("/>", ' rotation="90"/>')
    ellipse = '<ellipse label="cat" cx="50" cy="50" rx="30" ry="10" rotation="-90"/></image>'
    files = {"a.png": None, "a.xml": xml.replace("</image>", ellipse)}
    wanted = {"train/a.png": [("dog", (60, 40, 20, 40)), ("cat", (40, 20, 20, 60))]}
    assert converted(tmp_path, "cvat", files) == (0, wanted)
    assert "box is turned (its bounds are taken) (a.png, id 0" in capsys.readouterr().out


def test_the_folder_that_is_written_does_not_lie_in_the_one_that_is_read(tmp_path, capsys):
    put(tmp_path / "d", yolo(ROBOFLOW))
    words = [str(tmp_path / "d"), "--import", "yolo", "--out", str(tmp_path / "d" / "coco")]
    assert doctor.main(words) == 2
    assert "whose pictures it would double" in capsys.readouterr().err


def values(**places):
    """A mask: v7=(20, 30) is a square of ten pixels of value 7 there."""
    found = BLANK.copy()
    for name, (x, y) in places.items():
        found[y : y + 10, x : x + 10] = int(name[1:])
    return found


def coloured(colour):
    return values(v1=(0, 0))[..., None] * np.broadcast_to(np.uint8(colour), 3)


def jpeg(mask):
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "JPEG", quality=70)
    return stream.getvalue()


A, B = (0, 0, 10, 10), (50, 50, 10, 10)
LABELMAP = (
    "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\nrock:128,128,128::\n"
)
WHITE = np.pad(np.full((40, 60), 255, np.uint8), ((20, H - 60), (20, W - 80)))
MASKS = {
    "unknown": ({"images/a.png": None, "masks/a.png": values(v1=(0, 0), v255=(50, 50))}, [[("object", A)]], "beside other values mean unknown"),
    "white": ({"images/a.png": None, "masks/a.png": values(v255=(50, 50))}, [[("object", B)]], ""),
    "numbers": ({"images/a.png": None, "masks/a.png": values(v1=(0, 0), v2=(50, 50))}, [[("value 1", A), ("value 2", B)]], ""),
    "two bits": ({"images/a.png": None, "masks/a.png": few_bits(values(v1=(0, 0), v3=(50, 50)), 2), "classes.txt": "0\ndog\n2\ncat"}, [[("dog", A), ("cat", B)]], ""),
    "four bits": ({"images/a.png": None, "masks/a.png": few_bits(values(v1=(0, 0), v15=(50, 50)), 4)}, [[("value 1", A), ("value 15", B)]], ""),
    "grey in colour": ({"images/a.png": None, "masks/a.png": coloured(3), "classes.txt": "0\n1\n2\ncat"}, [[("cat", A)]], ""),
    "beside": ({"a.png": None, "a_mask.png": values(v255=(0, 0))}, [[("object", A)]], ""),
    "Roboflow": ({"train/a.png": None, "train/a_mask.png": values(v1=(0, 0), v2=(50, 50)), "train/_classes.csv": "Pixel Value, Class\n0, background\n1, red cup\n2, dog\n"}, [[("red cup", A), ("dog", B)]], ""),
    "CVAT": ({"JPEGImages/a.png": None, "JPEGImages/b.png": None, "SegmentationClass/a.png": coloured((128, 0, 0)), "SegmentationClass/b.png": coloured(128), "labelmap.txt": LABELMAP}, [[("cat", A)], [("rock", A)]], ""),
    "colours": ({"images/a.png": None, "images/b.png": None, "masks/a.png": coloured((128, 0, 0)), "masks/b.png": coloured(128)}, [[("colour #800000", A)], [("colour #808080", A)]], ""),
    "objects": ({"JPEGImages/a.png": None, "SegmentationClass/a.png": values(v1=(0, 0)) + values(v1=(10, 0)), "SegmentationObject/a.png": values(v1=(0, 0), v2=(10, 0)), "classes.txt": "-\ncat"}, [[("cat", A), ("cat", (10, 0, 10, 10))]], ""),
    "JPEG": ({"images/a.png": None, "masks/a.jpg": jpeg(WHITE)}, [[("object", (20, 20, 60, 40))]], "soft edges"),
    "soft": ({"images/a.png": None, "masks/a.png": ndimage.gaussian_filter(WHITE, 0.8)}, [[("object", (20, 20, 60, 40))]], "soft edges"),
    "orphan": ({"images/a.png": None, "masks/a.png": values(v9=(0, 0)), "masks/b.png": BLANK}, [[("object", A)]], "no picture of its name (b.png)"),
}  # fmt: skip


@pytest.mark.parametrize("case", MASKS)
def test_masks_as_they_come(tmp_path, capsys, case):
    files, wanted, said = MASKS[case]
    status, found = converted(tmp_path, "masks", files)
    assert (status, list(found.values())) == (0, wanted)
    assert said in capsys.readouterr().out


def test_pictures_beside_masks_train_clicks_on_the_very_pixels(tmp_path, capsys):
    """Pictures as large as the model reads them: what the loader gives is what the PNG holds."""
    edge, truth = 84, {}
    rng = np.random.default_rng(0)
    for k in range(3):
        index = np.zeros((edge, edge), np.uint8)
        for value in (1, 2):
            top = 40 * value - 35
            index[top : top + 30, 5:75] = value * (rng.random((30, 70)) < 0.9)
        truth[f"{k}.png"] = index
        picture(tmp_path / f"d/images/{k}.png", edge, edge, seed=k)
        (tmp_path / "d/masks").mkdir(exist_ok=True)
        Image.fromarray(index).save(tmp_path / f"d/masks/{k}.png")
    (tmp_path / "d/classes.txt").write_text("-\ncup\ndog\n")
    words = [str(tmp_path / "d"), "--import", "masks", "--out", str(tmp_path / "out")]
    assert doctor.main(words) == 0
    model = dict(preset="tiny", image_size=edge, window_size=3, pretrain_image_size=42)
    settings = {"task": "clicks", "model": model, "batch_size": 3, "data": {"train": str(tmp_path / "out")}, "clicks": {"objects": 2}}  # fmt: skip
    config = parse_config(settings)
    dataset, _ = read_datasets(config)
    batch = next(make_click_loader(dataset, config))
    seen = 0
    for i, k in np.argwhere(batch.valid).tolist():
        index = truth[dataset.images[int(batch.image_id[i])].file.name]
        mask = unpack_mask(batch.masks[i, k], edge)
        value = int(index[mask].max())
        np.testing.assert_array_equal(mask, index == value)
        seen += 1
    assert seen == 6
