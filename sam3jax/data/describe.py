"""What was read from a data set, in lines for people, and what was odd about it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from sam3jax.config import DataConfig
from sam3jax.data.coco import Dataset, used_categories
from sam3jax.data.pictures import read_header
from sam3jax.data.prompts import training_shapes


def describe(dataset: Dataset) -> Iterator[str]:
    """The report on one split, line by line."""
    annotations = [a for image in dataset.images for a in image.annotations]
    empty = sum(not image.annotations for image in dataset.images)
    sizes = Counter((image.width, image.height) for image in dataset.images)
    common = ", ".join(f"{w} x {h} ({n})" for (w, h), n in sizes.most_common(3))
    more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
    yield f"pictures      {len(dataset.images)}, {empty} of them without annotations"
    yield f"sizes         {common}{more}"
    if turned := sum(read_header(image.file)[1] != 1 for image in dataset.images):
        yield f"EXIF          {turned} pictures are stored turned or mirrored; they are read upright"
    masks = Counter(
        "without mask"
        if a.segmentation is None
        else "RLE"
        if isinstance(a.segmentation, Mapping)
        else "polygons"
        for a in annotations
    )
    kinds = ", ".join(f"{masks[k]} {k}" for k in ("polygons", "RLE", "without mask") if masks[k])
    crowds = sum(a.iscrowd for a in annotations)
    yield f"annotations   {len(annotations)}: {kinds or 'none'}; {crowds} crowd"
    if annotations:
        relative = [
            np.sqrt(a.bbox[2] * a.bbox[3] / (image.width * image.height))
            for image in dataset.images
            for a in image.annotations
        ]
        low, middle, high = (100 * np.quantile(relative, q) for q in (0.05, 0.5, 0.95))
        yield f"box edges     {low:.0f} / {middle:.0f} / {high:.0f} % of the picture's (5 % / median / 95 %)"
    shapes = training_shapes(dataset, DataConfig())
    yield (
        f"most          {shapes.targets} instances of a phrase, {shapes.instances} instances of a "
        f"picture's phrases, at the default max_prompts"
    )
    yield from _categories(dataset)
    yield from _odd(dataset, masks, len(annotations))


def _categories(dataset: Dataset) -> Iterator[str]:
    instances: Counter[int] = Counter()
    pictures: Counter[int] = Counter()
    for image in dataset.images:
        instances.update(a.category_id for a in image.annotations)
        pictures.update({a.category_id for a in image.annotations})
    used = used_categories(dataset)
    yield f"categories    {len(used)} with annotations; each is asked as a phrase:"
    width = max((len(dataset.categories[i]) for i in used), default=0)
    for i in sorted(used, key=lambda i: -instances[i]):
        name = dataset.categories[i]
        yield f"    {name:<{width}}  {instances[i]:>7} instances in {pictures[i]} pictures"
    if unused := [n for i, n in dataset.categories.items() if i not in used]:
        yield f"    no annotations, never asked: {', '.join(unused)}"


def _odd(dataset: Dataset, masks: Counter[str], total: int) -> Iterator[str]:
    found = [f"{count:>7} x {what}" for what, count in dataset.problems.items()]
    if total and masks["without mask"] == total:
        found.append("no masks at all: boxes will be trained, masks will not")
    names = [dataset.categories[i] for i in used_categories(dataset)]
    if codes := [n for n in names if re.search(r"_|[a-z][A-Z]|^\W*\d+\W*$", n)]:
        found.append(
            f"names that do not read like phrases: {', '.join(codes[:5])}; give better ones with "
            f"data.phrases, e.g. data.phrases={{{codes[0]}: ...}}"
        )
    present = Counter(
        i for image in dataset.images for i in {a.category_id for a in image.annotations}
    )
    if always := [dataset.categories[i] for i, n in present.items() if n == len(dataset.images)]:
        found.append(
            f"in every picture, so never a negative: {', '.join(always[:5])}; add pictures without, "
            f"or data.negative_phrases, lest the model fire on anything"
        )
    yield f"odd           {'nothing' if not found else ''}".rstrip()
    yield from (f"    {line}" for line in found)
