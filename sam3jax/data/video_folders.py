"""Which files make up a data set of videos.

YT-VIS JSON, SA-Co's video JSON     one JSON beside JPEGImages/ (or the frames' folders)
DAVIS, MOSE, YouTube-VOS            JPEGImages/VIDEO/*.jpg, Annotations/VIDEO/*.png
SA-V                                FILM_manual.json beside FILM.mp4, or one folder of masks an object
MOT                                 VIDEO/img1/*.jpg, VIDEO/gt/gt.txt: boxes only
"""

from __future__ import annotations

from pathlib import Path

from sam3jax.data import video_json, video_masks
from sam3jax.data.folders import DEFAULT_SPLITS, entries, match_split, names_of
from sam3jax.data.frames import Film, FrameFiles
from sam3jax.data.pictures import DataError
from sam3jax.data.videos import VideoDataset


def looks_like_videos(path: str | Path) -> bool:
    """Whether there is video data at `path`; found by names of files and sections, nothing is parsed."""
    root = Path(path).expanduser()
    if root.is_file():
        return _names_videos(root)
    if not root.is_dir():
        return False
    return any(map(_holds_videos, [root, *(p for p in entries(root) if p.is_dir())]))


def has_split(path: str | Path, split: str) -> bool:
    """Whether a folder has a part of this name, as `read_videos` looks for it."""
    root = Path(path).expanduser()
    if not root.is_dir():
        return False
    if _part(root, split) != root:
        return True
    if any(f.stem in names_of(split) for f in (root / "ImageSets").rglob("*.txt")):
        return True
    files = {f.stem: f for f in _jsons(root)}
    return len(files) > 1 and match_split(files, split) is not None


def _part(root: Path, split: str | None) -> Path:
    """The folder of a split, or the root itself."""
    names = names_of(split) if split else ()
    return next((root / name for name in names if (root / name).is_dir()), root)


def _holds_videos(folder: Path) -> bool:
    # Pascal VOC has a folder Annotations too, without folders in it.
    masks = folder / "Annotations"
    if (folder / "JPEGImages").is_dir() and masks.is_dir() and any(p.is_dir() for p in entries(masks)):  # fmt: skip
        return True
    return bool(video_masks.mot_folders(folder) or _masklets(folder) or _jsons(folder))


def _masklets(folder: Path) -> list[Path]:
    return [f for f in entries(folder) if f.name.endswith("_manual.json")]


def _jsons(folder: Path) -> list[Path]:
    """The JSON files of a folder that name videos."""
    return [f for f in entries(folder) if f.suffix.lower() == ".json" and _names_videos(f)]


def _names_videos(file: Path) -> bool:
    try:
        data = file.read_bytes() if file.is_file() else b""
    except OSError:
        return False
    return b'"videos"' in data and b'"images"' not in data and b'"annotations"' in data


def read_videos(
    path: str | Path, split: str | None = None, *, allow_outside: bool = False
) -> VideoDataset:
    """A data set in whichever of the formats above lies at `path` (or at path/split).

    allow_outside: frames may lie outside the folder, by their names or by links. Raises DataError naming what
    was looked for.
    """
    root = Path(path).expanduser()
    if split not in (None, *DEFAULT_SPLITS) and root.is_dir() and not has_split(root, split):
        raise DataError(
            f"{root} has no split {split!r} of videos: set data.train_split or data.valid_split"
        )
    dataset = _read(root, split, allow_outside)
    if not allow_outside:
        _refuse_links(dataset, root if root.is_dir() else _above(root))
    return dataset


def _above(file: Path) -> Path:
    """The folder of the data that a JSON describes."""
    return file.parent.parent if file.parent.name == "annotations" else file.parent


def _refuse_links(dataset: VideoDataset, root: Path) -> None:
    """Raises DataError for a frame or film that a link leads out of the folder to."""
    inside = root.resolve()
    for video in dataset.videos:
        frames = video.frames
        files = frames.files if isinstance(frames, FrameFiles) else ()
        files = (frames.path,) if isinstance(frames, Film) else files
        for file in files:
            if not file.resolve().is_relative_to(inside):
                raise DataError(
                    f"{file} is a link that leads out of {root}: put the frames there, or allow it with "
                    f"data.allow_outside=true (frames are shown in reports)"
                )


def _read(path: Path, split: str | None, allow_outside: bool) -> VideoDataset:
    if not path.exists():
        raise DataError(f"no videos at {path}: check the path (data.train, data.valid)")
    if path.is_file():
        inside = _above(path)
        return video_json.read_json(path, split, root=inside, allow_outside=allow_outside)
    root = _part(path, split)
    if (root / "JPEGImages").is_dir() and (root / "Annotations").is_dir():
        return video_masks.read_masks(root, split)
    if found := video_masks.mot_folders(root):
        return video_masks.read_mot(root, found)
    if _masklets(root):
        return video_json.read_sav(root)
    files = {f.stem: f for f in _jsons(root) or entries(root) if f.suffix.lower() == ".json"}
    if len(files) > 1 and split is not None and (name := match_split(files, split)):
        files = {name: files[name]}
    if len(files) == 1:
        (file,) = files.values()
        return video_json.read_json(file, split, root=path, allow_outside=allow_outside)
    deeper = next((p for p in entries(root) if p.is_dir() and _holds_videos(p)), None)
    raise DataError(
        f"no annotated videos in {root}: expected one JSON with `videos` (YT-VIS), JPEGImages/ with "
        f"Annotations/ (DAVIS, MOSE, YouTube-VOS), *_manual.json beside films (SA-V), or "
        f"VIDEO/img1 with VIDEO/gt/gt.txt (MOT){f'; there are some in {deeper}: give that' if deeper else ''}"
    )
