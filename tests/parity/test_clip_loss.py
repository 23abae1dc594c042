"""The loss of a clip and every gradient of it equal torch, with one normaliser per stage."""

import functools

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sam3")
from convert import to_torch
from sam3jax.config import ClipsConfig, Config, LossConfig
from sam3jax.losses.detection import with_f1
from sam3jax.tasks.clips import Clips
from sam3jax.types import ClipBatch
from tests import bridge, video_reference
from tests import torch_reference as reference

FRAMES, PROMPTS = 3, 2
TERM, GRADIENT = 1e-5, 1e-4
pytestmark = pytest.mark.slow

NORMALISATIONS = {
    "plain": dict(scale_by_find_batch_size=False),
    "by stages": dict(scale_by_find_batch_size=False, normalize_by_stage_num=True),
    "by root of prompts": dict(scale_by_find_batch_size=True),
}


@functools.cache
def oracle():
    size = reference.SMALL
    model = reference.detector(size, 3)
    frames = video_reference.clip_example(size, 11, frames=FRAMES, prompts=PROMPTS, max_targets=3)
    counts = [int(f["num_targets"].sum()) for f in frames]
    assert len(set(counts)) > 1, "frames with equal targets cannot tell stages apart"
    return size, model, frames


def clip_batch(model, frames) -> ClipBatch:
    """The oracle's frames, one clip, as the task takes them."""
    inputs = [bridge.inputs(model, f) for f in frames]
    join = lambda *x: np.concatenate(x)
    images = join(*(i[0] for i in inputs))
    number = np.arange(len(images), dtype=np.int32)
    targets = jax.tree.map(join, *(bridge.targets(f) for f in frames))
    return ClipBatch(
        images=images, tokens=inputs[0][1], prompts=jax.tree.map(join, *(i[2] for i in inputs)),
        targets=targets, image_valid=np.ones(len(images), bool), image_id=number, clip=0 * number,
        frame=number, stage=number, object_id=np.zeros(targets.boxes.shape[:2], np.int32),
    )  # fmt: skip


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_terms_and_gradients_of_a_clip_equal_torch(name):
    size, model, frames = oracle()
    options = NORMALISATIONS[name]
    by_stage = options.get("normalize_by_stage_num", False)
    root = options["scale_by_find_batch_size"]
    want, want_grads, alone = video_reference.clip_step(
        model, frames, normalize_by_stage_num=by_stage, loss={"sqrt_batch": root}
    )
    assert want["core_loss"] == pytest.approx(sum(alone) / (FRAMES if by_stage else 1), rel=1e-5)
    config = Config(
        task="clips", model=bridge.model_config(size), loss=LossConfig(**options),
        clips=ClipsConfig(frames=FRAMES),
    )  # fmt: skip
    task, batch = Clips(config), clip_batch(model, frames)

    @jax.jit
    def step(params, batch):
        def loss(params):
            return task.loss({"params": params}, None, batch, task.count(batch), jax.random.key(0))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (total, terms), grads = step(bridge.params(model, size), batch)
    assert float(total) == pytest.approx(want["core_loss"], rel=TERM)
    terms, compared = with_f1(terms), 0
    for key, value in want.items():
        if (key.endswith("_o2m") and key.startswith("presence")) or "f1" in key or "acc" in key:
            continue  # constant zeros in torch; counts
        assert abs(float(terms[key]) - value) <= TERM * max(abs(value), 1e-3), key
        compared += 1
    assert compared == 7 * config.model.decoder_layers + 5
    got = to_torch(jax.device_get(grads), config.model)
    scale = max(np.abs(g).max() for g in want_grads.values())
    for key, gradient in got.items():
        if (wanted := want_grads.get(key)) is None or np.abs(wanted).max() < 1e-6 * scale:
            assert np.abs(gradient).max() < 1e-6 * scale, key
            continue
        assert np.abs(gradient - wanted).max() <= GRADIENT * np.abs(wanted).max(), key
