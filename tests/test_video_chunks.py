"""Detection in video, spread over devices: equal to one device and to frame by frame."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sam3jax.model import Sam3
from sam3jax.model.tracker_neck import TrackerNeck
from sam3jax.training.mesh import make_mesh
from sam3jax.types import Prompts
from sam3jax.video import chunks
from sam3jax.video.chunks import (
    ChunkOptions,
    SecondNeck,
    Thresholds,
    VideoDetector,
    detect_frame,
    joint_logits,
)
from sam3jax.weights.scope import CLICKS
from tests.batches import small_config, small_params
from tests.xla import AS_USERS_COMPILE

pytestmark = pytest.mark.slow

CONFIG = small_config()
MODEL = Sam3(CONFIG.model)
PROMPTS = 3
# Untrained scores are low: thresholds at which some detections stay and some go.
OPTIONS, THRESHOLDS = ChunkOptions(keep=5), Thresholds(0.3, 0.6)
LEVELS = SecondNeck(CONFIG.model)


def video(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 30, 44, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def as_users_compile():
    """Frames alone and in a loop are two programs; XLA's older emitter rounds their masks 4e-6 of 11 apart."""
    whole = chunks._detect_chunk.__wrapped__
    compiled = jax.jit(whole, static_argnums=(0, 1, 2, 3), compiler_options=AS_USERS_COMPILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_detect_chunk", compiled)
        yield


@pytest.fixture(scope="module")
def asked():
    """(variables, text, prompts)"""
    rng = np.random.default_rng(1)
    variables = {"params": small_params(CONFIG.model, parts=CLICKS.parts)}
    tokens = np.zeros((PROMPTS, CONFIG.model.text_length), np.int32)
    tokens[:, :4] = rng.integers(1, CONFIG.model.vocab_size, (PROMPTS, 4))
    text = jax.jit(lambda v, t: MODEL.apply(v, t, method="encode_text"))(variables, tokens)
    prompts = Prompts(
        text_id=np.arange(PROMPTS, dtype=np.int32)[None],
        valid=np.ones((1, PROMPTS), bool),
        boxes=np.zeros((1, PROMPTS, 0, 4), np.float32),
        box_labels=np.zeros((1, PROMPTS, 0), np.int32),
        box_valid=np.zeros((1, PROMPTS, 0), bool),
    )
    return variables, jax.device_get(text), prompts


def detector(
    asked, devices: int, options: ChunkOptions = OPTIONS, levels=LEVELS, thresholds=THRESHOLDS
):
    mesh = make_mesh(jax.devices()[:devices])
    return VideoDetector(MODEL, *asked, mesh, options, thresholds, levels)


@pytest.fixture(scope="module")
def one_by_one(asked):
    """Every frame of an eleven-frame video, by itself, without any mesh."""
    variables, text, prompts = asked
    size = CONFIG.model.image_size
    squashed = [detector(asked, 1)._squashed(f) for f in video(11)]
    frame = lambda v, t, p, x: detect_frame(MODEL, OPTIONS, LEVELS, v, t, p, THRESHOLDS, x)
    one = jax.jit(frame, compiler_options=AS_USERS_COMPILE)
    assert squashed[0].shape == (size, size, 3)
    return [jax.device_get(one(variables, text, prompts, x)) for x in squashed]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("devices", "each"), [(1, 1), (8, 1), (3, 2)])
def test_any_number_of_devices_equals_frame_by_frame(asked, one_by_one, devices, each, reverse):
    """Eleven frames: the last chunk is ragged on 8 and on 3 x 2 devices."""
    run = detector(asked, devices, OPTIONS._replace(frames_per_device=each))
    found = list(run.detections(video(11), reverse))
    assert [n for n, _ in found] == list(range(11))[:: -1 if reverse else 1]
    for number, got in found:
        want = one_by_one[number]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6, atol=1e-6
            ),
            got,
            want,
        )
        np.testing.assert_array_equal(got.query, want.query)
        assert [str(x.dtype) for x in got.levels] == ["bfloat16"] * 3


def test_frames_differ_and_some_detections_are_dropped(one_by_one):
    """The comparison above would prove nothing otherwise."""
    logits = np.stack([f.logits for f in one_by_one])
    assert (logits > -100).any()
    assert (logits < -100).any()
    assert len(np.unique(logits[:, 0, 0])) == 11


def test_the_joint_score_is_class_times_presence():
    rng = np.random.default_rng(0)
    logits, presence = rng.normal(0, 6, (2, 3, 7)), rng.normal(0, 6, (2, 3))
    outputs = SimpleNamespace(o2o=SimpleNamespace(logits=logits), presence_logits=presence)
    got = joint_logits(outputs)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    prob = sigmoid(logits[-1]) * sigmoid(presence[-1])[:, None]
    want = np.log(np.maximum(prob, 1e-3) / np.maximum(1 - prob, 1e-3))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(got).max() <= np.log(1 / 0.001)


def test_the_joint_score_is_a_switch(asked, one_by_one):
    options, all_stay = OPTIONS._replace(joint_presence=False), Thresholds(0.0, 1.0)
    ((_, found),) = detector(asked, 1, options, None, all_stay).detections(video(1))
    assert found.levels is None
    variables, text, prompts = asked
    pixels = detector(asked, 1)._squashed(video(1)[0])
    outputs = jax.jit(
        lambda v, t, p, x: MODEL.apply(
            v, MODEL.apply(v, x[None], method="encode_image"), t, p, method="detect"
        )
    )(variables, text, prompts, pixels)
    want = -np.sort(-np.asarray(outputs.o2o.logits[-1]), -1)[:, : OPTIONS.keep]
    np.testing.assert_allclose(found.logits, want, rtol=1e-5)
    assert not np.allclose(found.logits, one_by_one[0].logits, atol=1e-3)


def test_levels_are_the_second_necks(asked, one_by_one):
    """Those that the interactive path is made of, before its own projections."""
    variables = asked[0]
    pixels = detector(asked, 1)._squashed(video(1)[0])
    trunk = MODEL.apply(variables, pixels[None], method="encode_trunk")
    want = TrackerNeck(CONFIG.model).apply({"params": variables["params"]["tracker_neck"]}, trunk)
    sizes = [x.shape[0] // CONFIG.model.grid for x in one_by_one[0].levels]
    assert sizes == [4, 2, 1]
    for got, level in zip(one_by_one[0].levels, want, strict=True):
        np.testing.assert_allclose(got.astype(np.float32), level[0], rtol=1e-2, atol=1e-3)


def test_thresholds_are_of_each_phrase_and_compile_nothing(asked):
    """The first phrase drops all, the second nothing, and one program does both."""
    every, none = (detector(asked, 1, thresholds=Thresholds(p, 1.0)) for p in (0.0, 1.0))
    mixed = detector(asked, 1, thresholds=Thresholds([1.0, 0.0, 0.0], 1.0))
    ((_, all_stay),) = every.detections(video(1))
    programs = chunks._detect_chunk._cache_size()
    ((_, got),) = mixed.detections(video(1))
    ((_, nothing),) = none.detections(video(1))
    assert chunks._detect_chunk._cache_size() == programs
    assert (nothing.logits < -100).all()
    np.testing.assert_array_equal(got.logits[0], nothing.logits[0])
    np.testing.assert_array_equal(got.logits[1:], all_stay.logits[1:])


@pytest.mark.parametrize("frames", [0, 1])
def test_a_video_of_no_frame_or_one(asked, frames):
    found = list(detector(asked, 8).detections(video(frames)))
    assert [n for n, _ in found] == list(range(frames))


class Endless:
    """Frames made on demand, so that only what is held on to can grow."""

    def __init__(self, frames: int) -> None:
        self._frames = frames
        self.read = 0

    def __len__(self) -> int:
        return self._frames

    def __getitem__(self, number: int) -> np.ndarray:
        self.read += 1
        return np.full((30, 44, 3), number % 256, np.uint8)


def test_live_buffers_are_constant(asked):
    """Sixty frames on eight devices; what lives on the devices after each is counted."""
    run = detector(asked, 8)
    gc.collect()
    gc.freeze()  # what was there before is not searched again after each frame
    before = {id(x) for x in jax.live_arrays()}
    sizes = []
    for _, found in run.detections(Endless(60)):
        del found
        gc.collect()
        sizes.append(sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))
    gc.unfreeze()
    steady = sizes[8:48]
    assert max(steady) <= max(sizes[:16])
    assert len(set(steady[8:16])) <= 8
    assert steady[:8] == steady[8:16] == steady[-8:]


def test_the_next_chunk_is_dispatched_before_a_chunk_is_read(asked):
    """And no more than that one: each frame is read once, one chunk ahead."""
    source = Endless(40)
    for number, _ in detector(asked, 8).detections(source):
        assert source.read == min((number // 8 + 2) * 8, 40)
