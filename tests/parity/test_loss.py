"""The loss against the published torch loss: terms, gradients, assignments, over every option."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch oracle needs torch")
pytest.importorskip("sam3", reason="the torch oracle needs the sam3 package")

from sam3jax.config import LossConfig
from sam3jax.losses.detection import breakdown
from sam3jax.losses.masks import point_coordinates
from sam3jax.losses.matches import mask_pairs, match
from sam3jax.losses.truth import gather_truth
from tests.loss_cases import LEAVES, Case, assert_same, random_case, run, to_outputs, to_targets
from tests.parity import loss_reference as reference

matched = jax.jit(match, static_argnums=2)


pytestmark = pytest.mark.slow


def assert_equal(case: Case, config: LossConfig, **options) -> dict[str, float]:
    got, want = run(case, config, **options), reference.run(case, config)
    assert_same(got, want)
    parts = breakdown({k: jnp.float32(v) for k, v in got[0].items()}, config)
    np.testing.assert_allclose(sum(parts.values()), got[0]["core_loss"], rtol=1e-5)
    return got[0]


@pytest.mark.parametrize("seed", range(8))
def test_default_loss_equals_torch(seed):
    terms = assert_equal(random_case(seed), LossConfig())
    assert terms["mask_pairs"] > 0
    assert terms["mask_pairs_dropped"] == 0


CASES = {
    "no targets at all": dict(counts=np.zeros((3, 2), int)),
    "one target": dict(counts=np.array([[0, 0], [1, 0], [0, 0]])),
    "a query with several targets": dict(crowded=True, counts=np.full((3, 2), 4)),
    "zero-area target boxes": dict(zero_area=True),
    "logits of +-80": dict(logit_scale=80.0),
    "no usable mask": dict(no_masks=True),
}


@pytest.mark.parametrize("name", CASES)
def test_special_cases_equal_torch(name):
    options = dict(CASES[name])
    without_masks = options.pop("no_masks", False)
    case = random_case(11, **options)
    if without_masks:
        case.mask_valid[:] = False
    terms = assert_equal(case, LossConfig())
    if name == "a query with several targets":
        config = LossConfig()
        queries = matched(to_outputs(case), truth_of(case), config).o2m[-1].reshape(6, -1)
        used = [q[q < case.logits.shape[-1]] for q in np.asarray(queries)]
        assert any(len(np.unique(u)) < len(u) for u in used), "the case has lost its point"
    if without_masks:
        assert terms["mask_pairs"] == terms["loss_mask"] == 0


def test_more_targets_than_queries_equals_torch():
    assert_equal(random_case(5, queries=4, targets=7, instances=7, prompts=1), LossConfig())


RANDOM = 10  # configurations


def random_options(seed: int) -> LossConfig:
    """Every option of the loss drawn at random, so that over the seeds every value occurs."""
    options = itertools.count()

    def pick(*values):
        order = np.random.default_rng(next(options)).permutation(RANDOM)
        return values[order[seed] % len(values)]

    pad = pick(None, 5, 200)
    return LossConfig(
        cost_class=pick(2.0, 1.0), cost_bbox=pick(5.0, 1.0), cost_giou=pick(2.0, 0.5), cost_alpha=pick(0.25, 0.5),
        cost_gamma=pick(2.0, 1.5), o2m_alpha=pick(0.3, 0.6), o2m_threshold=pick(0.4, 0.2), o2m_topk=pick(1, 2, 4),
        loss_bbox=pick(5.0, 1.0), loss_giou=pick(2.0, 0.0), loss_ce=pick(20.0, 3.0), presence_loss=pick(20.0, 3.0),
        alpha=pick(0.25, 0.0, 0.7), gamma=pick(2.0, 0.0, 1.5), pos_weight=pick(10.0, 1.0), pos_focal=pick(False, True),
        weak_loss=pick(False, True), pad_n_queries=pad, pad_scale_pos=1.0 if pad is None else pick(1.0, 2.5),
        use_presence=pick(True, True, False), presence_alpha=pick(0.5, 0.25), presence_gamma=pick(0.0, 2.0),
        masks=pick(True, True, False), loss_mask=pick(200.0, 1.0), loss_dice=pick(10.0, 0.0), focal_alpha=pick(0.25, 0.75),
        focal_gamma=pick(2.0, 0.5), mask_resolution=pick("target", "prediction"), mask_chunk=pick(1, 3, 8),
        semantic=pick(True, True, False), semantic_focal=pick(True, False), semantic_focal_alpha=pick(0.6, 0.25),
        semantic_focal_gamma=pick(2.0, 1.6), loss_semantic_seg=pick(20.0, 2.0), loss_semantic_dice=pick(30.0, 1.0),
        semantic_downsample=pick(True, False), semantic_positive_only=pick(True, False),
        aux=pick(True, True, False), o2m=pick(True, True, False), o2m_weight=pick(2.0, 0.5),
        use_o2m_matcher_on_o2m_aux=pick(True, False), normalization=pick("global", "local", "none"),
        normalize_by_valid_object_num=pick(True, False), scale_by_find_batch_size=pick(True, False),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(RANDOM))
def test_random_options_equal_torch(seed):
    shape = dict(layers=2, prompts=1, images=5, zero_area=seed % 2 == 0, crowded=seed % 3 == 0)
    assert_equal(random_case(seed, **shape), random_options(seed))


def test_random_options_cover_every_option():
    drawn = [random_options(seed).model_dump() for seed in range(RANDOM)]
    fixed = {k for k in drawn[0] if len({str(d[k]) for d in drawn}) == 1}
    sampling = {"num_sample_points", "oversample_ratio", "importance_sample_ratio"}  # tested below
    assert fixed == {"preset", "mask_pairs", "normalize_by_stage_num"} | sampling  # one stage here


def test_published_boxes_preset_has_no_mask_terms_and_equals_torch():
    terms = assert_equal(random_case(3, layers=2), LossConfig(preset="published_boxes"))
    assert not any("mask" in key or "dice" in key for key in terms)


def test_sampled_points_equal_torch_on_the_same_coordinates(monkeypatch):
    config = LossConfig(num_sample_points=20, oversample_ratio=3.0, importance_sample_ratio=0.75)
    case, rng = random_case(6), jax.random.key(6)
    truth = truth_of(case)
    matches = matched(to_outputs(case), truth, config)
    pairs, _ = mask_pairs(to_outputs(case), matches, truth, config, rng)
    # torch draws once for all kept pairs, one-to-one in order of (prompt, target), one-to-many in
    # order of (prompt, query, target): hand it the points that ours draws pair by pair.
    drawn = []
    for group in (0, 1):
        chosen = np.argwhere(np.asarray(pairs.keep & (pairs.group == group)))
        order = [(b, int(pairs.query[b, n]) if group else 0, n) for b, n in chosen]
        keys = [pairs.key[b, n] for b, _, n in sorted(order)]
        points = [point_coordinates(key, config) for key in keys]
        drawn += [torch.from_numpy(np.stack([p[i] for p in points])) for i in (0, 1)]
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: checked(drawn.pop(0), shape))
    assert_equal(case, config, rng=rng)
    assert not drawn


def checked(points, shape):
    assert tuple(points.shape) == shape
    return points


def test_bfloat16_inputs_equal_torch_on_the_same_values():
    case = random_case(8)
    rounded = {
        k: np.asarray(jnp.asarray(getattr(case, k), jnp.bfloat16).astype(jnp.float32))
        for k in LEAVES
    }
    case = dataclasses.replace(case, **rounded)
    # Gradients come back in the inputs' type: 8 bits, and a sum over chunks of such.
    got = run(case, LossConfig(semantic=True), dtype=jnp.bfloat16)
    assert_same(got, reference.run(case, LossConfig(semantic=True)), grads=2**-7)


@pytest.mark.parametrize("seed", range(4))
def test_assignments_equal_torch(seed):
    config = LossConfig()
    shape = [
        {},
        dict(queries=4, targets=7, instances=7),
        dict(crowded=True),
        dict(logit_scale=80.0),
    ][seed]
    case = random_case(20 + seed, **shape)
    matches = matched(to_outputs(case), truth_of(case), config)
    layers, _, q = case.logits.shape
    targets = reference.to_torch_targets(case)
    offset = np.concatenate([[0], case.num_targets.reshape(-1).cumsum()])
    one, many = reference.matcher(config), reference.wrapper(config).o2m_matcher
    for layer in range(layers):
        for key, ours in (("", matches.o2o[layer]), ("_o2m", matches.o2m[layer])):
            out = {
                "pred_logits": torch.from_numpy(getattr(case, f"logits{key}")[layer][..., None]),
                "pred_boxes": torch.from_numpy(getattr(case, f"boxes{key}")[layer]),
            }
            final = key and layer == layers - 1
            b, query, target = (many if final else one)(out, targets)
            if target is None:
                target = torch.arange(len(b))
            want = {(int(i), int(n), int(j) - offset[int(i)]) for i, n, j in zip(b, query, target)}
            got = {(i, int(ours[i, t, k]), t) for i, t, k in np.argwhere(np.asarray(ours) < q)}
            assert got == want


def truth_of(case: Case):
    return gather_truth(to_targets(case), jnp.asarray(case.prompt_valid))
