"""What a whole set says: many entries with the same fault are one wrong export, and an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from sam3jax.data.ledger import DataError, Ledger
from sam3jax.data.records import Annotation, Dataset

LEFT_OUT = "annotation left out"
UNLISTED = f"{LEFT_OUT}: its picture is not listed"

_ENOUGH = 20  # entries from which 95 % of them count as all
_REMEDIES = {
    UNLISTED: "the `image_id` of annotations and the `id` of `images` never meet: export both together",
    f"{LEFT_OUT}: its category is not listed": "the `category_id` of annotations and the `id` of "
    "`categories` never meet: export both together",
    f"{LEFT_OUT}: no image_id or no category_id": "these are no COCO *instance* annotations (captions? "
    "panoptic?): export instance annotations",
    f"{LEFT_OUT}: no box with an area": "expected `bbox` as left, top, width, height in pixels, with a "
    "width and a height above 0",
    f"{LEFT_OUT}: box outside the picture": "boxes were made for pictures of another size: export "
    "pictures and annotations together",
}


def nearly_all(count: int, total: int) -> bool:
    """All, or of many at least 95 %."""
    return 0 < total == count or (total >= _ENOUGH and count >= 0.95 * total)


def judge_left_out(ledger: Ledger, total: int, covered: int, pictures: int, source: str) -> None:
    """Raise DataError where nearly all annotations were left out; covered: pictures that have some.

    Annotations of unlisted pictures do not count where the listed pictures have theirs: somebody
    shortened `images` to try a part.
    """
    left = ledger.total(LEFT_OUT)
    if 2 * covered >= pictures:
        unlisted = ledger.get(UNLISTED, 0)
        left, total = left - unlisted, total - unlisted
    if not nearly_all(left, total):
        return
    reasons = Counter({s: n for s, n in ledger.items() if s.startswith(LEFT_OUT)})
    reason, count = reasons.most_common(1)[0]
    raise DataError(
        f"{source}: {left:,} of {total:,} annotations cannot be used, {count:,} of them because of: "
        f"{reason.removeprefix(LEFT_OUT + ': ')} (for example {ledger.examples(reason, 2)}); "
        f"{_REMEDIES.get(reason, 'export the annotations again')}"
    )


def judge_shift(stated: set[int], listed: set[int], source: str) -> None:
    """Raise DataError where annotations count categories from another number than `categories` does."""
    if len(listed) < 2 or stated == listed:
        return
    for step in (-1, 1):
        if stated == {number + step for number in listed}:
            raise DataError(
                f"{source}: the `category_id` of annotations are {min(stated)} to {max(stated)}, the `id` of "
                f"`categories` {min(listed)} to {max(listed)}: shifted by one, so that all names are wrong? Export "
                f"both together, or take the annotations of the category that is not listed out"
            )


def judge_crowds(found: Iterable[Sequence[Annotation]], source: str) -> None:
    """Raise DataError where nearly every instance is marked as a crowd: none would be trained."""
    total = crowds = 0
    for part in found:
        total += len(part)
        crowds += sum(a.iscrowd for a in part)
    if nearly_all(crowds, total):
        raise DataError(
            f"{source}: {crowds:,} of {total:,} annotations are marked as crowds, of which nothing is "
            f"learnt (some tools mark every brush mask so): set iscrowd to 0 where a mask holds one "
            f"object"
        )


def require_masks(dataset: Dataset) -> None:
    """Raise DataError where stated masks cannot be read, or some categories have masks and another has
    boxes only.

    A set that states no mask at all is box-only data and passes: that is said, and trains boxes.
    """
    boxes: Counter[int] = Counter()
    masks: Counter[int] = Counter()
    for image in dataset.images:
        for a in image.annotations:
            boxes[a.category_id] += 1
            masks[a.category_id] += a.segmentation is not None
    lost = dataset.stated_masks - masks.total()
    if nearly_all(lost, dataset.stated_masks):
        raise DataError(
            f"{lost:,} of {dataset.stated_masks:,} masks of {dataset.name} cannot be read: "
            f"{_lost_masks(dataset)}; export masks as COCO polygons [[x, y, x, y, ...]] or RLE, or train "
            f"boxes only with loss.masks=false"
        )
    without = [dataset.categories[i] for i in sorted(boxes) if not masks[i]]
    if without and masks.total():
        raise DataError(
            f"category {', '.join(repr(n) for n in without[:5])}{', ...' if without[5:] else ''} of "
            f"{dataset.name} has boxes but no masks, other categories have masks: add masks, or train "
            f"boxes only with loss.masks=false, or allow it with data.allow_missing_masks=true"
        )


def _lost_masks(dataset: Dataset) -> str:
    """Why masks were left out, with an example."""
    ledger = dataset.problems
    reasons = [s for s in ledger if s.startswith(("mask left out", "polygon left out"))]
    if not reasons:
        return "every one was left out"
    reason = max(reasons, key=lambda s: ledger[s])
    example = ledger.examples(reason, 1) if isinstance(ledger, Ledger) else ""
    return f"{reason}{f' (for example {example})' if example else ''}"
