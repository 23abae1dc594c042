"""Which files make up a data set of videos.

YT-VIS JSON, SA-Co's video JSON     one JSON beside JPEGImages/ (or the frames' folders)
DAVIS, MOSE, YouTube-VOS            JPEGImages/VIDEO/*.jpg, Annotations/VIDEO/*.png
SA-V                                FILM_manual.json beside FILM.mp4, or one folder of masks an object
MOT                                 VIDEO/img1/*.jpg, VIDEO/gt/gt.txt: boxes only
"""

from __future__ import annotations

from pathlib import Path

from sam3jax.data import video_json, video_masks
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
    folders = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
    return any(_holds_videos(folder) for folder in folders)


def _holds_videos(folder: Path) -> bool:
    masks = (
        folder / "Annotations"
    )  # Pascal VOC has a folder of this name too, without folders in it
    if (folder / "JPEGImages").is_dir() and masks.is_dir() and any(p.is_dir() for p in masks.iterdir()):  # fmt: skip
        return True
    if video_masks.mot_folders(folder) or any(folder.glob("*_manual.json")):
        return True
    return any(_names_videos(file) for file in sorted(folder.glob("*.json")))


def _names_videos(file: Path) -> bool:
    try:
        data = file.read_bytes()
    except OSError:
        return False
    return b'"videos"' in data and b'"images"' not in data


def read_videos(
    path: str | Path, split: str | None = None, *, allow_outside: bool = False
) -> VideoDataset:
    """A data set in whichever of the formats above lies at `path` (or at path/split).

    allow_outside: frames may lie outside the folder, by their names or by links. Raises DataError naming what
    was looked for.
    """
    root = Path(path).expanduser()
    dataset = _read(root, split, allow_outside)
    if not allow_outside:
        _refuse_links(dataset, root if root.is_dir() else root.parent)
    return dataset


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


def _read(root: Path, split: str | None, allow_outside: bool) -> VideoDataset:
    if split is not None and (root / split).is_dir():
        root = root / split
    if not root.exists():
        raise DataError(f"no videos at {root}: check the path (data.train, data.valid)")
    if root.is_file():
        return video_json.read_json(root, split, allow_outside=allow_outside)
    if (root / "JPEGImages").is_dir() and (root / "Annotations").is_dir():
        return video_masks.read_masks(root, split)
    if found := video_masks.mot_folders(root):
        return video_masks.read_mot(root, found)
    if list(root.glob("*_manual.json")):
        return video_json.read_sav(root)
    files = sorted(root.glob("*.json"))
    if len(files) > 1 and split is not None:
        files = [f for f in files if split in f.stem]
    if len(files) == 1:
        return video_json.read_json(files[0], split, allow_outside=allow_outside)
    raise DataError(
        f"no annotated videos in {root}: expected one JSON with `videos` (YT-VIS), JPEGImages/ with "
        f"Annotations/ (DAVIS, MOSE, YouTube-VOS), *_manual.json beside films (SA-V), or "
        f"VIDEO/img1 with VIDEO/gt/gt.txt (MOT)"
    )
