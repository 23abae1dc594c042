"""The task `clicks`: one update on one device and on eight, a run folder, a run that is killed."""

import json

import jax
import numpy as np
import optax
import pytest

from sam3jax import train
from sam3jax.config import ConfigError, load_config, parse_config
from sam3jax.model.init import init_params
from sam3jax.tasks.clicks import Clicks
from sam3jax.training import sharding
from sam3jax.training.mesh import make_mesh, put_batch
from sam3jax.training.sharding import placed
from sam3jax.training.state import init_state
from sam3jax.training.step import make_train_step
from sam3jax.types import ClickBatch
from sam3jax.weights.base import open_base
from sam3jax.weights.scope import CLICKS
from sam3jax.weights.trainable import start
from sam3jax.weights.tree import flatten
from tests.batches import SMALL_MODEL
from tests.coco_folders import annotation, write, write_small_shapes
from tests.trainings import Killed, before_step, kill, losses, words

MODEL = {**SMALL_MODEL, "mask_decoder_ffn": 32, "mask_decoder_iou_hidden": 16}
# Objects of each picture: unequal over devices, one picture has none.
OBJECTS = (1, 3, 0, 2, 3, 3, 1, 2)
STEPS = 4
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]
RATE = 2.0**20


def config_of(**changes):
    clicks = {"rounds": 1, "mask_resolution": "prediction", **changes.pop("clicks", {})}
    return parse_config(
        {"task": "clicks", "model": MODEL, "batch_size": 8, "clicks": clicks, **changes}
    )


def random_batch(config) -> ClickBatch:
    """Discs on noise."""
    rng = np.random.default_rng(0)
    i, k, size = len(OBJECTS), max(OBJECTS), config.model.image_size
    y, x = np.mgrid[:size, :size]
    centre, radius = rng.uniform(20, size - 20, (2, i, k, 1, 1)), rng.uniform(6, 20, (i, k, 1, 1))
    masks = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
    return ClickBatch(
        images=rng.integers(0, 256, (i, size, size, 3), np.uint8),
        masks=np.packbits(masks, -1),
        valid=np.arange(k) < np.array(OBJECTS)[:, None],
        points=np.zeros((i, k, 0, 2), np.float32),
        labels=np.zeros((i, k, 0), np.int32),
        image_valid=np.arange(i) != 6,
        image_id=np.arange(i, dtype=np.int32),
        luck=rng.integers(0, 2**32, i, np.uint32),
    )


def random_params(config):
    """A quieter neck: with full noise one bit of one weight moves the gradient by a ten-thousandth."""
    params = init_params(config.model, 0, CLICKS.parts)
    return params | {"tracker_neck": jax.tree.map(lambda x: 0.2 * x, params["tracker_neck"])}


def compiled(config, devices: int, parts: int = 1):
    """update(batch) -> (gradients by path, metrics) of one step of plain descent.

    parts: into how many the weights are split. At the rate RATE what is taken off is so large that the weights' own rounding is nothing beside it.
    """
    mesh = make_mesh(jax.devices()[:devices])
    task = Clicks(config)
    trainable, frozen = start(random_params(config), config)
    prepared, rest = task.prepare(trainable, frozen, None)
    rest = placed(rest, mesh, parts)
    step = make_train_step(task, optax.sgd(RATE), mesh, seed=0, parts=parts)

    def update(batch):
        state = placed(init_state(trainable, optax.sgd(RATE), False), mesh, parts)
        state, metrics = step(state, rest, prepared, put_batch(batch, task.batch_spec, mesh))
        new = jax.device_get(state.trainable)
        taken = jax.tree.map(lambda a, b: (np.asarray(a) - b) / RATE, trainable, new)
        return flatten(taken), jax.device_get(metrics)

    return update


@pytest.fixture(scope="module")
def update():
    return compiled(config_of(), 1)


@pytest.fixture(scope="module")
def alone(update):
    return update(random_batch(config_of()))


@pytest.mark.parametrize(("devices", "micro", "parts"), [(8, None, 8), (2, 2, 1)])
def test_devices_and_micro_batches_equal_one_batch(alone, monkeypatch, devices, micro, parts):
    """Loss, terms and gradients, and so every click: a picture's luck is its own wherever it lies."""
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    config = config_of(micro_batch=micro)
    gradient, metrics = compiled(config, devices, parts)(random_batch(config))
    want, told = alone
    assert told["loss"] > 1
    for name, value in told.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    norm = optax.tree.norm(want)
    assert norm > 0.1
    for path, g in want.items():
        size = max(np.linalg.norm(g), 1e-3 * norm)
        assert np.linalg.norm(gradient[path] - g) <= 1e-5 * size, path


def test_padding_is_worth_nothing_and_luck_is_worth_something(update, alone):
    batch = random_batch(config_of())
    masks = np.where(batch.valid[..., None, None], batch.masks, 255).astype(np.uint8)
    masks[6] = 255
    _, metrics = update(batch.replace(masks=masks))
    assert metrics["loss"] == alone[1]["loss"]
    _, metrics = update(batch.replace(luck=batch.luck + np.uint32(1)))
    assert metrics["loss"] != alone[1]["loss"]


def test_only_what_clicks_read_is_trained(alone):
    config = config_of()
    roots = {path[1] for path in alone[0]}
    assert roots == {"tracker_neck", "prompt_encoder", "mask_decoder", "no_mem_embed"}
    changed = config.model_copy(update={"trainable": ("transformer.decoder.*",)})
    with pytest.raises(ConfigError, match="matches no layer"):
        start(random_params(config), changed)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small_shapes(tmp_path_factory.mktemp("data"), train=12, valid=5)


def arguments(data, output, **changes):
    settings = {
        "task": "clicks", "output": output, "data.train": data, "steps": STEPS, "batch_size": 4,
        "eval_every": 2, "save_every": 2, "data.flip": True, "evaluation.batch_size": 3, "clicks.rounds": 1,
        "clicks.valid_clicks": 3, "clicks.objects": 2, "clicks.mask_resolution": "prediction", **changes,
    }  # fmt: skip
    return [w for w in words(settings, MODEL) if not w.startswith("lora.targets")]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train.main(arguments(data, run)) == 0
    return run


def test_a_run_folder_holds_what_it_should(undisturbed):
    assert sorted(losses(undisturbed)) == [1, 2, 3, 4]
    assert {p.name for p in undisturbed.glob("predictions/*/*.png")} == {"0.png"}
    assert len(list(undisturbed.glob("batches/batch_*.png"))) == 3
    evaluation = json.loads((undisturbed / "evaluation.json").read_text())
    assert {"clicks/mIoU@1", "clicks/mIoU@3", "clicks/NoC@85", "clicks/boundary_F"} <= set(
        evaluation["metrics"]
    )
    assert len(evaluation["mIoU_by_click"]) == 3
    objects = json.loads((undisturbed / "clicks.json").read_text())
    assert len(objects) == evaluation["metrics"]["clicks/objects"]
    means = np.mean([o["ious"] for o in objects], 0)
    np.testing.assert_allclose(means, evaluation["mIoU_by_click"], atol=1e-6)
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["final"]["clicks/mIoU@1"] >= 0
    # How far each figure could be off, and what it is about, in the report as well.
    low, high = evaluation["uncertainty"]["clicks/mIoU@1"]
    assert low <= evaluation["metrics"]["clicks/mIoU@1"] <= high
    assert evaluation["measured"]["objects"] == len(objects)
    page = (undisturbed / "report.html").read_text()
    said = (
        "mean IoU by click",
        "true IoU by predicted IoU",
        "After each click",
        "Worst after the last click",
    )
    assert all(text in page for text in said)
    worst = min(objects, key=lambda o: o["ious"][-1])
    assert "{:.0f}, {:.0f}".format(*worst["click"]) in page


def test_killed_and_resumed_equals_undisturbed(data, undisturbed, tmp_path, monkeypatch):
    run, none = tmp_path / "killed", {"evaluation.panels": 0, "draw_batches": 0}
    with monkeypatch.context() as patch:
        before_step(patch, 4, kill)
        with pytest.raises(Killed):
            train.main(arguments(data, run, **none))
    assert max(losses(run)) < STEPS
    assert train.main(arguments(data, run, **none)) == 0
    assert not list(run.glob("predictions/*/*.png"))
    assert not (run / "batches").exists()
    assert losses(run) == losses(undisturbed)
    for name in ("evaluation.json", "clicks.json"):
        before, after = (json.loads((r / name).read_text()) for r in (undisturbed, run))
        if name == "evaluation.json":
            before, after = before["metrics"], after["metrics"]
        assert before == after


def test_objects_smaller_than_a_pixel_of_the_model_are_said(data, tmp_path, capsys):
    """The picture is seen at a fraction of its size, and nothing of its objects is left."""
    folder = tmp_path / "valid"
    items = [annotation(k, 0, 1, (30 * k + 2, 40, 1, 1)) for k in range(3)]
    write(folder / "valid", items, images=1, size=(2000, 1500))
    run = tmp_path / "run"
    assert train.main(arguments(data, run, **{"data.valid": folder})) == 2
    assert "each is smaller than a pixel of the model" in capsys.readouterr().err


def test_features_read_back_train_as_pictures_do(data, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("SAM3JAX_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "cached"
    assert train.main(arguments(data, run, cache_trunk=2)) == 0
    drawn = "batches/batch_1.png"
    assert (run / drawn).read_bytes() == (undisturbed / drawn).read_bytes()
    ours, theirs = losses(run), losses(undisturbed)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def test_a_run_of_clicks_starts_from_a_run_of_clicks(undisturbed, data, tmp_path):
    before = load_config(undisturbed / "config.yaml")
    config = parse_config({**before.model_dump(mode="json"), "init": str(undisturbed)})
    first = open_base(before).load().params
    weights = open_base(config).load().params
    assert flatten(weights).keys() == flatten(first).keys()
    moved = {p[0] for p, x in flatten(weights).items() if not np.array_equal(x, flatten(first)[p])}
    assert moved == {"tracker_neck", "prompt_encoder", "mask_decoder", "no_mem_embed"}


def test_tuned_heads_survive_a_training_of_the_detector(undisturbed, data, tmp_path):
    """Phrases behind clicks behind phrases: each run holds its own parts, an export all of them."""
    before = load_config(undisturbed / "config.yaml")
    clicked = open_base(parse_config({**before.model_dump(mode="json"), "init": str(undisturbed)})).load().params  # fmt: skip
    detect = {"task": "detect", "init": str(undisturbed), "model": before.model.model_dump(mode="json")}  # fmt: skip
    weights = open_base(parse_config(detect)).load().params
    assert "mask_decoder" not in weights
    run = tmp_path / "phrases"
    chosen = ["transformer.decoder.layers.0.linear1.*"]
    settings = {"task": "detect", "init": undisturbed, "trainable": chosen, "lora.enabled": False, "eval_every": 0}  # fmt: skip
    no_valid = {"data.limit": 4, "steps": 1, "save_every": 1, "evaluation.batches": 1}
    keep = arguments(data, run, **settings, **no_valid)
    assert train.main([k for k in keep if not k.startswith(("clicks.", "model."))]) == 0
    again = open_base(parse_config({**before.model_dump(mode="json"), "init": str(run)})).load().params  # fmt: skip
    for path, want in flatten(clicked).items():
        if path[0] in ("mask_decoder", "tracker_neck", "vit"):
            np.testing.assert_array_equal(flatten(again)[path], want)
