"""Pictures of training batches: what the model sees, every question, and no end of a run for their sake."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sam3jax.config import parse_config
from sam3jax.data.folders import read_dataset
from sam3jax.data.loader import make_train_loader
from sam3jax.data.prompts import vocabulary
from sam3jax.training.first_batches import draw_first
from sam3jax.types import ClickBatch
from sam3jax.viewing import batches
from sam3jax.viewing.batches import draw_batch, draw_click_batch
from tests.coco_folders import annotation, write

GREEN, RED = (20, 170, 60), (215, 30, 40)  # clicks inside and outside


def has(image, shade):
    return bool((np.asarray(image) == shade).all(-1).any())


@pytest.fixture
def batch(tmp_path):
    items = [annotation(k, k, 1, (2, 2, 20, 18)) for k in range(5)]
    items += [annotation(5, 4, 3, (30, 10, 20, 18))]
    dataset = read_dataset(write(tmp_path / "d", items, images=5))
    config = parse_config({"model": {"preset": "tiny"}, "batch_size": 5})
    phrases = vocabulary(config.data, dataset)
    loader = make_train_loader(dataset, phrases, np.zeros((len(phrases), 16)), config)
    found = next(loader)
    loader.close()
    return found, phrases


def test_each_question_has_its_picture_and_pixels_are_the_batch_s(batch):
    found, phrases = batch
    titles = []
    sheet = draw_batch(found, phrases, lambda k: titles.append(k) or f"row {k}")
    assert titles == [0, 1, 2, 3, 4]
    asked = found.prompts.valid.sum(1)
    assert asked.max() == 2
    assert sheet.width == 320 * 3 + 12
    # The first picture of the first row is the batch's own, only scaled.
    first = sheet.crop((0, 48, 320, 368)).resize((56, 56), Image.Resampling.LANCZOS)
    own = Image.fromarray(found.images[0]).resize((56, 56), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(first).astype(int) - np.asarray(own)).mean() < 2
    rows = sheet.height // (320 + 48)
    assert rows == 5


def test_rows_that_only_fill_up_are_not_drawn_and_a_large_batch_has_bounds(batch, monkeypatch):
    found, phrases = batch
    fewer = found.replace(image_valid=np.array([True, False, True, False, False]))
    assert draw_batch(fewer, phrases).height < 3 * 378
    monkeypatch.setattr(batches, "_MOST", 4)
    titles = []
    sheet = draw_batch(found, phrases, lambda k: titles.append(k) or "t")
    assert titles == [0, 1]
    assert sheet.height < 3 * 378 + 40  # a note says what is left out


def test_objects_are_drawn_with_their_stored_points():
    masks = np.zeros((1, 2, 40, 5), np.uint8)
    masks[0, 0, 10:20] = 0xFF
    points = np.array([[[[5, 15], [5, 35]], [[0, 0], [0, 0]]]], np.float32)
    batch = ClickBatch(
        images=np.zeros((1, 40, 40, 3), np.uint8),
        masks=masks,
        valid=np.array([[True, True]]),
        points=points,
        labels=np.array([[[1, 0], [-2, -2]]], np.int32),
        image_valid=np.array([True]),
        image_id=np.array([0], np.int32),
        luck=np.zeros(1, np.uint32),
    )
    sheet = draw_click_batch(batch)
    left = sheet.crop((326, 48, 646, 368))
    assert has(left, GREEN)
    assert has(left, RED)
    # Inside lies on the object, outside below it: eight screen pixels to one of the picture.
    at = lambda shade: np.argwhere((np.asarray(left) == shade).all(-1)).mean(0)
    np.testing.assert_allclose(at(GREEN), [15.5 * 8, 5.5 * 8], atol=2)
    np.testing.assert_allclose(at(RED), [35.5 * 8, 5.5 * 8], atol=2)
    right = sheet.crop((652, 48, 972, 368))
    assert not has(right, GREEN)


class Log:
    """What draw_first asks of a log."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    def picture(self, step, name, picture, folder):
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{name}.png")


def test_a_picture_is_kept_by_a_run_that_continues_and_none_ends_it(tmp_path):
    log, dark, bright = Log(), Image.new("L", (4, 4)), Image.new("L", (4, 4), 255)
    file = tmp_path / "batches" / "batch_1.png"
    draw_first(1, lambda: dark, tmp_path, log, again=True)
    draw_first(1, lambda: bright, tmp_path, log, again=False)
    assert Image.open(file).getextrema() == (0, 0)
    draw_first(1, lambda: bright, tmp_path, log, again=True)
    assert Image.open(file).getextrema() == (255, 255)
    other = tmp_path / "other"
    other.mkdir()
    (other / "batches").write_text("")  # a file where the folder should be
    draw_first(1, lambda: dark, other, log, again=True)
    assert "batch 1 is not drawn" in log.lines[-1]
    draw_first(1, lambda: dark, tmp_path / "removed", log, again=True)
    assert not (tmp_path / "removed").exists()
