"""Which files make up a data set: Roboflow and classic COCO layouts, or one JSON file.

Roboflow   root/train/_annotations.coco.json beside the pictures, root/valid, root/test
classic    root/annotations/instances_train2017.json, pictures in root/train2017,
           root/images/train2017, root/images, ...
flat       root/<one>.json beside the pictures or above them; or the path of the JSON itself

Names that begin with a dot (._x, .vscode) or with __MACOSX are never looked at. A folder is a split
where its JSON is COCO; other JSON files (settings, classes) are no concern of ours.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from sam3jax.data import formats
from sam3jax.data.coco import Dataset, load_json, parse_coco
from sam3jax.data.finder import Finder
from sam3jax.data.json_file import looks_like_coco
from sam3jax.data.judgements import nearly_all
from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.pictures import DEFAULT, Header, Reading, check_pictures, no_frame
from sam3jax.data.records import ImageRecord
from sam3jax.data.volumes import neighbours

PICTURES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
    + (".heic", ".heif", ".avif", ".dcm", ".dicom", ".nii")
)
_VALID = ("valid", "val", "validation")
_ALIASES = {"valid": _VALID, "val": _VALID, "train": ("train", "training")}
_SPLIT_WORDS = {"test", *_VALID, *_ALIASES["train"]}
_MACOS = "__MACOSX"
ONLY = "all"  # the split of a folder that has no splits
DEFAULT_SPLITS = ("train", "valid", ONLY)  # what is asked of such a folder without meaning a split


def is_hidden(path: Path) -> bool:
    """Whether macOS or an editor left the file or folder there: ._x, .vscode, __MACOSX."""
    return path.name.startswith(".") or path.name == _MACOS


def is_picture(path: Path) -> bool:
    """Whether a name is that of a picture, or of a volume of slices."""
    return path.suffix.lower() in PICTURES or path.name.lower().endswith(".nii.gz")


def find_splits(path: str | Path) -> dict[str, Path]:
    """Split name -> annotation file. A folder (or JSON) without splits has one, named `all`.

    Raises DataError where the folder does not exist or holds no annotation file, or several of which
    none is the obvious one.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"no data set at {root}: check the path (data.train, data.valid)")
    if not root.is_dir():
        return {ONLY: root}
    splits: dict[str, Path] = {}
    folders = [p for p in entries(root) if p.is_dir() and p.name != "annotations"]
    for folder in sorted(folders, key=lambda p: (not p.name.startswith("train"), p.name)):
        if file := _annotation_file(folder):
            splits[folder.name] = file
    taken = {_kind(name) for name in splits}
    for folder in (root / "annotations", root):
        named = _named_files(folder) if folder.is_dir() else {}
        if splits:  # beside split folders, only what names another split
            named = {n: f for n, f in named.items() if (kind := _kind(n)) and kind not in taken}
        splits |= named
        taken |= {_kind(name) for name in named}
    # Other formats have JSON files too. Without one of them, what is wrong with a file is said when it is read.
    other = "" if any(map(looks_like_coco, splits.values())) else formats.hint(root)
    if other or not splits:
        raise DataError(
            f"no COCO annotations in {root}: expected train/_annotations.coco.json (Roboflow), "
            f"annotations/instances_train*.json (classic COCO), or one .json beside the pictures"
            f"{other}"
        )
    return splits


def has_split(path: str | Path, split: str) -> bool:
    """Whether `split` can be read from `path` as a split of its own."""
    return match_split(find_splits(path), split) is not None


def choose_split(path: str | Path, splits: dict[str, Path], split: str) -> str:
    """Which of the splits of `path` is meant. Raises DataError where none is."""
    name = match_split(splits, split)
    if list(splits) == [ONLY]:
        root = Path(path).expanduser()
        own = {*_words(root.name), *_words(root.stem), *_words(splits[ONLY].stem)}
        name = ONLY if split in DEFAULT_SPLITS or set(names_of(split)) & own else None
    if name is None:
        found = "no splits" if list(splits) == [ONLY] else ", ".join(splits)
        raise DataError(
            f"{path} has no split {split!r}, it has {found}: set data.train_split or "
            f"data.valid_split"
        )
    return name


def read_dataset(
    path: str | Path,
    split: str = "train",
    *,
    check: bool = True,
    allow_outside: bool = False,
    reading: Reading = DEFAULT,
) -> Dataset:
    """One split of a data set, every picture found and (check) its header read.

    A path without splits is read whole for `train`, `valid` and `all`, or for a split that its name
    holds. allow_outside: pictures may lie outside the folder. Raises DataError.
    """
    splits = find_splits(path)
    root = Path(path).expanduser()
    name = choose_split(path, splits, split)
    file = splits[name]
    if not root.is_dir():
        root = file.parent.parent if file.parent.name == "annotations" else file.parent
    locate = Finder(_picture_folders(root, file, name), root, allow_outside=allow_outside)

    def complete(records: list[ImageRecord], ledger: Ledger) -> list[ImageRecord]:
        return _with_headers(records, ledger, reading)

    source = f"{path}:{name}"
    raw, completed = load_json(file), complete if check else None
    dataset = parse_coco(raw, source, str(file), locate, completed, consume=True)
    _note_unlisted(dataset, file.parent)
    return dataset


def _with_headers(
    records: list[ImageRecord], ledger: Ledger, reading: Reading
) -> list[ImageRecord]:
    headers = check_pictures(((r.file, r.width, r.height, r.frame) for r in records), reading)
    for record, header in zip(records, headers):
        if header.deep == "grey" and reading.window is None:
            ledger.add(
                "picture has more than eight bits: scaled by what it holds; data.window=[low, high] "
                "sets one scale for all",
                record.file.name,
            )
        if header.deep == "colour":
            ledger.add("picture has sixteen bits a colour: the upper eight are read", record.file.name)  # fmt: skip
    records = _of_one_frame(records, headers, ledger)
    if reading.slices > 1:
        _note_lonely(records, headers, ledger)
    paged = {r.file for r in records if r.frame}
    for record, header in zip(records, headers):
        if header.frames > 1 and record.file not in paged:
            ledger.add(
                "picture has several frames: the first is read; `frame` of its entry chooses another",
                record.file.name,
                found=header.frames,
            )
    return [
        replace(record, orientation=header.orientation, stored=header.size, reading=reading)
        for record, header in zip(records, headers)
    ]


def _note_lonely(records: list[ImageRecord], headers: list[Header], ledger: Ledger) -> None:
    """Count pictures without neighbours. Raises DataError where nearly none has any."""
    lonely = [r for r, h in zip(records, headers) if h.frames == 1 and set(neighbours(r.file)) == {r.file}]  # fmt: skip
    if nearly_all(len(lonely), len(records)):
        raise DataError(
            f"data.slices=3 finds no neighbours of {len(lonely):,} of {len(records):,} pictures, the first is "
            f"{lonely[0].file}: expected a stack, or files whose names differ in their last number"
        )
    for record in lonely:
        ledger.add("picture has no neighbours: its three channels are equal", record.file.name)


def _of_one_frame(
    records: list[ImageRecord], headers: list[Header], ledger: Ledger
) -> list[ImageRecord]:
    """`frame` of a picture that has only one is the number it had in a film, and chooses nothing.

    Raises DataError where several entries ask for frames of such a picture.
    """
    listed = Counter(record.file for record in records)
    found = []
    for record, header in zip(records, headers):
        if record.frame and header.frames == 1:
            if listed[record.file] > 1:
                raise no_frame(record.file, header.frames, record.frame)
            ledger.add("`frame` of an entry is not used: its picture has one frame", record.file.name, record.id, record.frame)  # fmt: skip
            record = replace(record, frame=0)
        found.append(record)
    return found


def entries(folder: Path) -> list[Path]:
    """What a folder holds, in order, without what macOS or an editor left there."""
    return sorted(p for p in folder.iterdir() if not is_hidden(p))


def _json_files(folder: Path) -> list[Path]:
    """JSON files that may be annotations: labelme's, one a picture, are not."""
    files = [p for p in entries(folder) if p.suffix.lower() == ".json" and p.is_file()]
    return [p for p in files if not formats.is_labelme(p)]


def _annotation_file(folder: Path) -> Path | None:
    """The annotation file of a folder that may be a split. Raises DataError for several."""
    roboflow = folder / "_annotations.coco.json"
    if roboflow.is_file():
        return roboflow
    files = _json_files(folder)
    means_split = bool(_kind(folder.name))
    if len(files) == 1 and means_split:
        return files[0]  # if it is not COCO, that is said when it is read
    coco = [file for file in files if looks_like_coco(file)]
    if len(coco) > 1 and means_split:
        raise DataError(
            f"{folder} holds {_listed(coco)}: which? Keep one of them there, or set data.train or "
            f"data.valid to the path of the JSON itself"
        )
    return coco[0] if len(coco) == 1 else None


def _named_files(folder: Path) -> dict[str, Path]:
    """Split -> JSON, from names such as instances_train2017.json, train.json, data_val.json."""
    files = [f for f in _json_files(folder) if not f.stem.startswith(formats.OTHER_TASKS)]
    if len(files) > 1:  # a file that names a split counts though it cannot be read: that is said
        files = [f for f in files if looks_like_coco(f) or _kind(f.stem)] or files
    instances = [f for f in files if f.stem.startswith("instances_")]
    files = instances or files
    if len(files) == 1 and not _kind(files[0].stem):
        return {ONLY: files[0]}
    return {f.stem.removeprefix("instances_"): f for f in files}


def _listed(files: Iterable[Path]) -> str:
    return " and ".join(file.name for file in files)


def names_of(split: str) -> tuple[str, ...]:
    """What a split may be called: valid is val and validation too."""
    return _ALIASES.get(split, (split,))


def match_split(splits: dict[str, Path], split: str) -> str | None:
    """The split's name among those found: itself, an alias, or one that holds it as a word."""
    wanted = names_of(split)
    for name in wanted:
        if name in splits:
            return name
    for name in wanted:  # train2017, my_train, train-v2
        close = [s for s in splits if name in _words(s)]
        if len(close) == 1:
            return close[0]
        if len(close) > 1:
            raise DataError(
                f"split {split!r} could be {' or '.join(close)}: set data.train_split or "
                f"data.valid_split to one of them"
            )
    return None


def _kind(name: str) -> str | None:
    """train, valid or test, where a name holds such a word."""
    words = _SPLIT_WORDS & set(_words(name))
    for kind in ("train", "valid", "test"):
        if words & set(names_of(kind)):
            return kind
    return None


def _words(name: str) -> list[str]:
    letters = "".join(c if c.isalpha() else " " for c in name.lower())
    return letters.split()


def _picture_folders(root: Path, file: Path, split: str) -> list[Path]:
    """Where the pictures of an annotation file may lie, most likely first."""
    tops = [root, file.parent]
    if file.parent.name == "annotations":
        tops.append(file.parent.parent)
    names = [split, file.stem.removeprefix("instances_"), *_words(split)]
    names += names_of(split)
    folders = [file.parent, file.parent / "images", file.parent / "data"]
    for top in tops:
        for name in names:
            folders += [top / name, top / "images" / name, top / name / "images"]
        folders += [top / "images", top / "data", top]
    return [f for f in dict.fromkeys(folders) if f.is_dir()]


def _note_unlisted(dataset: Dataset, folder: Path) -> None:
    """Count pictures that lie beside the annotation file and are not in it."""
    listed = {image.file.name for image in dataset.images if image.file.parent == folder}
    if not listed or not isinstance(dataset.problems, Ledger):
        return
    for name in sorted(set(os.listdir(folder)) - listed):
        path = Path(name)
        if is_picture(path) and not is_hidden(path):
            dataset.problems.add("picture in the folder but not in the JSON (not used)", name)
