"""python -m sam3jax.doctor DATA: says what was read from a data set, and what was odd about it.

Exit code 0 where it can be trained on, 2 with one line where it cannot.
"""

from __future__ import annotations

import argparse
import sys

from sam3jax.data.describe import describe
from sam3jax.data.folders import ONLY, find_splits, read_dataset
from sam3jax.data.pictures import DataError, read_picture


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sam3jax.doctor", description=__doc__)
    parser.add_argument("data", help="folder with pictures and COCO JSON, or the JSON itself")
    parser.add_argument(
        "--decode", action="store_true", help="decode every picture, not only headers"
    )
    options = parser.parse_args(arguments)
    try:
        splits = find_splits(options.data)
        for split, file in splits.items():
            dataset = read_dataset(options.data if split != ONLY else file, split)
            if options.decode:
                for image in dataset.images:
                    read_picture(image.file, image.width, image.height)
            print(f"{'data' if split == ONLY else f'split {split}'}: {file}")
            for line in describe(dataset):
                print(f"  {line}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
