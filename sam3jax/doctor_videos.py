"""The half of `doctor` for videos: what was read, how long objects are seen, what is left out.

Writes into --output

    train.jpg, valid.jpg   strips of some videos, their objects drawn over annotated frames
    objects.csv            a row for each object of each video
    doctor.json            all of it
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3jax.config import Config
from sam3jax.data.click_loader import with_objects
from sam3jax.data.ledger import DataError
from sam3jax.data.video_sets import frame_records, open_videos, pictures_of
from sam3jax.data.videos import Video, VideoDataset, describe_videos
from sam3jax.errors import plain
from sam3jax.files import FileError, make_folder, write_json
from sam3jax.viewing import draw, film

_STRIPS = 8  # videos drawn
_FRAMES = 6  # of a strip
_SAME = 5  # equal videos that are named


def examine_videos(config: Config, path: str, options: argparse.Namespace) -> int:
    """Read the videos of config.data.train, which is `path`, say what was found, write the folder; the
    exit code: 2 where they cannot be trained on."""
    try:
        train, valid, notes = open_videos(config)
        for dataset in (train, valid) if config.task == "clicks" else ():
            if dataset is not None:
                with_objects(pictures_of(dataset))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    splits = {"train": train, **({"valid": valid} if valid is not None else {})}
    for split, dataset in splits.items():
        print(f"split {split}: {plain(dataset.name)}")
        for line in describe_videos(dataset):
            print(f"  {line}")
    if valid is not None:
        notes = [*notes, *_compare(train, valid)]
    if config.task == "detect":
        notes = [*notes, "these are videos: train on them with task=clips or task=clicks"]
    for note in notes:
        print(f"  {note}")
    rows = {split: list(object_rows(dataset)) for split, dataset in splits.items()}
    errors = list(_decode(splits)) if options.decode else []
    errors += _write(Path(options.output), path, splits, rows, notes)
    for error in errors:
        print(f"error: {plain(error)}", file=sys.stderr)
    return 2 if errors else 0


def object_rows(dataset: VideoDataset) -> Iterator[dict[str, Any]]:
    """For each object of each video: when it is seen, and how large.

    frames: annotated ones that show it; of: annotated frames of its video; gaps: how often it is gone and
    comes back; area: mean share of the picture, of its mask, or of its box where there is none.
    """
    for video in dataset.videos:
        place = {number: k for k, number in enumerate(video.annotated)}
        found: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for number in video.annotated:
            for a in video.labels[number].annotations:
                found.setdefault((a.id, a.category_id), []).append((number, a.area))
        for (id, category), seen in sorted(found.items()):
            numbers = [number for number, _ in seen]
            steps = np.diff([place[n] for n in numbers])
            yield {
                "video": video.name, "object": id, "phrase": dataset.categories[category],
                "first": numbers[0], "last": numbers[-1], "frames": len(numbers), "of": len(place),
                "gaps": int((steps > 1).sum()),
                "area": round(float(np.mean([a for _, a in seen])) / (video.width * video.height), 6),
            }  # fmt: skip


def _compare(train: VideoDataset, valid: VideoDataset) -> Iterator[str]:
    names = lambda dataset: {
        dataset.categories[i] for video in dataset.videos for i in video.categories()
    }
    if new := sorted(names(valid) - names(train)):
        yield f"{len(new)} phrases of {valid.name} are never trained: {', '.join(new[:_SAME])}"
    trained = {v.name for v in train.videos}
    if same := sorted(v.name for v in valid.videos if v.name in trained):
        more = ", ..." if same[_SAME:] else ""
        yield (
            f"{len(same)} of {len(valid.videos)} videos of {valid.name} are named in {train.name} too "
            f"({', '.join(same[:_SAME])}{more}): if they are the same, validation measures memory"
        )


def _decode(splits: dict[str, VideoDataset]) -> Iterator[str]:
    """What is wrong with frames; every one is decoded."""
    for dataset in splits.values():
        for video in dataset.videos:
            for number in range(len(video.frames)):
                try:
                    video.frames[number]
                except DataError as error:
                    yield str(error)


def contact_strips(dataset: VideoDataset) -> Image.Image:
    """Some videos, spread over the set: annotated frames with their objects, a colour for each object."""
    records = frame_records(dataset)
    chosen = film.evenly(len(dataset.videos), _STRIPS)
    strips = []
    for row in chosen:
        video = dataset.videos[row]
        by_number = {r.frame: r for r in records if r.video == row}

        def truth(number: int, by_number=by_number) -> list[draw.Instance]:
            record = by_number[number]
            ids = [a.id for a in record.annotations if not a.iscrowd]
            shown = draw.true_instances(record, dataset.categories)
            return [replace(i, number=id % 64) for i, id in zip(shown, ids, strict=True)]

        numbers = [video.annotated[k] for k in film.evenly(len(video.annotated), _FRAMES)]
        strips.append(film.strip(video.frames, numbers, [(_title(video), truth)]))
    return draw.column(strips)


def _title(video: Video) -> str:
    return f"{plain(video.name)}  {video.width} x {video.height}, {len(video.labels)} frames"


def _write(
    folder: Path,
    path: str,
    splits: dict[str, VideoDataset],
    rows: dict[str, list[dict[str, Any]]],
    notes: list[str],
) -> list[str]:
    """Write the folder; returns what went wrong with frames."""
    errors: list[str] = []
    try:
        make_folder(folder)
        for split, dataset in splits.items():
            try:
                contact_strips(dataset).save(folder / f"{split}.jpg", quality=88)
            except DataError as error:
                errors.append(str(error))
        table = [{"split": split, **row} for split, own in rows.items() for row in own]
        if table:
            with (folder / "objects.csv").open("w", newline="", encoding="utf-8", errors="replace") as stream:  # fmt: skip
                writer = csv.DictWriter(stream, list(table[0]))
                writer.writeheader()
                writer.writerows(table)
        described = {s: {"name": d.name, "videos": len(d.videos), "odd": dict(d.problems)} for s, d in splits.items()}  # fmt: skip
        report = {"data": path, "errors": errors, "notes": notes, "splits": described, "objects": table}  # fmt: skip
        write_json(folder / "doctor.json", report)
    except (OSError, FileError) as error:
        print(f"nothing written for you to look at: {error}; give --output a folder")
        return errors
    print(f"look at {folder}/: {', '.join(f'{s}.jpg' for s in splits)}, objects.csv, doctor.json")
    return errors
