"""Find phrases in pictures: `python -m sam3jax.predict PICTURES --run RUN --phrase "red circle"`.

In a notebook use `Predictor`, see sam3jax/viewing/predictor.py.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("predict"))

from PIL import Image
from pycocotools import mask as coco_mask

from sam3jax.data.exporters import WRITTEN, export
from sam3jax.data.folders import PICTURES, is_hidden, is_picture
from sam3jax.data.pictures import DataError, Reading, open_rgb, read_header
from sam3jax.data.prompts import VISUAL
from sam3jax.errors import exit_status, plain, remark
from sam3jax.files import make_folder
from sam3jax.inference.full_size import Detections
from sam3jax.options import parse
from sam3jax.predict_clicks import overlay_name, predict_clicks, wants_clicks
from sam3jax.predict_video import predict_videos, video_folders, wants_video
from sam3jax.training.mesh import local_mesh
from sam3jax.video.chunks import NMS_IOU
from sam3jax.viewing.asking import phrase_list
from sam3jax.viewing.predictor import Predictor, PromptError
from sam3jax.viewing.results import PREDICTIONS, Record, check_results, clear_stale

__all__ = ["Detections", "Predictor", "PromptError", "find_pictures", "main"]

_MUCH = 4  # times that a picture's longer side is the model's


def find_pictures(patterns: Iterable[str]) -> list[Path]:
    """Files named, matched by a glob, or lying in a folder (and below), without repeats.

    Raises DataError naming what matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = [
                f for f in path.rglob("*")
                if is_picture(f) and f.is_file()
                and not any(is_hidden(part) for part in (f, *f.parents) if path in part.parents)
            ]  # fmt: skip
            what = "holds no picture (" + " ".join(sorted(PICTURES)) + ")"
        elif path.exists():
            files, what = [path], ""
        else:
            files = [Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file()]
            what = "does not exist" if not glob.has_magic(str(path)) else "matches no file"
        if not files:
            raise DataError(f"no pictures: {pattern} {what}")
        found |= dict.fromkeys(sorted(files))
    return list(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all done; 1: some pictures failed, each named; 2: nothing could be done."""
    options = parse("predict", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.phrase:
        phrase_list(options.phrase)
    if options.model and options.base:
        raise PromptError(
            "--base is the model that a run started from: give --run, or leave --base out"
        )
    grid = (options.grid, options.crops, options.least_iou, options.least_stability)
    if any(x is not None for x in grid) and not options.everything:
        raise PromptError("--grid, --crops, --least-iou and --least-stability go with --everything")
    if wants_clicks(options):
        return _run_clicks(options)
    if not options.phrase and not options.box:
        raise PromptError(
            "nothing to look for: give --phrase, --box around an example, --points on an object, or --everything"
        )
    film = wants_video(options)
    if film and options.frame:
        raise PromptError("--frame is for files of several pages; a video's frames are all asked")
    if not film and (options.reverse or options.frames_per_device is not None):
        raise PromptError(
            "--reverse and --frames-per-device are for videos: give a film, or --video"
        )
    files = options.pictures if film else find_pictures(options.pictures)
    if options.tile and (film or options.box or options.negative_box):
        raise PromptError("--tile goes with --phrase on pictures alone: a box lies in one tile")
    if film and (options.box or options.negative_box or not options.phrase):
        raise PromptError("a video is asked with --phrase; boxes are for pictures")
    paths = [Path(f) for f in files]
    names = {} if film or options.no_overlay else _overlay_names(paths)
    folders = video_folders(paths) if film else ()
    if film and options.format:
        raise PromptError(
            "--format is for pictures; a video's folder holds YT-VIS, COCO and palette PNG"
        )
    exported = [WRITTEN[kind] for kind in options.format]
    check_results(options.output, [*names.values(), *folders, *exported], paths)
    predictor = (
        Predictor.from_model_folder(options.model, mesh=local_mesh())
        if options.model
        else Predictor.from_run(options.run, base=options.base, mesh=local_mesh())
    )
    predictor.reading = replace(predictor.reading, megapixels=options.max_megapixels)
    if options.nms is not None:
        predictor.config = predictor.config.model_copy(update={"shown_nms": options.nms})
    for phrase in options.phrase or [VISUAL]:
        predictor.check_phrase(phrase)
    output = make_folder(options.output)
    if film:
        asked = predictor.of_videos(
            threshold=options.threshold,
            nms=NMS_IOU if options.nms is None else options.nms,
            frames_per_device=options.frames_per_device or 1,
        )
        return int(bool(predict_videos(asked, files, options, output, predictor.reading)))
    failed = predict_files(predictor, files, output, options)
    return _finish(options, len(files), failed, output)


def _finish(options: argparse.Namespace, files: int, failed: int, output: Path) -> int:
    """Say what was written, write it in other formats too; the exit code."""
    print(f"{files - failed} pictures done, results in {output / PREDICTIONS}")
    for kind in dict.fromkeys(options.format):
        found = json.loads((output / PREDICTIONS).read_text())
        print(f"as {kind}: {export(found, kind, output)}")
    if failed:
        print(f"error: {failed} of {files} pictures failed, see above", file=sys.stderr)
    return 1 if failed else 0


def _run_clicks(options: argparse.Namespace) -> int:
    if (
        options.phrase
        or options.tile
        or options.box
        or options.negative_box
        or (options.points and options.everything)
    ):
        raise PromptError(
            "ask one thing: phrases and boxes (with --tile: phrases), or --points, or --everything"
        )
    if options.threshold is not None or options.nms is not None:
        raise PromptError("--threshold and --nms go with --phrase; --least-iou sifts --everything")
    if wants_video(options):
        raise PromptError("a video is asked with --phrase; clicks are for pictures")
    files = find_pictures(options.pictures)
    names = [] if options.no_overlay else [overlay_name(n, f) for n, f in enumerate(files, 1)]
    check_results(options.output, [*names, *(WRITTEN[kind] for kind in options.format)], files)
    output = make_folder(options.output)
    failed = predict_clicks(options, files, output)
    return _finish(options, len(files), failed, output)


def predict_files(
    predictor: Predictor, files: Sequence[Path], output: Path, options: argparse.Namespace
) -> int:
    """Ask every phrase of every picture, write overlays and predictions.json; how many failed."""
    phrases = options.phrase or [None]
    names = {} if options.no_overlay else _overlay_names(files)
    clear_stale(output, names.values(), files)
    ask = dict(boxes=options.box, negative_boxes=options.negative_box, threshold=options.threshold)
    tile = predictor.size if options.tile else None
    squashed, failed, duplicates = Squashed(predictor.size), 0, 0
    written = [*names.values(), *(WRITTEN[kind] for kind in options.format)]
    with Record(output, written, [p or VISUAL for p in phrases]) as record:
        for group in _groups(
            _read_ahead(files, predictor.reading, options.frame), predictor.at_once
        ):
            for number, file, picture, found in _find(predictor, group, phrases, ask, tile):
                if isinstance(found, ValueError):
                    failed += 1
                    print(f"{plain(file)}: {plain(found)}", file=sys.stderr)
                    continue
                if (frames := read_header(file, options.max_megapixels).frames) > 1:
                    which = (
                        f"frame {options.frame} of {frames} is looked at (--frame asks for another)"
                    )
                    print(f"{plain(file)}: {which}", file=sys.stderr)
                width, height = picture.size
                if tile is None:
                    squashed.count(file, width, height)
                record.image(
                    {"id": number, "file_name": str(file), "width": width, "height": height}
                )
                for category, detections in enumerate(found.values(), start=1):
                    duplicates += detections.duplicates
                    for result in detections.to_coco(number, category):
                        area = float(coco_mask.area(result["segmentation"]))
                        record.annotation({**result, "iscrowd": 0, "area": area})
                if not options.no_overlay:
                    predictor.draw(found, picture).save(output / names[file])
                counts = ", ".join(f"{len(d)} {phrase}" for phrase, d in found.items())
                print(f"[{number}/{len(files)}] {plain(file)}: {counts}")
    squashed.say()
    if duplicates:
        overlap = predictor.config.shown_nms
        print(
            f"{duplicates:,} weaker finds on things found already are left out (masks overlap by more than {overlap:g}; --nms 1 keeps them)"
        )
    return failed


class Squashed:
    """Pictures that lose much when they are squashed to the model's square of `size` pixels."""

    def __init__(self, size: int) -> None:
        self._size, self._number, self._first = size, 0, ""

    def count(self, file: Path, width: int, height: int) -> None:
        """Note a picture that was looked at."""
        if max(width, height) > _MUCH * self._size:
            self._number += 1
            self._first = self._first or f"{file} ({width} x {height})"

    def say(self) -> None:
        """One line for all of them."""
        if not self._number:
            return
        who = (
            f"{self._first} was"
            if self._number == 1
            else f"{self._number} pictures, {self._first} first, were"
        )
        remark(
            f"{who} squashed more than {_MUCH} times to {self._size} x {self._size} pixels, where small things are "
            "lost: --tile looks at the parts as well"
        )


Read = tuple[int, Path, Image.Image | DataError]


def _find(
    predictor: Predictor,
    group: Sequence[Read],
    phrases: Sequence[str | None],
    ask: dict[str, Any],
    tile: int | None = None,
) -> Iterator[tuple[int, Path, Any, dict[str, Detections] | ValueError]]:
    """What is in each picture of a group, or why it could not be asked.

    tile: larger pictures are looked at in tiles of so many pixels; None: in none.
    """
    good = [(number, file, p) for number, file, p in group if isinstance(p, Image.Image)]
    bad = {number: p for number, _, p in group if isinstance(p, DataError)}
    found: dict[int, dict[str, Detections] | ValueError] = dict(bad)
    if tile is not None:
        words = [p or VISUAL for p in phrases]
        for number, _, picture in [g for g in good if max(g[2].size) > tile]:
            answers = predictor.predict_tiled(picture, words, ask["threshold"])
            found[number] = dict(zip(words, answers, strict=True))
        good = [g for g in good if max(g[2].size) <= tile]
    if good:
        try:
            predictor.set_images([picture for _, _, picture in good])
            columns = {phrase or VISUAL: predictor.predict_all(phrase, **ask) for phrase in phrases}
            for row, (number, _, _) in enumerate(good):
                found[number] = {phrase: column[row] for phrase, column in columns.items()}
        except PromptError as error:
            if len(good) == 1:
                found[good[0][0]] = error
            else:  # a box that lies outside one picture: ask each alone
                for one in good:
                    found |= {n: f for n, _, _, f in _find(predictor, [one], phrases, ask)}
    for number, file, picture in group:
        yield number, file, picture, found[number]


def _read_ahead(files: Sequence[Path], reading: Reading, frame: int) -> Iterator[Read]:
    """Pictures by number, or the error of each; the next is decoded while this one is looked at.

    frame: page or slice, from 0; what has fewer is an error.
    """

    def read(file: Path) -> Image.Image | DataError:
        try:
            return open_rgb(file, frame=frame, reading=reading)
        except DataError as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read, files[0])
        for k, file in enumerate(files):
            picture = following.result()
            if k + 1 < len(files):
                following = pool.submit(read, files[k + 1])
            yield k + 1, file, picture


def _groups(items: Iterable[Read], size: int) -> Iterator[list[Read]]:
    """Lists of `size` items, the last one shorter."""
    group: list[Read] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _overlay_names(files: Iterable[Path]) -> dict[Path, str]:
    """File names of the overlays; pictures of equal names in different folders do not collide."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for file in files:
        name, number = f"{file.stem}.png", 1
        while name.casefold() in taken:
            number += 1
            name = f"{file.stem}_{number}.png"
        taken.add(name.casefold())
        names[file] = name
    return names
