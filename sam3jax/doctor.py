"""Say what was read from a data set, and what was odd about it: `python -m sam3jax.doctor DATA`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("doctor"))

from sam3jax.data.describe import describe
from sam3jax.data.folders import ONLY, find_splits, read_dataset
from sam3jax.data.pictures import read_picture
from sam3jax.errors import exit_status
from sam3jax.options import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Describe every split; returns the exit status, 2 where the data cannot be trained on."""
    options = parse("doctor", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    splits = find_splits(options.data)
    for split, file in splits.items():
        dataset = read_dataset(options.data if split != ONLY else file, split)
        if options.decode:
            for image in dataset.images:
                read_picture(image.file, image.width, image.height)
        print(f"{'data' if split == ONLY else f'split {split}'}: {file}")
        for line in describe(dataset):
            print(f"  {line}")
