"""The step of clips: one normaliser per stage, the same on any devices, memory of a frame, not of a clip."""

import functools

import jax
import numpy as np
import optax
import pytest

from sam3jax.config import Config
from sam3jax.tasks.clips import Clips, ClipsData, _at_once
from sam3jax.tasks.detection import Detection
from sam3jax.training.mesh import make_mesh, put_batch
from sam3jax.training.sharding import placed
from sam3jax.training.state import init_state
from sam3jax.training.step import make_train_step
from sam3jax.types import ClipBatch
from tests.batches import random_batch, small_config, small_split

pytestmark = pytest.mark.slow

# Two clips of four frames, two prompts: unequal targets, and the third time step has none at all.
COUNTS = np.array([[1, 2], [0, 3], [0, 0], [1, 0], [2, 2], [5, 0], [0, 0], [0, 1]])


def clip_config(frames=4, at_once=1, remat=False, **changes):
    clips = {"frames": frames, "frames_at_once": at_once}
    return small_config(task="clips", clips=clips, model={"remat": remat}, **changes)


def clip_batch(config, counts=COUNTS, seed=1) -> ClipBatch:
    """Random pictures as the frames of clips, clip by clip."""
    plain = random_batch(config, seed, counts)
    frames, number = config.clips.frames, np.arange(len(counts), dtype=np.int32)
    return ClipBatch(
        **{k: getattr(plain, k) for k in plain.__dataclass_fields__},
        clip=number // frames, frame=number, stage=number % frames,
        object_id=np.zeros(plain.targets.boxes.shape[:2], np.int32),
    )  # fmt: skip


DESCENT = optax.sgd(1.0)


@functools.cache
def a_step(settings, devices, parts):
    mesh, task = make_mesh(jax.devices()[:devices]), Clips(Config.model_validate_json(settings))
    return mesh, task, make_train_step(task, DESCENT, mesh, seed=0, parts=parts)


def prepare(config, batch, devices=1, micro=1):
    """(step, its arguments) on that many devices, with plain descent of rate 1. Two devices share the weights."""
    parts = 2 if devices == 2 else 1
    mesh, task, step = a_step(config.model_dump_json(), devices, parts)
    trainable, frozen = small_split(config)
    data = ClipsData(None, None, (), batch.tokens, [])
    prepared, rest = task.prepare(trainable, frozen, data)
    prepared, rest = placed(prepared, mesh), placed(rest, mesh, parts)
    state = placed(init_state(trainable, DESCENT, False), mesh, parts)
    return step, state, rest, prepared, put_batch(batch, task.batch_spec, mesh, micro)


def update(config, batch, devices=1, micro=1):
    """(metrics, gradient) of one step."""
    step, *arguments = prepare(config, batch, devices, micro)
    state, metrics = step(*arguments)
    trainable, _ = small_split(config)
    taken = lambda a, b: np.asarray(a) - np.asarray(b)
    return jax.device_get(metrics), jax.tree.map(taken, trainable, jax.device_get(state.trainable))


def assert_same(one, other, tolerance=1e-5):
    for name, value in one[0].items():
        np.testing.assert_allclose(other[0][name], value, rtol=tolerance, atol=1e-6, err_msg=name)
    norm = optax.tree.norm(one[1])
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(a), 1e-3 * norm)


def some_absent(config):
    batch = clip_batch(config)
    batch.prompts.valid[3, 1] = False
    batch.targets.is_exhaustive[::3] = False
    return batch


WEAK = {"weak_loss": True, "pad_n_queries": None}


@pytest.mark.parametrize(
    ("loss", "devices", "micro"),
    [({}, 8, 1), ({}, 2, 1), ({}, 1, 8), (WEAK, 8, 1)],
    ids=["eight devices", "two devices", "micro-batches", "eight devices, weak"],
)
def test_devices_micro_batches_and_frames_at_once_change_nothing(loss, devices, micro):
    """Eight devices with a frame each, two with one at a time, one with all at once."""
    config, whole = clip_config(loss=loss), clip_config(at_once=8, loss=loss)
    batch = some_absent(config)
    want = update(whole, batch)
    assert want[0]["loss"] > 1
    assert_same(want, update(config, batch, devices, micro))


def test_stages_are_normalised_apart_and_permuting_clips_changes_nothing():
    config = clip_config(at_once=8, loss={})
    batch = clip_batch(config)
    swapped = jax.tree.map(lambda x: np.roll(x, 4, axis=0), batch.replace(tokens=None))
    one = update(config, batch)
    assert_same(one, update(config, swapped.replace(tokens=batch.tokens)))
    still = batch.replace(stage=0 * batch.stage)
    other = update(config, still)[0]["loss"]
    assert abs(other - one[0]["loss"]) > 0.05 * other, "a test that cannot fail"


def test_one_stage_is_the_loss_of_pictures_to_the_bit():
    config = clip_config(frames=1, at_once=8)
    batch = clip_batch(config, COUNTS[:5])
    pictures = Detection(config)
    clips = Clips(config)
    trainable, frozen = small_split(config)
    variables = jax.tree.map(np.asarray, {"trainable": trainable, "frozen": frozen})
    from sam3jax.weights.trainable import merge

    def value(task, **axis):
        def share(trainable, frozen, batch):
            totals = task.count(batch)
            return task.loss(merge(trainable, frozen), None, batch, totals, jax.random.key(0))

        return jax.device_get(jax.jit(share)(variables["trainable"], variables["frozen"], batch))

    want, got = value(pictures), value(clips)
    assert want[0] == got[0]
    assert {k: float(v) for k, v in want[1].items()} == {k: float(v) for k, v in got[1].items()}


def test_memory_follows_a_frame_not_the_clip():
    """Compiled temporaries of a step of eight frames against one of two."""

    def temporaries(frames):
        config = clip_config(frames=frames, remat=True)
        counts = np.tile([[1, 2]], (frames, 1))
        step, *arguments = prepare(config, clip_batch(config, counts))
        return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    two, eight = temporaries(2), temporaries(8)
    assert eight <= 1.15 * two


def test_frames_at_once_is_the_largest_divisor():
    assert [_at_once(8, n) for n in (1, 3, 7, 8, 20)] == [1, 2, 4, 8, 8]
    assert [_at_once(7, n) for n in (1, 6, 7)] == [1, 1, 7]
