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

from sam3jax.data.exporters import WRITTEN
from sam3jax.data.ledger import DataError
from sam3jax.data.pictures import open_rgb
from sam3jax.errors import plain, remark
from sam3jax.viewing.asking import PromptError
from sam3jax.viewing.click_predictor import ClickPredictor
from sam3jax.viewing.everything import GridOptions, everything
from sam3jax.viewing.results import Record, clear_stale


def wants_clicks(options: argparse.Namespace) -> bool:
    """Whether the options ask with clicks instead of phrases."""
    return bool(options.points or options.everything)


def predict_clicks(options: argparse.Namespace, files: Sequence[Path], output: Path) -> int:
    """Ask about every file, write overlays and predictions.json; how many pictures failed.

    Raises PromptError for clicks that do not fit the only picture; of several, that one fails.
    """
    predictor = (
        ClickPredictor.from_model_folder(options.model)
        if options.model
        else ClickPredictor.from_run(options.run, base=options.base)
    )
    predictor.reading = replace(predictor.reading, megapixels=options.max_megapixels)
    names = [] if options.no_overlay else [overlay_name(n, f) for n, f in enumerate(files, 1)]
    clear_stale(output, names, files)
    failed, masks_found = 0, 0
    written = [*names, *(WRITTEN[kind] for kind in options.format)]
    with Record(output, written, ["object"]) as record:
        for number, file in enumerate(files, start=1):
            try:
                picture = open_rgb(file, frame=options.frame, reading=predictor.reading)
                found = _ask(predictor, picture, options)
            except (DataError, PromptError) as error:
                if isinstance(error, PromptError) and len(files) == 1:
                    raise
                failed += 1
                print(f"{plain(file)}: {plain(error)}", file=sys.stderr)
                continue
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
            masks_found += len(found)
            print(f"[{number}/{len(files)}] {plain(file)}: {len(found)} masks")
    if options.everything and not masks_found and failed < len(files):
        remark(
            "no mask was sure enough: a smaller --least-iou or --least-stability keeps more, a larger --grid clicks closer together"
        )
    return failed


def overlay_name(number: int, file: Path) -> str:
    """The file that shows what was found in picture `number`."""
    return f"{number:04d}_{file.stem[:60]}.png"


def _ask(
    predictor: ClickPredictor, picture: Image.Image, options: argparse.Namespace
) -> list[dict[str, Any]]:
    if options.everything:
        given = {
            "side": options.grid, "crops": options.crops, "iou": options.least_iou, "stability": options.least_stability,
        }  # fmt: skip
        grid = GridOptions(**{name: value for name, value in given.items() if value is not None})
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
