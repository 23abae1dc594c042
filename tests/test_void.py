"""Void pixels: neither target nor error of any mask. tests/test_clips.py: how batches come by them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sam3jax.config import LossConfig
from sam3jax.losses.detection import compute_losses
from sam3jax.losses.masks import MaskPairs, mask_sums
from sam3jax.losses.semantic import semantic_losses
from sam3jax.losses.truth import Truth
from sam3jax.types import Targets
from tests.loss_cases import random_case, to_outputs, to_targets

SIZE, COARSE, WIDE = (24, 36), (12, 18), 5  # of targets; of predictions; channels
ROWS = 3


@pytest.fixture(scope="module")
def drawn():
    """embed [1, R, D], pixels [1, Y', X', D], masks [R, Y, X] and void [Y, X] bool."""
    rng = np.random.default_rng(0)
    embed = rng.normal(size=(1, ROWS, WIDE)).astype(np.float32)
    pixels = rng.normal(size=(1, *COARSE, WIDE)).astype(np.float32)
    masks = rng.random((ROWS, *SIZE)) < 0.3
    void = np.zeros(SIZE, bool)
    void[4:12, 6:20] = True
    return embed, pixels, masks, void


def packed(mask: np.ndarray) -> jax.Array:
    return jnp.asarray(np.packbits(mask, axis=-1))


def pairs() -> MaskPairs:
    index = jnp.arange(ROWS)[None]
    return MaskPairs(index, index, jnp.zeros_like(index), jnp.ones((1, ROWS), bool), None)


def ours(config, embed, pixels, masks, void):
    bits = None if void is None else packed(void)[None]
    sums = mask_sums(embed, pixels, packed(masks)[None], pairs(), config, bits)
    return sums[0, 0]  # focal, dice


def of_known_pixels(config, embed, pixels, masks, void) -> tuple[torch.Tensor, torch.Tensor]:
    """Focal and dice from the pixels that are known alone: they are picked, not weighted."""
    logits = torch.einsum("rd,yxd->ryx", embed[0], pixels[0])
    if config.mask_resolution == "prediction":
        masks, void = masks[:, 1::2, 1::2], void[1::2, 1::2]
    else:
        logits = F.interpolate(logits[None], SIZE, mode="bilinear", align_corners=False)[0]
    known = torch.as_tensor(~void)
    x, t = logits[:, known], torch.as_tensor(masks, dtype=torch.float32)[:, known]
    p = x.sigmoid()
    right = p * t + (1 - p) * (1 - t)
    weight = config.focal_alpha * t + (1 - config.focal_alpha) * (1 - t)
    each = weight * (1 - right) ** config.focal_gamma
    focal = (each * F.binary_cross_entropy_with_logits(x, t, reduction="none")).mean(1)
    dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    return focal.sum(), dice.sum()


@pytest.mark.parametrize("resolution", ["prediction", "target"])
def test_losses_and_gradients_are_those_of_the_known_pixels(drawn, resolution):
    config = LossConfig(mask_resolution=resolution, mask_chunk=2)
    embed, pixels, masks, void = drawn
    leaves = [torch.tensor(x, requires_grad=True) for x in (embed, pixels)]
    focal, dice = of_known_pixels(config, *leaves, masks, void)
    (focal + 3 * dice).backward()
    value = lambda e, p: ours(config, e, p, masks, void) @ jnp.array([1.0, 3.0])
    np.testing.assert_allclose(
        ours(config, embed, pixels, masks, void), [focal.item(), dice.item()], rtol=1e-5
    )
    for grad, leaf in zip(jax.grad(value, (0, 1))(embed, pixels), leaves, strict=True):
        scale = np.abs(leaf.grad.numpy()).max()
        np.testing.assert_allclose(grad, leaf.grad.numpy(), atol=1e-5 * scale)


@pytest.mark.parametrize("resolution", ["prediction", "target"])
def test_what_is_said_of_void_pixels_changes_nothing(drawn, resolution):
    config = LossConfig(mask_resolution=resolution)
    embed, pixels, masks, void = drawn
    other = masks | void
    want, got = (ours(config, embed, pixels, m, void) for m in (masks & ~void, other))
    np.testing.assert_array_equal(want, got)
    assert np.abs(ours(config, embed, pixels, other, None) - want).min() > 1e-3


def test_sampled_points_in_void_do_not_count(drawn):
    config = LossConfig(num_sample_points=64)
    embed, pixels, masks, void = drawn
    keys = jax.random.split(jax.random.key(0), ROWS)[None]
    keyed = pairs().replace(key=keys)
    sums = jax.jit(lambda m, v: mask_sums(embed, pixels, m, keyed, config, v))
    ask = lambda m, v: sums(packed(m)[None], packed(v)[None])
    np.testing.assert_array_equal(ask(masks & ~void, void)[0], ask(masks | void, void)[0])


def test_no_void_pixel_is_no_change(drawn):
    embed, pixels, masks, void = drawn
    config, none = LossConfig(), np.zeros_like(void)
    want = ours(config, embed, pixels, masks, None)
    np.testing.assert_array_equal(ours(config, embed, pixels, masks, none), want)


def test_a_frame_of_void_alone_teaches_nothing(drawn):
    embed, pixels, masks, void = drawn
    config, everything = LossConfig(), np.ones_like(void)
    value = lambda e, p: ours(config, e, p, masks, everything).sum()
    found, grads = jax.value_and_grad(value, (0, 1))(embed, pixels)
    assert np.isfinite(found)
    assert all(not np.asarray(g).any() for g in grads)


@pytest.mark.parametrize("downsample", [True, False])
def test_the_semantic_head_is_not_asked_about_void(drawn, downsample):
    _, _, masks, void = drawn
    config = LossConfig(semantic=True, semantic_downsample=downsample)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, *COARSE)), jnp.float32)
    known = {
        "instance": jnp.arange(ROWS)[None],
        "real": jnp.ones((1, ROWS), bool),
        "valid": jnp.ones(1, bool),
    }
    truth = Truth(**{**dict.fromkeys(Truth._fields), **known})

    def ask(logits, masks):
        fields = dict.fromkeys(Targets.__dataclass_fields__)
        fields |= {"masks": packed(masks)[None], "void": packed(void)[None]}
        return semantic_losses(logits, Targets(**fields), truth, config)

    total = lambda logits, masks: sum(v.sum() for n, v in ask(logits, masks).items() if n[:4] == "loss")  # fmt: skip
    inside = np.zeros(COARSE, bool)
    inside[3:5, 5:8] = True  # coarse pixels far inside void
    grad = jax.grad(total)(logits, masks & ~void)
    assert not np.asarray(grad)[0, inside].any()
    assert np.asarray(grad)[0, :2].all()
    shifted = logits + 5.0 * inside
    found = {name: float(value[0]) for name, value in ask(logits, masks & ~void).items()}
    for name, value in ask(shifted, masks & ~void).items():
        assert float(value[0]) == pytest.approx(found[name], abs=1e-6), name


def test_the_whole_loss_reads_it():
    case = random_case(0)
    outputs, targets = to_outputs(case), to_targets(case)
    valid = jnp.asarray(case.prompt_valid)
    total = lambda void: compute_losses(outputs, targets.replace(void=void), valid, LossConfig())[1]
    shape = (len(targets.masks), *targets.masks.shape[2:])
    plain, none, half = (
        total(v) for v in (None, np.zeros(shape, np.uint8), np.full(shape, 0xAA, np.uint8))
    )
    assert {n: float(v) for n, v in none.items()} == {n: float(v) for n, v in plain.items()}
    changed = {n for n in plain if float(half[n]) != float(plain[n])}
    assert "loss_mask" in changed
    assert "loss_bbox" not in changed
