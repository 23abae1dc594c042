"""Generated X-rays: the same from the same seed, sixteen bits and dark, objects that overlap whole."""

import numpy as np
import pytest
from PIL import Image

from sam3jax.config import parse_config
from sam3jax.data.click_loader import clickable
from sam3jax.data.datasets import read_datasets
from sam3jax.data.ledger import DataError
from sam3jax.data.records import decode_mask
from sam3jax.data.xrays import draw_xray, xrays_dataset


@pytest.fixture(scope="module")
def config():
    data = {"train": "xrays", "shapes_train": 6, "shapes_valid": 3, "shapes_size": 96}
    return parse_config({"task": "clicks", "data": data})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAM3JAX_CACHE", str(tmp_path))


def test_a_picture_follows_from_its_seed():
    (a, bodies), (b, _), (c, _) = (draw_xray((0, s), 4, 64) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).mean() > 0.5
    assert bodies


def test_values_are_dark_and_objects_darker_and_overlapping():
    overlaps = 0
    for number in range(12):
        values, bodies = draw_xray((3, 0), number, 96)
        assert values.dtype == np.uint16
        assert values.max() < 6000  # of 65,535: black where the lower byte is cut off
        areas = [body.cover >= 0.5 for body in bodies]
        layers = np.sum(areas, 0)
        assert values[layers > 0].mean() < values[layers == 0].mean()
        overlaps += (layers > 1).any()
        for area in areas:
            assert (layers[area] == 1).mean() >= 0.3
    assert overlaps >= 4


def test_the_data_set_reads_back_what_was_drawn(config):
    train, valid = read_datasets(config)
    assert [len(d.images) for d in (train, valid)] == [6, 3]
    for number, record in enumerate(valid.images):
        _, bodies = draw_xray((0, 1), number, 96)
        found = [decode_mask(a, 96, 96) for a in clickable(record)]
        assert len(found) == len(bodies)
        for mask, body in zip(found, bodies, strict=True):
            np.testing.assert_array_equal(mask, body.cover >= 0.5)
        with Image.open(record.file) as stored:
            assert stored.mode.startswith("I")
        pixels = np.asarray(record.open())
        assert (
            pixels.max() > 40
        )  # scaled by what the picture holds: shifted by eight bits it would be 23
    with pytest.raises(DataError, match="have no split 'nowhere'"):
        xrays_dataset("nowhere", config.data)
