"""The generated data set: deterministic, true by construction, readable like any other folder."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sam3jax.config import DataConfig, parse_config
from sam3jax.data import shapes
from sam3jax.data.coco import DataError, decode_mask, used_categories
from sam3jax.data.datasets import open_datasets
from sam3jax.data.folders import read_dataset
from sam3jax.data.shape_pictures import COLOURS, SHAPES, draw, outline
from sam3jax.data.shapes import (
    BASIC,
    COMBINATIONS,
    GROUPS,
    HELD_OUT,
    NEW,
    SEEN,
    draw_scene,
    shapes_dataset,
    write_shapes,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAM3JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def scenes(group, count, seed=0):
    for k in range(count):
        yield draw_scene((seed,), k, GROUPS[group], 192)


def test_held_out_concepts_are_in_no_picture_of_the_seen_ones():
    assert not set(SEEN) & set(HELD_OUT)
    assert set(BASIC) <= set(SEEN)
    words = {w for c in SEEN for w in (c.quality, c.shape)}
    assert all({c.quality, c.shape} <= words for c in COMBINATIONS)
    assert all(c.quality not in words for c in NEW)
    for group in ("basic", "seen"):
        for _, things, _ in scenes(group, 60):
            assert not any(c.answered_by(t) for c in HELD_OUT for t in things)
            assert {t.colour for t in things} <= words


@pytest.mark.parametrize("group", GROUPS)
def test_each_object_is_annotated_under_every_phrase_it_answers(tmp_path, group):
    write_shapes(tmp_path / "s", seed=3, pictures=12, concepts=group, size=192)
    dataset = read_dataset(tmp_path / "s")
    assert not dataset.problems
    for k, image in enumerate(dataset.images):
        pixels, things, visible = draw_scene((3,), k, GROUPS[group], 192)
        np.testing.assert_array_equal(np.asarray(Image.open(image.file)), pixels)
        want = [
            (concept.phrase, mask)
            for thing, mask in zip(things, visible)
            for concept in GROUPS[group].concepts
            if concept.answered_by(thing)
        ]
        assert [dataset.categories[a.category_id] for a in image.annotations] == [
            p for p, _ in want
        ]
        for found, (_, mask) in zip(image.annotations, want):
            decoded = decode_mask(found, image.height, image.width)
            assert (decoded & mask).sum() / (decoded | mask).sum() > 0.98
            x, y, w, h = found.bbox
            ys, xs = np.nonzero(mask)
            assert (x, y) == (xs.min(), ys.min())
            assert (x + w, y + h) == (xs.max() + 1, ys.max() + 1)


def test_colours_in_the_pictures_are_those_of_their_names():
    """Of an object's own pixels, those without pattern have its colour's hue, or are black."""
    import colorsys

    for pixels, things, visible in scenes("new", 40):
        for thing, mask in zip(things, visible):
            if thing.pattern != "solid" or mask.sum() < 100:
                continue
            hue, saturation, value = colorsys.rgb_to_hsv(*np.median(pixels[mask], 0) / 255)
            want, jitter, _, _ = COLOURS[thing.colour]
            if thing.colour == "black":
                assert value < 0.15
                continue
            assert abs((hue * 360 - want + 180) % 360 - 180) <= jitter + 2, thing.colour
            assert saturation > 0.35
            assert (value < 0.5) == (thing.colour == "brown")


def test_masks_are_disjoint_and_mostly_uncovered():
    partly = 0
    for _, things, visible in scenes("seen", 60):
        if not things:
            continue
        assert visible.sum(0).max() == 1
        for thing, mask in zip(things, visible):
            _, (alone,), _ = draw([thing], np.zeros((*mask.shape, 3), np.float32))
            assert not (mask & ~alone).any()
            share = mask.sum() / alone.sum()
            assert share >= 0.6
            partly += share < 0.97
    assert partly >= 15


def test_there_are_empty_pictures_and_small_and_large_objects():
    counts, edges = [], []
    for pixels, things, _ in scenes("seen", 150):
        counts.append(len(things))
        edges += [t.radius / min(pixels.shape[:2]) for t in things]
    assert 2 <= counts.count(0) <= 20
    assert max(counts) >= 7
    assert min(edges) < 0.09
    assert max(edges) > 0.25


def test_outlines_enclose_what_they_name():
    for name, (points, _) in SHAPES.items():
        assert np.abs(np.hypot(*points.T)).max() <= 1.3, name
        thing = shapes.Thing(name, "red", "solid", (50.0, 50.0), 40.0, 11.0, (200, 0, 0))
        polygon = outline(thing)
        x, y = polygon.T
        area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
        _, (mask,), (pixels,) = draw([thing], np.full((100, 100, 3), 220, np.float32))
        assert mask.sum() == pixels
        assert abs(pixels - area) <= 0.02 * area, name  # no crossing lines


def test_the_cache_is_written_once_and_follows_the_seed(cache):
    config = DataConfig(shapes_train=6, shapes_valid=3, shapes_size=64)
    first = shapes_dataset("train", config)
    files = {i.file: i.file.stat().st_mtime_ns for i in first.images}
    assert len(files) == 6
    assert all(cache in f.parents for f in files)
    again = shapes_dataset("train", config)
    assert {i.file: i.file.stat().st_mtime_ns for i in again.images} == files
    other = shapes_dataset("train", config.model_copy(update={"shapes_seed": 1}))
    valid = shapes_dataset("valid", config)
    pictures = [np.asarray(Image.open(d.images[1].file)) for d in (first, other, valid)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert pictures[a].shape != pictures[b].shape or (pictures[a] != pictures[b]).any()
    more = shapes_dataset("train", config.model_copy(update={"shapes_train": 8}))
    for a, b in zip(first.images, more.images):
        assert a.file.read_bytes() == b.file.read_bytes()


def test_an_interrupted_or_doubled_writing_leaves_nothing_half_done(tmp_path, monkeypatch):
    folder = tmp_path / "s"
    real, calls = shapes._write_picture, []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(shapes, "_write_picture", breaks)
    with pytest.raises(DataError, match="No space left"):
        write_shapes(folder, seed=0, pictures=5, size=64)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shapes, "_write_picture", real)
    write_shapes(folder, seed=0, pictures=2, size=64)
    write_shapes(folder, seed=0, pictures=2, size=64)  # another process was faster
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set SAM3JAX_CACHE"):
        write_shapes(tmp_path / "file" / "s", seed=0, pictures=2, size=64)


def test_shapes_are_opened_by_name(cache):
    data = {"train": "shapes", "shapes_train": 30, "shapes_valid": 4, "shapes_size": 64}
    train, valid = open_datasets(parse_config({"data": data}))
    assert (len(train.images), len(valid.images)) == (30, 4)
    assert {train.categories[i] for i in used_categories(train)} <= {c.phrase for c in BASIC}
    with pytest.raises(DataError, match="have no split 'nights', they have train, valid, test"):
        open_datasets(parse_config({"data": data | {"valid_split": "nights"}}))
