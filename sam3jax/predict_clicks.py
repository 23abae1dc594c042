"""The half of `predict` for clicks: masks of what was clicked on, or of everything in a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

from sam3jax.data.ledger import DataError
from sam3jax.data.pictures import open_rgb
from sam3jax.errors import plain
from sam3jax.viewing.click_predictor import ClickPredictor
from sam3jax.viewing.everything import GridOptions, everything
from sam3jax.viewing.results import Record, clear_stale


def wants_clicks(options: argparse.Namespace) -> bool:
    """Whether the options ask with clicks instead of phrases."""
    return bool(options.points or options.everything)


def predict_clicks(options: argparse.Namespace, files: Sequence[Path], output: Path) -> int:
    """Ask about every file, write overlays and predictions.json; how many pictures failed.

    Raises PromptError for clicks that do not fit the pictures.
    """
    predictor = (
        ClickPredictor.from_model_folder(options.model)
        if options.model
        else ClickPredictor.from_run(options.run, base=options.base)
    )
    predictor.reading = replace(predictor.reading, megapixels=options.max_megapixels)
    names = [] if options.no_overlay else [overlay_name(n, f) for n, f in enumerate(files, 1)]
    clear_stale(output, names, files)
    failed = 0
    with Record(output, names, ["object"]) as record:
        for number, file in enumerate(files, start=1):
            try:
                picture = open_rgb(file, reading=predictor.reading)
            except DataError as error:
                failed += 1
                print(f"{plain(file)}: {plain(error)}", file=sys.stderr)
                continue
            found = _ask(predictor, picture, options)
            width, height = picture.size
            record.image({"id": number, "file_name": str(file), "width": width, "height": height})
            for entry in found:
                place = {"image_id": number, "category_id": 1, "iscrowd": 0}
                record.annotation({**entry, **place})
            if not options.no_overlay:
                masks = np.array([rle_codec.decode(entry["segmentation"]) for entry in found])
                clicks = [c for row in options.points for c in row]
                predictor.picture = picture  # a crop may have been the last one
                drawn = predictor.draw(masks, [c[:2] for c in clicks], [c[2] for c in clicks])
                drawn.save(output / overlay_name(number, file))
            print(f"[{number}/{len(files)}] {plain(file)}: {len(found)} masks")
    return failed


def overlay_name(number: int, file: Path) -> str:
    """The file that shows what was found in picture `number`."""
    return f"{number:04d}_{file.stem[:60]}.png"


def _ask(
    predictor: ClickPredictor, picture: Image.Image, options: argparse.Namespace
) -> list[dict[str, Any]]:
    if options.everything:
        grid = GridOptions(options.grid, options.crops, iou=options.least_iou)
        return everything(predictor, picture, grid)
    predictor.set_image(picture)
    found = []
    for row in options.points:
        # One click may mean several things: the best of three masks; more are clear.
        answer = predictor.predict(
            [c[:2] for c in row], [c[2] for c in row], multimask=len(row) == 1
        )
        best = int(answer.ious[0].argmax())
        rle = rle_codec.encode(np.asfortranarray(answer.masks[0, best].astype(np.uint8)))
        found.append(
            {
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "bbox": rle_codec.toBbox(rle).tolist(),
                "area": float(rle_codec.area(rle)),
                "score": float(answer.ious[0, best]),
            }
        )
    return found
