"""Pictures of a data set to look at before training: a contact sheet and histograms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sam3jax.data.records import Dataset, ImageRecord
from sam3jax.viewing.draw import Instance, overlay, row, true_instances

_COLUMNS = 4
_HEIGHT = 260


def contact_sheet(dataset: Dataset, pictures: int = 16) -> Image.Image:
    """Pictures with their boxes, masks and phrases, the same colour for a phrase in all of them.

    Rare categories come first: each picture shows one that the pictures before it do not, as far as
    there are such.
    """
    chosen = choose(dataset, pictures)
    names = sorted({dataset.categories[a.category_id] for r in chosen for a in r.annotations})
    numbers = {name: number for number, name in enumerate(names)}
    rows = []
    for start in range(0, len(chosen), _COLUMNS):
        parts = [
            (_caption(record), _drawn(record, dataset.categories, numbers))
            for record in chosen[start : start + _COLUMNS]
        ]
        rows.append(row(parts, height=_HEIGHT))
    return _column(rows)


def choose(dataset: Dataset, number: int) -> list[ImageRecord]:
    """So many pictures, those that show rare categories first, spread over the set."""
    frequency = Counter(a.category_id for i in dataset.images for a in i.annotations)
    shown: set[int] = set()
    chosen: dict[int, ImageRecord] = {}
    by_rarity = sorted(frequency, key=lambda c: frequency[c])
    first: dict[int, int] = {}
    for place, image in enumerate(dataset.images):
        for a in image.annotations:
            first.setdefault(a.category_id, place)
    for category in by_rarity[: 20 * number]:
        if len(chosen) < number and category not in shown:
            image = dataset.images[first[category]]
            chosen[first[category]] = image
            shown |= {a.category_id for a in image.annotations}
    step = max(1, len(dataset.images) // max(number, 1))
    for place in range(0, len(dataset.images), step):
        if len(chosen) < number:
            chosen.setdefault(place, dataset.images[place])
    return [chosen[place] for place in sorted(chosen)]


def _caption(record: ImageRecord) -> str:
    return f"{record.file.name}  {record.width} x {record.height}"


def _drawn(
    record: ImageRecord, names: Mapping[int, str], numbers: Mapping[str, int]
) -> Image.Image:
    from dataclasses import replace

    instances = [replace(i, number=numbers[i.label]) for i in true_instances(record, names)]
    return overlay(record.open(), instances, smallest=_HEIGHT, largest=2 * _HEIGHT)


def _column(rows: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    sheet = Image.new(
        "RGB",
        (max(r.width for r in rows), sum(r.height + gap for r in rows) - gap),
        (250, 250, 250),
    )
    top = 0
    for part in rows:
        sheet.paste(part, (0, top))
        top += part.height + gap
    return sheet


def histograms(splits: Mapping[str, Dataset], file: Path) -> None:
    """Box sizes, instances a picture, and pictures a category, of all splits, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, dataset in splits.items():
        edges = [
            100 * (a.bbox[2] * a.bbox[3] / (i.width * i.height)) ** 0.5
            for i in dataset.images
            for a in i.annotations
        ]
        counts = [len(i.annotations) for i in dataset.images]
        pictures = Counter(
            c for i in dataset.images for c in {a.category_id for a in i.annotations}
        )
        steps = dict(histtype="step", linewidth=1.6, label=f"{name} ({len(dataset.images)})")
        share = lambda values: np.full(len(values), 100 / max(len(values), 1))
        axes[0].hist(edges, bins=np.linspace(0, 100, 41), weights=share(edges), **steps)
        most = max(max(counts, default=1), 1)
        axes[1].hist(
            counts, bins=np.arange(min(most, 60) + 2) - 0.5, weights=share(counts), **steps
        )
        axes[2].plot(np.arange(1, len(pictures) + 1), sorted(pictures.values(), reverse=True), label=name)  # fmt: skip
    axes[0].set(title="box edge, % of the picture's", ylabel="% of the boxes")
    axes[1].set(title="instances in a picture", ylabel="% of the pictures")
    axes[2].set(title="pictures of each category, most first", ylabel="pictures", yscale="log")
    for axis in axes:
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)


__all__ = ["Instance", "choose", "contact_sheet", "histograms"]
