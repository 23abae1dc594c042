"""Which phrases are asked of which picture, and which of its instances answer them.

Training asks every category present, up to `max_prompts` (where more are present, another part of
them each epoch), then absent ones as negatives. Evaluation asks every category of every picture, in
as many rows as that takes. A category present only as crowd is neither a question of training nor a
negative. All choices follow from (seed, epoch, row): no state, the same in any worker.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from sam3jax.config import DataConfig
from sam3jax.data.ledger import DataError
from sam3jax.data.names import phrase_key
from sam3jax.data.records import Dataset, ImageRecord, trained_categories, used_categories
from sam3jax.data.tokenizer import Tokenizer

VISUAL = "visual"  # the published phrase of a prompt that is boxes alone
NO_CATEGORY = -1  # category_id of `negative_phrases` and of padding
_FEW_NEGATIVES = 0.2  # share of questions below which to warn
_LOOKED_AT = 2000  # pictures that tell the balance of questions
_LOOK_ALIKE = 0.25  # the draw of a category that shares a word with a present one is times this


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt of one picture.

    targets: indices into the picture's annotations; exemplars: those shown as boxes, a part of them.
    exhaustive: False where the picture may hold instances of the phrase beyond the targets.
    """

    phrase: str
    category_id: int
    targets: tuple[int, ...] = ()
    exemplars: tuple[int, ...] = ()
    exhaustive: bool = True


@dataclass(frozen=True, slots=True)
class Shapes:
    """Static sizes of a batch: P, T, M and G of the legend in `types`."""

    prompts: int
    targets: int
    instances: int
    exemplars: int


def vocabulary(config: DataConfig, *datasets: Dataset) -> tuple[str, ...]:
    """Every phrase that the data sets can ask, without repeats; `text_id` counts in it."""
    names = [d.categories[i] for d in datasets for i in used_categories(d)]
    known = {phrase_key(n) for d in datasets for n in d.categories.values()}
    if clash := sorted(n for n in config.negative_phrases if phrase_key(n) in known):
        raise DataError(
            f"data.negative_phrases names categories of the data: {', '.join(clash)}; absent "
            f"categories are negatives already, take them out of the list"
        )
    if silent := [n for n in config.negative_phrases if not phrase_key(n)]:
        raise DataError(f"data.negative_phrases: {silent[0]!r} has nothing to read, take it out")
    visual = [VISUAL] if config.exemplars and config.visual_probability else []
    return tuple(dict.fromkeys([*names, *config.negative_phrases, *visual]))


def tokenize(phrases: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """Token ids [V, N] of the phrases. Raises DataError for a phrase that would be cut."""
    if long := [phrase for phrase in phrases if not tokenizer.fits(phrase)]:
        raise DataError(
            f"{long[0]!r} is longer than the {tokenizer.length - 2} tokens that this model reads: give "
            f"it a shorter phrase with data.phrases"
        )
    return tokenizer(phrases)


def training_questions(
    record: ImageRecord,
    names: dict[int, str],
    config: DataConfig,
    *,
    targets: int,
    seed: int,
    epoch: int,
    row: int,
) -> tuple[Question, ...]:
    """What is asked of one picture in one epoch: present categories first, then absent ones.

    names: used category id -> phrase, of the whole data set; targets: the most a question can hold.
    An empty picture asks one absent category at least: silence is what it teaches.
    """
    rng = np.random.default_rng((seed, epoch, row, 0))
    present = _instances_by_category(record)
    order = list(np.random.default_rng((seed, row)).permutation(sorted(present)).tolist())
    most = _positives(config)
    if len(order) > most:  # each category's turn comes every few epochs
        start = epoch * most % len(order)
        order = (order + order)[start : start + most]
    questions = [_positive(record, names, i, present[i], config, targets, rng) for i in order]
    room = min(config.max_prompts - len(questions), max(config.negatives, not present))
    return (*questions, *_negatives(record, names, config, room, rng))


def balance(dataset: Dataset, config: DataConfig, seed: int) -> str:
    """A line about what pictures are asked: how many phrases that are there, how many that are not."""
    names, records = trained_phrases(dataset), dataset.images[:_LOOKED_AT]
    targets = max((len(record.annotations) for record in records), default=0)
    there = absent = 0
    for row, record in enumerate(records):
        asked = training_questions(
            record, names, config, targets=targets, seed=seed, epoch=0, row=row
        )
        there += sum(bool(q.targets) for q in asked)
        absent += sum(not q.targets for q in asked)
    share = absent / max(there + absent, 1)
    line = f"{len(records):,} pictures are asked {there:,} phrases that are there and {absent:,} that are not ({share:.0%})"
    if share < _FEW_NEGATIVES:
        line += (
            ": few, a model tuned so may find things that are not there; raise data.max_prompts or "
            "data.negatives, lower data.positives, or give data.negative_phrases"
        )
    return line


def evaluation_questions(
    record: ImageRecord, names: dict[int, str], *, prompts: int, targets: int
) -> tuple[tuple[Question, ...], ...]:
    """Every category asked of one picture, in rows of at most `prompts` questions.

    A category that is there only as crowd is asked too (COCO's AP ignores what lies on the crowd),
    as not exhaustive: silence about it proves nothing. Federated pictures ask what is known of them.
    """
    parts = range(evaluation_parts(record, names, prompts))
    return tuple(
        evaluation_part(record, names, prompts=prompts, targets=targets, part=part)
        for part in parts
    )


def evaluation_parts(record: ImageRecord, names: dict[int, str], prompts: int) -> int:
    """Into how many rows the questions of one picture are divided."""
    return -(-len(_asked(record, names)) // prompts)


def evaluation_part(
    record: ImageRecord, names: dict[int, str], *, prompts: int, targets: int, part: int
) -> tuple[Question, ...]:
    """One row of `evaluation_questions`, without the others."""
    present = _instances_by_category(record)
    return tuple(
        Question(
            phrase=names[i],
            category_id=i,
            targets=tuple(present.get(i, ())[:targets]),
            exhaustive=_exhaustive(record, i) and len(present.get(i, ())) <= targets,
        )
        for i in list(_asked(record, names))[part * prompts : (part + 1) * prompts]
    )


def _asked(record: ImageRecord, names: dict[int, str]) -> Collection[int]:
    if record.negative_ids is None:
        return names
    known = {a.category_id for a in record.annotations} | record.negative_ids
    return [i for i in names if i in known]


def training_shapes(dataset: Dataset, config: DataConfig) -> Shapes:
    """The smallest static sizes that hold every training picture of the data set."""
    names = frozenset(trained_categories(dataset))
    most = config.max_targets
    prompts = targets = instances = 1
    for record in dataset.images:
        counts = _counts(record, most)
        absent = _number_absent(record, names) + len(config.negative_phrases)
        negatives = min(max(config.negatives, not counts), absent)
        positives = min(len(counts), _positives(config))
        prompts = max(prompts, min(config.max_prompts, positives + negatives))
        targets = max(targets, max(counts, default=0))
        instances = max(instances, sum(counts[:positives]))
    return Shapes(prompts, targets, instances, config.exemplars)


def evaluation_shapes(dataset: Dataset, config: DataConfig) -> Shapes:
    """The same for evaluation, where every category is asked, `max_prompts` to a row."""
    prompts = max(1, min(config.max_prompts, len(used_categories(dataset))))
    targets = instances = 1
    for record in dataset.images:
        counts = _counts(record, config.max_targets)
        targets = max(targets, max(counts, default=0))
        instances = max(instances, sum(counts[:prompts]))
    return Shapes(prompts, targets, instances, 0)


def _positives(config: DataConfig) -> int:
    return min(config.positives or config.max_prompts, config.max_prompts)


def phrases_of(dataset: Dataset) -> dict[int, str]:
    """Used category id -> phrase, in increasing order of id."""
    return {i: dataset.categories[i] for i in used_categories(dataset)}


def trained_phrases(dataset: Dataset) -> dict[int, str]:
    """The same without categories of which there are crowds only: what training asks."""
    return {i: dataset.categories[i] for i in trained_categories(dataset)}


def _instances_by_category(record: ImageRecord) -> dict[int, list[int]]:
    """Category -> indices of its annotations, crowds left out."""
    found: dict[int, list[int]] = {}
    for index, annotation in enumerate(record.annotations):
        if not annotation.iscrowd:
            found.setdefault(annotation.category_id, []).append(index)
    return found


@functools.lru_cache(maxsize=65536)
def _words(phrase: str) -> frozenset[str]:
    return frozenset(phrase.lower().split())


def _counts(record: ImageRecord, most: int | None) -> list[int]:
    """Targets of each category present, most first."""
    found = Counter(a.category_id for a in record.annotations if not a.iscrowd)
    return sorted((min(n, most or n) for n in found.values()), reverse=True)


def _absent(record: ImageRecord, categories: Sequence[int]) -> list[int]:
    """Categories known not to be in the picture, not even as crowd."""
    there = {a.category_id for a in record.annotations} | record.not_exhaustive_ids
    known = record.negative_ids
    return [i for i in categories if i not in there and (known is None or i in known)]


def _number_absent(record: ImageRecord, categories: frozenset[int]) -> int:
    """`len(_absent(...))` without looking at every category."""
    there = {a.category_id for a in record.annotations} | record.not_exhaustive_ids
    if record.negative_ids is not None:
        return len((record.negative_ids & categories) - there)
    return len(categories) - len(categories & there)


def _exhaustive(record: ImageRecord, category_id: int) -> bool:
    crowd = any(a.iscrowd and a.category_id == category_id for a in record.annotations)
    return not crowd and category_id not in record.not_exhaustive_ids


def _positive(
    record: ImageRecord,
    names: dict[int, str],
    category_id: int,
    instances: list[int],
    config: DataConfig,
    targets: int,
    rng: np.random.Generator,
) -> Question:
    phrase, exhaustive = names[category_id], _exhaustive(record, category_id)
    if len(instances) > targets:
        instances = sorted(rng.choice(instances, targets, replace=False).tolist())
        exhaustive = False
    exemplars: list[int] = []
    if config.exemplars:
        draw, number = rng.random(), int(rng.integers(1, config.exemplars + 1))
        visual = draw < config.visual_probability
        if visual or rng.random() < config.exemplar_probability:
            exemplars = rng.permutation(instances)[:number].tolist()
        phrase = VISUAL if visual else phrase
    return Question(phrase, category_id, tuple(instances), tuple(exemplars), exhaustive)


def _negatives(
    record: ImageRecord,
    names: dict[int, str],
    config: DataConfig,
    room: int,
    rng: np.random.Generator,
) -> list[Question]:
    """Absent categories, look-alikes (a shared word: "glass bottle", "plastic bottle") most often."""
    if room <= 0:
        return []
    candidates = [(names[i], i) for i in _absent(record, list(names))]
    candidates += [(phrase, NO_CATEGORY) for phrase in config.negative_phrases]
    there = (names.get(a.category_id, "") for a in record.annotations)
    words = {w for name in there for w in _words(name)}
    draws = rng.random(len(candidates)) * [
        1.0 if words.isdisjoint(_words(phrase)) else _LOOK_ALIKE for phrase, _ in candidates
    ]
    return [Question(*candidates[k]) for k in np.argsort(draws)[:room]]
