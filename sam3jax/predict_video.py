"""Find phrases in videos: `python -m sam3jax.predict clip.mp4 --run RUN --phrase "red circle"`.

For each film, or folder of frames with --video, one folder NAME in --output:

    overlay.mp4      objects over the frames (overlay.gif without PyAV)
    strip.png        eight frames of it
    ytvis.json       one entry an object: masks, null where it is not seen
    coco.json        every frame a picture, `track_id` the object
    masks/00000.png  palette, the value is the object

Objects keep their numbers by plain tracking by detection: there is no memory, so one that is hidden
for long, or leaves and comes back, is another object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from sam3jax.data.frames import Film, FrameFiles, is_film, open_frames
from sam3jax.data.pictures import DEFAULT, DataError, Reading
from sam3jax.errors import plain
from sam3jax.files import make_folder, write_json
from sam3jax.video.predictor import VideoPredictor
from sam3jax.video.results import VideoResults
from sam3jax.viewing import film
from sam3jax.viewing.draw import Instance
from sam3jax.viewing.results import PREDICTIONS, info

_STRIP = 8  # frames
_NAMED = 8  # objects of a phrase in the strip's title


def wants_video(options: argparse.Namespace) -> bool:
    """Whether the command is about videos: films are named, or folders with --video."""
    return options.video or any(is_film(path) for path in options.pictures)


def predict_videos(
    predictor: VideoPredictor,
    paths: Sequence[str | Path],
    options: argparse.Namespace,
    output: Path,
    reading: Reading = DEFAULT,
) -> int:
    """Ask every phrase of every video and write the files; how many videos failed, each named.

    reading: how frames that are pictures become pixels.
    """
    named = video_folders(map(Path, paths))
    make_folder(output)
    write_json(
        output / PREDICTIONS, {"info": info(named)}
    )  # by which the next call knows the folders
    failed = 0
    for path, name in zip(paths, named, strict=True):
        try:
            frames = open_frames(path, reading)
            folder = make_folder(output / name)
            print(
                f"{plain(path)}: {predict_video(predictor, frames, options, folder)}; see {folder}"
            )
        except DataError as error:
            failed += 1
            print(f"{plain(path)}: {plain(error)}", file=sys.stderr)
    return failed


def predict_video(
    predictor: VideoPredictor, frames: FrameFiles | Film, options: argparse.Namespace, folder: Path
) -> str:
    """One video; a line about what was found. Raises DataError."""
    phrases = options.phrase
    results = VideoResults(folder.name, phrases, len(frames))
    found = predictor.objects(frames, phrases, reverse=options.reverse)
    console = Console(stderr=True)
    for frame in track(found, folder.name, total=len(frames), console=console, transient=True):
        results.add(frame)
    for line in results.write(folder):
        print(line)
    if not options.no_overlay:
        draw = lambda number: instances(results, number)
        film.write_film(folder / "overlay", film.overlays(frames, draw), frames.rate)
        shown = film.evenly(len(frames), _STRIP)
        short = lambda number: [replace(i, label=i.label.rpartition(" ")[2]) for i in draw(number)]
        film.strip(frames, shown, [(_legend(results), short)]).save(folder / "strip.png")
    counts = []
    for phrase in phrases:
        ids = {o.id for f in results.frames.values() for o in f.objects if o.phrase == phrase}
        counts.append(f"{len(ids)} {phrase}")
    return f"{len(frames)} frames, {', '.join(counts)}"


def _legend(results: VideoResults) -> str:
    """The video's name, and which numbers are what."""
    numbers = {
        phrase: sorted(
            {o.id for f in results.frames.values() for o in f.objects if o.phrase == phrase}
        )
        for phrase in results.phrases
    }
    parts = [
        f"{phrase} {' '.join(f'#{i}' for i in ids[:_NAMED])}{' ...' if ids[_NAMED:] else ''}"
        for phrase, ids in numbers.items()
        if ids
    ]
    return f"{results.name}: {', '.join(parts) or 'nothing found'}"


def instances(results: VideoResults, number: int) -> list[Instance]:
    """What is drawn over a frame; an object has one colour in all of them."""
    frame = results.frames.get(number)
    if frame is None:
        return []
    return [
        Instance(f"{o.phrase} #{o.id}", o.box_xyxy, o.mask, o.score, number=o.id - 1)
        for o in frame.objects
    ]


def video_folders(paths: Iterable[Path]) -> list[str]:
    """The name of each video's folder; videos of equal names do not share one."""
    names: list[str] = []
    for path in paths:
        stem = path.stem if path.suffix else path.name
        name, number = stem, 1
        while name.casefold() in map(str.casefold, names):
            number += 1
            name = f"{stem}_{number}"
        names.append(name)
    return names
