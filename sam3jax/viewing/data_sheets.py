"""Pictures of a data set to look at before training: a contact sheet and histograms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from sam3jax.data.records import Dataset, ImageRecord
from sam3jax.viewing.draw import overlay, row, true_instances

_COLUMNS = 4
_HEIGHT = 260


def contact_sheet(dataset: Dataset, chosen: Sequence[ImageRecord]) -> Image.Image:
    """Pictures with their boxes, masks and phrases, the same colour for a phrase in all of them."""
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
    """So many pictures for a sheet: each shows a category that the ones before it do not, rare ones
    first, as far as there are such; the rest is spread over the set."""
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

    figure = Figure(figsize=(11, 3.2))
    # By hand: the constrained layout keeps every figure's pixels in memory.
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.1, top=0.9, wspace=0.22)
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
        most_first = sorted(pictures.values(), reverse=True)
        mark = "o" if len(most_first) < 40 else None
        axes[2].plot(np.arange(1, len(most_first) + 1), most_first, marker=mark, label=name)
    axes[0].set(title="box edge, % of the picture's", ylabel="% of the boxes")
    axes[1].set(title="instances in a picture", ylabel="% of the pictures")
    axes[2].set(title="pictures of each category, most first", ylabel="pictures", yscale="log")
    plain = lambda value, _: f"{value:g}"
    axes[2].yaxis.set_major_formatter(plain)
    few = max(axes[2].get_ylim()) < 10 * max(min(axes[2].get_ylim()), 1e-9)
    axes[2].yaxis.set_minor_formatter(plain if few else lambda *_: "")
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
