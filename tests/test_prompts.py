"""Which phrases are asked of which picture."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from sam3jax.config import DataConfig
from sam3jax.data.coco import DataError
from sam3jax.data.folders import read_dataset
from sam3jax.data.prompts import (
    NO_CATEGORY,
    VISUAL,
    balance,
    evaluation_questions,
    evaluation_shapes,
    phrases_of,
    training_questions,
    training_shapes,
    vocabulary,
)
from tests.coco_folders import annotation, write

NAMES = ("things", "red cup", "blue cup", "dog", "cat", "owl", "eel")
ROWS = {"size": [40, 60], "counts": [9, 2391]}


@pytest.fixture
def dataset(tmp_path):
    """Picture 0: 3 red cups, a dog. 1: empty. 2: five categories. 3: crowd only. 4: crowd and one."""
    items = [annotation(k, 0, 1, (2 + 9 * k, 2, 8, 9)) for k in range(3)]
    items += [annotation(3, 0, 3, (2, 20, 9, 9))]
    items += [annotation(3 + c, 2, c, (2 + 9 * c, 20, 8, 9)) for c in (2, 3, 4, 5, 6)]
    items += [annotation(10, 3, 1, (2, 2, 50, 9), iscrowd=1, segmentation=ROWS)]
    items += [annotation(11, 4, 3, (2, 2, 50, 9), iscrowd=1, segmentation=ROWS)]
    items += [annotation(12, 4, 3, (2, 2, 50, 9))]
    return read_dataset(write(tmp_path / "d", items, images=5, categories=NAMES))


def ask(dataset, row, *, epoch=0, seed=0, targets=9, **settings):
    return training_questions(
        dataset.images[row],
        phrases_of(dataset),
        DataConfig(**settings),
        targets=targets,
        seed=seed,
        epoch=epoch,
        row=row,
    )


def test_present_categories_come_first_then_absent_ones(dataset):
    questions = ask(dataset, 0, max_prompts=4, negatives=1)
    assert {q.phrase for q in questions[:2]} == {"red cup", "dog"}
    assert len(questions) == 3
    assert questions[2].targets == ()
    assert questions[2].category_id in (2, 4, 5, 6)
    red = next(q for q in questions if q.phrase == "red cup")
    assert red.targets == (0, 1, 2)
    assert all(q.exhaustive for q in questions)


def test_the_unused_category_is_never_asked(dataset):
    asked = {q.category_id for e in range(50) for q in ask(dataset, 1, epoch=e, negatives=6)}
    assert 0 not in asked
    assert 0 not in phrases_of(dataset)
    assert "things" not in vocabulary(DataConfig(), dataset)


def test_empty_pictures_ask_absent_categories_even_without_negatives(dataset):
    for negatives, count in ((0, 1), (3, 3)):
        questions = ask(dataset, 1, negatives=negatives)
        assert len(questions) == count
        assert all(not q.targets for q in questions)
    assert len(ask(dataset, 0, negatives=0)) == 2


def test_a_crowd_is_neither_a_question_nor_a_negative(dataset):
    for epoch in range(50):
        asked = {q.category_id for q in ask(dataset, 3, epoch=epoch, max_prompts=9, negatives=9)}
        assert asked == {2, 3, 4, 5, 6}
    (dog,) = (q for q in ask(dataset, 4) if q.category_id == 3)
    assert dog.targets == (1,)
    assert not dog.exhaustive


def test_more_categories_than_room_take_turns(dataset):
    counts = Counter(
        q.category_id for e in range(5) for q in ask(dataset, 2, epoch=e, max_prompts=2)
    )
    assert counts == {c: 2 for c in (2, 3, 4, 5, 6)}


def test_positives_leave_room_for_negatives(dataset):
    """Five present categories would fill four prompts; two a time leave two for absent ones."""
    settings = dict(max_prompts=4, positives=2, negatives=2)
    counts = Counter()
    for epoch in range(5):
        questions = ask(dataset, 2, epoch=epoch, **settings)
        assert [bool(q.targets) for q in questions] == [True, True, False]  # one is absent
        counts.update(q.category_id for q in questions if q.targets)
    assert counts == {c: 2 for c in (2, 3, 4, 5, 6)}
    assert training_shapes(dataset, DataConfig(**settings)).prompts == 4
    assert (
        training_shapes(dataset, DataConfig(max_prompts=4, positives=1, negatives=1)).prompts == 2
    )


def test_the_balance_of_questions_is_counted_and_few_negatives_are_said(dataset):
    """Present: 2 in picture 0, 5 (of which 4 fit) in picture 2, 1 in picture 4."""
    plenty = balance(dataset, DataConfig(max_prompts=4, positives=2, negatives=2), 0)
    assert "5 pictures are asked 5 phrases that are there and 9 that are not (64%)" in plenty
    assert "few" not in plenty
    none = balance(dataset, DataConfig(max_prompts=9, negatives=0), 0)
    assert "are asked 8 phrases that are there and 2 that are not (20%)" in none
    everywhere = dataclasses.replace(dataset, images=(dataset.images[2], dataset.images[0]))
    few = balance(everywhere, DataConfig(max_prompts=4, negatives=0), 0)
    assert "data.negatives" in few


def test_questions_follow_from_seed_epoch_and_row_alone(dataset):
    settings = dict(negatives=2, exemplars=2)
    rounds = [[ask(dataset, r, epoch=e, **settings) for r in range(5)] for e in range(9)]
    again = [[ask(dataset, r, epoch=e, **settings) for r in range(5)] for e in range(9)]
    other = [[ask(dataset, r, epoch=e, seed=1, **settings) for r in range(5)] for e in range(9)]
    assert rounds == again
    assert rounds != other
    assert len({tuple(q.phrase for q in epoch[1]) for epoch in rounds}) > 3


def test_look_alikes_are_the_most_frequent_negatives(dataset):
    counts = Counter(ask(dataset, 0, epoch=e, negatives=1)[-1].phrase for e in range(300))
    assert set(counts) == {"blue cup", "cat", "owl", "eel"}
    assert counts["blue cup"] > 2 * max(counts["cat"], counts["owl"], counts["eel"])


def test_further_negative_phrases_are_asked_and_may_not_be_categories(dataset):
    settings = dict(negatives=1, negative_phrases=("unicorn", "ship"))
    asked = [ask(dataset, 0, epoch=e, **settings)[-1] for e in range(100)]
    unicorns = [q for q in asked if q.phrase == "unicorn"]
    assert unicorns
    assert unicorns[0].category_id == NO_CATEGORY
    assert set(NAMES[1:]) | {"unicorn", "ship"} == set(vocabulary(DataConfig(**settings), dataset))
    with pytest.raises(DataError, match=r"names categories of the data: dog; .*take them out"):
        vocabulary(DataConfig(negative_phrases=("dog",)), dataset)


def test_exemplars_are_some_of_the_targets(dataset):
    seen = Counter()
    for epoch in range(200):
        for question in ask(dataset, 0, epoch=epoch, exemplars=2, visual_probability=0.3):
            assert set(question.exemplars) <= set(question.targets)
            assert len(set(question.exemplars)) == len(question.exemplars) <= 2
            if question.phrase == VISUAL:
                assert question.exemplars
            if question.targets:
                seen[question.phrase == VISUAL, len(question.exemplars)] += 1
    assert {(True, 1), (True, 2), (False, 0), (False, 1), (False, 2)} == set(seen)
    assert 60 < seen[True, 1] + seen[True, 2] < 180  # of 400, expected 120
    assert all(not q.exemplars for q in ask(dataset, 0))
    assert VISUAL in vocabulary(DataConfig(exemplars=1, visual_probability=0.1), dataset)
    assert VISUAL not in vocabulary(DataConfig(exemplars=1), dataset)


def test_surplus_targets_make_a_question_not_exhaustive(dataset):
    chosen = set()
    for epoch in range(30):
        (red,) = (q for q in ask(dataset, 0, epoch=epoch, targets=2) if q.category_id == 1)
        assert len(red.targets) == 2
        assert not red.exhaustive
        chosen.add(red.targets)
    assert chosen == {(0, 1), (0, 2), (1, 2)}


def test_evaluation_asks_every_category_of_every_picture_in_rows(dataset):
    for record in dataset.images:
        rows = evaluation_questions(record, phrases_of(dataset), prompts=4, targets=9)
        assert [len(r) for r in rows] == [4, 2]
        assert [q.category_id for r in rows for q in r] == [1, 2, 3, 4, 5, 6]
    rows = evaluation_questions(dataset.images[3], phrases_of(dataset), prompts=4, targets=9)
    assert [q.exhaustive for q in rows[0]] == [False, True, True, True]


def test_federated_pictures_are_asked_only_what_is_known_of_them(tmp_path):
    images = [{"id": k, "file_name": f"{k}.png", "width": 60, "height": 40} for k in range(2)]
    images[0] |= {"neg_category_ids": [3], "not_exhaustive_category_ids": [1]}
    items = [annotation(0, 0, 1, (2, 2, 9, 9))]
    items += [annotation(c, 1, c, (2, 2, 9, 9)) for c in (2, 3, 4)]
    dataset = read_dataset(write(tmp_path, items, images=images, categories=NAMES))
    for epoch in range(20):
        red, dog = ask(dataset, 0, epoch=epoch, negatives=3)
        assert (red.category_id, dog.category_id) == (1, 3)
        assert not red.exhaustive
    ((red, dog),) = evaluation_questions(
        dataset.images[0], phrases_of(dataset), prompts=4, targets=9
    )
    assert (red.category_id, dog.category_id) == (1, 3)


@pytest.mark.parametrize("settings", [{}, {"max_prompts": 2, "negatives": 3}, {"max_targets": 2}])
def test_static_shapes_are_the_smallest_that_hold_every_question(dataset, settings):
    config = DataConfig(**settings)
    shapes = training_shapes(dataset, config)
    prompts = targets = instances = 0
    for epoch in range(5):
        for row in range(len(dataset.images)):
            questions = ask(dataset, row, epoch=epoch, **{**settings, "targets": shapes.targets})
            prompts = max(prompts, len(questions))
            targets = max(targets, *(len(q.targets) for q in questions))
            instances = max(instances, len({t for q in questions for t in q.targets}))
    assert (shapes.prompts, shapes.targets, shapes.instances) == (prompts, targets, instances)
    shapes = evaluation_shapes(dataset, config)
    for record in dataset.images:
        rows = evaluation_questions(
            record, phrases_of(dataset), prompts=shapes.prompts, targets=shapes.targets
        )
        assert max(sum(len(q.targets) for q in r) for r in rows) <= shapes.instances
