"""What a data set holds, in lines for people: sizes, categories, limits, and everything odd."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from sam3jax.config import DataConfig
from sam3jax.data.ledger import Ledger, printable, shown
from sam3jax.data.names import phrase_key
from sam3jax.data.pictures import Header, read_as_stored
from sam3jax.data.prompts import training_shapes
from sam3jax.data.records import Dataset, trained_categories, used_categories
from sam3jax.data.tokenizer import words

QUERIES = 200  # of the published model
_FEW = 3  # entries shown of each kind of oddity
_TOKENS = 30  # of a phrase, in the published model
_ROWS = 50  # categories that a terminal shows


def describe(dataset: Dataset, queries: int = QUERIES) -> Iterator[str]:
    """The report on one split, line by line; queries: of the model, the most it can find."""
    for line in _describe(dataset, queries):
        yield printable(line)


def _describe(dataset: Dataset, queries: int) -> Iterator[str]:
    annotations = [a for image in dataset.images for a in image.annotations]
    empty = sum(not image.annotations for image in dataset.images)
    sizes = Counter((image.width, image.height) for image in dataset.images)
    common = ", ".join(f"{w} x {h} ({n})" for (w, h), n in sizes.most_common(3))
    more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
    yield f"pictures      {len(dataset.images)}, {empty} of them without annotations"
    yield f"sizes         {common}{more}"
    yield from _turned(dataset)
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
    found = [*entry_lines(dataset.problems), *_odd(dataset, masks, queries)]
    yield f"odd           {'nothing' if not found else ''}".rstrip()
    yield from (f"    {line}" for line in found)


def _turned(dataset: Dataset) -> Iterator[str]:
    turned = [image for image in dataset.images if (image.orientation or 1) != 1]
    if not turned:
        return
    stored = [
        image
        for image in turned
        if image.stored and read_as_stored(Header(image.stored, image.orientation or 1), image.width, image.height)
    ]  # fmt: skip
    upright = len(turned) - len(stored)
    if upright:
        yield f"EXIF          {upright} pictures are stored turned or mirrored; they are read upright"
    if stored:
        yield (
            f"EXIF          {len(stored)} pictures are stored turned and read as stored, because the JSON "
            f"states the stored size ({stored[0].file.name}); predict turns them. Some tools state that "
            f"size for boxes that were drawn upright: look whether boxes lie on their objects"
        )


def _categories(dataset: Dataset) -> Iterator[str]:
    instances: Counter[int] = Counter()
    pictures: Counter[int] = Counter()
    for image in dataset.images:
        found = Counter(a.category_id for a in image.annotations if not a.iscrowd)
        instances.update(found)
        pictures.update(found.keys())
    used = trained_categories(dataset)
    yield f"categories    {len(used)} with annotations; each is asked as a phrase:"
    listed = sorted(used, key=lambda i: -instances[i])
    width = max((len(dataset.categories[i]) for i in listed[:_ROWS]), default=0)
    for i in listed[:_ROWS]:
        name = dataset.categories[i]
        yield f"    {name:<{width}}  {instances[i]:>7} instances in {pictures[i]} pictures"
    if len(listed) > _ROWS:
        rest = sum(instances[i] for i in listed[_ROWS:])
        yield f"    and {len(listed) - _ROWS} more with {rest} instances"
    crowds = [dataset.categories[i] for i in used_categories(dataset) if i not in set(used)]
    if crowds:
        yield f"    crowds only, never asked in training: {_some(crowds, 10)}"
    if unused := [n for i, n in dataset.categories.items() if n not in crowds and not instances[i]]:
        yield f"    no annotations, never asked: {_some(unused, 20)}"


def entry_lines(problems: Mapping[str, int]) -> Iterator[str]:
    """A line for each kind of oddity, with the first entries of it."""
    for sentence, count in problems.items():
        line = f"{count:>7} x {sentence}"
        if isinstance(problems, Ledger) and (entries := problems.entries(sentence)):
            more = "; ..." if len(entries) > _FEW else ""
            line += f" ({'; '.join(str(e) for e in entries[:_FEW])}{more})"
        yield line


def _odd(dataset: Dataset, masks: Counter[str], queries: int) -> Iterator[str]:
    total = masks.total()
    if not total:
        yield "no annotations: nothing can be measured or trained on these pictures"
    if total and masks["without mask"] == total:
        yield "no masks at all: boxes will be trained, masks will not"
    names = [dataset.categories[i] for i in trained_categories(dataset)]
    if codes := [n for n in names if re.search(r"_|[a-z][A-Z]|^\W*\d+\W*$", n)]:
        yield (
            f"names that do not read like phrases: {_some(codes, 5)}; give better ones with "
            f"data.phrases, e.g. data.phrases={{{codes[0]}: ...}}"
        )
    if long := [
        n for n in names if len(n.encode("utf-8", "replace")) > _TOKENS and _may_be_long(n)
    ]:
        yield (
            f"long names, which may not fit into the {_TOKENS} tokens of the model: {_some(long, 3)}; give "
            f"shorter ones with data.phrases"
        )
    yield from _limits(dataset, queries)
    yield from _always(dataset)


def _may_be_long(name: str) -> bool:
    """Whether a name may need more tokens than the model reads: a word of n letters needs 1 to n."""
    return sum(max(1, len(word) / 2) for word in words(name)) > _TOKENS


def _limits(dataset: Dataset, queries: int) -> Iterator[str]:
    most, where = 0, None
    for image in dataset.images:
        counts = Counter(a.category_id for a in image.annotations if not a.iscrowd)
        for category, count in counts.items():
            if count > most:
                most, where = count, (image.file.name, dataset.categories[category])
    if most > queries and where is not None:
        yield (
            f"{most} instances of {shown(where[1])} in {where[0]}, more than the {queries} that the model "
            f"can find: recall is at most {queries / most:.0%} there; cut such pictures into tiles"
        )


def _always(dataset: Dataset) -> Iterator[str]:
    present = Counter(
        i for image in dataset.images for i in {a.category_id for a in image.annotations}
    )
    always = [dataset.categories[i] for i, n in present.items() if n == len(dataset.images)]
    if not always:
        return
    if len(trained_categories(dataset)) == 1:
        yield (
            f"one category, in every picture: {always[0]}; the model never sees it absent and may learn to "
            f"fire on anything: name other things that are in no picture with data.negative_phrases, or "
            f"add pictures without it"
        )
        return
    yield (
        f"in every picture, so never a negative: {_some(always, 5)}; add pictures without, "
        f"or data.negative_phrases, lest the model fire on anything"
    )


def compare(train: Dataset, valid: Dataset) -> Iterator[str]:
    """What validation data hold that training data do not, line by line."""
    known = {phrase_key(train.categories[i]) for i in trained_categories(train)}
    names = [valid.categories[i] for i in trained_categories(valid)]
    if new := [name for name in names if phrase_key(name) not in known]:
        yield printable(
            f"{len(new)} of {len(names)} categories of {valid.name} are never trained: {_some(new, 10)}"
        )
    if not names:
        yield f"{valid.name} has no annotations: validation can measure nothing but false alarms"
    masks = [
        any(a.segmentation is not None for i in d.images for a in i.annotations)
        for d in (train, valid)
    ]
    if masks[0] and not masks[1] and names:
        yield f"{valid.name} has no masks, {train.name} has: masks cannot be validated"


def _some(names: list[str], most: int) -> str:
    return f"{', '.join(names[:most])}{f', ... ({len(names)} in all)' if len(names) > most else ''}"
