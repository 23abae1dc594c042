"""python -m sam3jax.doctor DATA [section.key=value ...]: what was read from a data set, what is odd.

Every split is looked at, and all errors are said. The folder --output (default: doctor) gets a contact
sheet of each split, a table of categories, histograms, and doctor.json with every odd entry.

Exit code 0 where the data can be trained on, 2 with one line for each reason where they cannot.

Videos (`task: clips`) get strips instead of the sheet, and a table of objects: see `doctor_videos`.

--import converts YOLO, Pascal VOC, labelme, CVAT, mask or Hugging Face folders into the COCO folder --out first.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("doctor"))

from sam3jax.config import Config, load_config
from sam3jax.data.click_loader import stored_clicks, with_objects
from sam3jax.data.datasets import check_valid_split, open_datasets, prepare_datasets, reading_of
from sam3jax.data.describe import compare, describe
from sam3jax.data.folders import ONLY, choose_split, find_splits, match_split, read_dataset
from sam3jax.data.importers import import_dataset
from sam3jax.data.ledger import DataError
from sam3jax.data.pictures import is_black
from sam3jax.data.records import Dataset
from sam3jax.data.statistics import category_table, same_pictures, summary, twins
from sam3jax.data.video_folders import looks_like_videos
from sam3jax.doctor_videos import examine_videos
from sam3jax.errors import exit_status
from sam3jax.files import FileError, make_folder, write_json
from sam3jax.options import parse
from sam3jax.viewing.data_sheets import choose, contact_sheet, histograms

__all__ = ["describe", "main"]

_SHEET = 16  # pictures of a contact sheet
_SAME = 5  # equal pictures that are named


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at a data set, or import one, as the command line says; returns the exit status."""
    options = parse("doctor", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.format:
        return _import(options)
    config = load_config(None, options.overrides)
    path = str(options.data)
    data = config.data.model_copy(update={"train": path})
    look = examine_videos if looks_like_videos(path) else examine
    return look(config.model_copy(update={"data": data}), path, options)


def examine(config: Config, path: str, options: argparse.Namespace) -> int:
    """Read every split of config.data.train, which is `path`, say what was found, write the folder;
    the exit code."""
    files = find_splits(path)
    splits: dict[str, Dataset] = {}
    errors: list[str] = []
    for split, file in files.items():
        try:
            splits[split] = _read(config, path, split, options.decode)
        except DataError as error:
            errors.append(str(error))
            continue
        print(f"{'data' if split == ONLY else f'split {split}'}: {file}")
        for line in describe(splits[split], config.model.queries):
            print(f"  {line}")
    notes = list(_twins(splits))
    if not errors:
        try:
            train, valid = _as_trained(config, path, files, splits)
            if valid is not None:
                notes += [*compare(train, valid), *_same_pictures(train, valid)]
        except DataError as error:
            errors.append(str(error))
    for note in notes:
        print(f"  {note}")
    if splits:
        errors += _write(Path(options.output), path, files, splits, notes, errors)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else 0


def _read(config: Config, path: str, split: str, decode: bool) -> Dataset:
    data = config.data
    dataset = read_dataset(path, split, allow_outside=data.allow_outside, reading=reading_of(data))
    if decode:
        for image in dataset.images:
            image.open()
    return dataset


def _as_trained(
    config: Config, path: str, files: dict[str, Path], splits: dict[str, Dataset]
) -> tuple[Dataset, Dataset | None]:
    """The data as a training would take them. Raises DataError where it would refuse them."""
    data = config.data
    train = splits[choose_split(path, files, data.train_split)]
    other = match_split(files, data.valid_split)
    own = None if other is None else splits[other]
    if own is None and data.valid is None:
        check_valid_split(data, files)
    train, valid = (
        prepare_datasets(config, train, own) if data.valid is None else open_datasets(config)
    )
    for dataset in (train, valid) if config.task == "clicks" else ():
        if dataset is not None:
            stored_clicks(with_objects(dataset))
    return train, valid


def _same_pictures(train: Dataset, valid: Dataset) -> list[str]:
    same = same_pictures(train, valid)
    if not same:
        return []
    named = ", ".join(b if a == b else f"{a} = {b}" for a, b in same[:_SAME])
    more = ", ..." if same[_SAME:] else ""
    return [
        f"{len(same)} of {len(valid.images)} pictures of {valid.name} are in {train.name} too ({named}{more}): "
        f"what validation measures there is memory"
    ]


def _twins(splits: dict[str, Dataset]) -> Iterator[str]:
    for dataset in splits.values():
        if same := twins(dataset):
            named = ", ".join(f"{b} = {a}" for a, b in same[:_SAME])
            more = ", ..." if same[_SAME:] else ""
            yield (
                f"{len(same)} pictures of {dataset.name} are others over again ({named}{more}): where their "
                f"annotations differ, each teaches that the other's objects are not there"
            )


def _write(
    folder: Path,
    path: str,
    files: dict[str, Path],
    splits: dict[str, Dataset],
    notes: list[str],
    errors: list[str],
) -> list[str]:
    """Write the folder; returns what went wrong with pictures. A folder that cannot be written to is
    said, and no fault of the data."""
    found: list[str] = []
    try:
        make_folder(folder)
        for split, dataset in splits.items():
            try:
                chosen = choose(dataset, _SHEET)
                if dark := [r.file.name for r in chosen if is_black(r.open())]:
                    print(f"  all but black: {', '.join(dark)}; does data.window fit their values?")
                contact_sheet(dataset, chosen).save(folder / f"{split}.jpg", quality=88)
            except DataError as error:
                found.append(str(error))
        histograms(splits, folder / "histograms.png")
        _write_tables(folder, path, files, splits, notes, [*errors, *found])
    except FileError as error:
        print(f"nothing written for you to look at: {error}")
    except OSError as error:
        print(f"nothing written for you to look at: {error}; give --output a folder")
        return found
    print(
        f"look at {folder}/: {', '.join(f'{s}.jpg' for s in splits)}, categories.csv, doctor.json"
    )
    return found


def _write_tables(
    folder: Path,
    path: str,
    files: dict[str, Path],
    splits: dict[str, Dataset],
    notes: list[str],
    errors: list[str],
) -> None:
    table = category_table(splits)
    report: dict[str, Any] = {
        "data": path,
        "errors": errors,
        "notes": notes,
        "splits": {s: {"file": str(files[s]), **summary(d)} for s, d in splits.items()},
        "categories": table,
    }
    write_json(folder / "doctor.json", report)
    with (folder / "categories.csv").open(
        "w", newline="", encoding="utf-8", errors="replace"
    ) as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def _import(options: argparse.Namespace) -> int:
    if options.out is None:
        raise DataError("--import needs --out COCO_DIR, a new folder for the converted data")
    allow = load_config(None, options.overrides).data.allow_outside
    root, out = Path(options.data), Path(options.out)
    for line in import_dataset(options.format, root, out, allow_outside=allow):
        print(line)
    return 0
