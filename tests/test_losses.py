"""What the loss promises by itself: padding, order, devices, budgets, finite gradients; and the frozen
figures of the torch package, which need no torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sam3jax.config import LossConfig
from sam3jax.losses.detection import breakdown, compute_losses
from sam3jax.losses.masks import MaskPairs, mask_sums
from sam3jax.losses.matches import match
from sam3jax.losses.truth import gather_truth
from sam3jax.types import Detections, Outputs
from tests.loss_cases import (
    LEAVES,
    Case,
    assert_same,
    loss_and_gradient,
    random_case,
    run,
    to_outputs,
    to_targets,
)

CONFIG = LossConfig(semantic=True, mask_chunk=3)
# Two compiled programs cover most of this file: keep to these shapes.
SHAPE = dict(images=3, prompts=2, queries=5, layers=2, targets=3, instances=4)
few = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def replace(case: Case, **arrays) -> Case:
    return dataclasses.replace(case, **arrays)


def prompts_of(case: Case, order: np.ndarray) -> Case:
    """The case with the prompts of every picture in another order (or fewer of them)."""
    i, p = case.prompt_valid.shape
    pairs = (np.arange(i)[:, None] * p + order).reshape(-1)
    layered = {
        k: getattr(case, k)[:, pairs]
        for k in ("logits", "boxes", "logits_o2m", "boxes_o2m", "presence")
    }
    plain = {k: getattr(case, k)[pairs] for k in ("masks", "masks_o2m", "semantic")}
    asked = {
        k: getattr(case, k)[:, order]
        for k in ("index", "num_targets", "exhaustive", "prompt_valid")
    }
    return replace(case, **layered, **plain, **asked)


def queries_of(case: Case, order: np.ndarray) -> Case:
    layered = {
        k: getattr(case, k)[:, :, order] for k in ("logits", "boxes", "logits_o2m", "boxes_o2m")
    }
    return replace(case, **layered, masks=case.masks[:, order], masks_o2m=case.masks_o2m[:, order])


def gradients_as_case(case: Case, grads: dict) -> Case:
    """Gradients in the form of a case, so that the same re-ordering can be applied to them."""
    return replace(case, **grads)


def leaves(case: Case) -> dict:
    return {k: getattr(case, k) for k in LEAVES}


@few
@given(seeds)
def test_padding_never_changes_loss_or_gradient(seed):
    """More room for targets, instances and pictures' prompts, filled with nonsense."""
    case = random_case(seed, **SHAPE)
    rng = np.random.default_rng(seed)
    i, m = case.target_boxes.shape[:2]
    index = np.where(case.index == m, m + 2, case.index)
    padded = replace(
        case,
        target_boxes=np.concatenate(
            [case.target_boxes, rng.uniform(size=(i, 2, 4)).astype(np.float32)], 1
        ),
        target_masks=np.concatenate([case.target_masks, np.ones_like(case.target_masks[:, :2])], 1),
        mask_valid=np.concatenate([case.mask_valid, np.ones((i, 2), bool)], 1),
        index=np.concatenate([index, np.full((*index.shape[:2], 2), m + 2, np.int32)], 2),
    )
    assert_same(run(padded, CONFIG), run(case, CONFIG), grads=1e-5)


@few
@given(seeds)
def test_order_of_prompts_and_queries_permutes_the_result(seed):
    case, rng = random_case(seed, **SHAPE), np.random.default_rng(seed)
    terms, grads = run(case, CONFIG)
    for reorder, n in ((prompts_of, 2), (queries_of, 5)):
        order = rng.permutation(n)
        moved = leaves(reorder(gradients_as_case(case, grads), order))
        assert_same(run(reorder(case, order), CONFIG), (terms, moved), grads=1e-5)


@few
@given(seeds)
def test_order_of_targets_and_instances_never_matters(seed):
    case, rng = random_case(seed, **SHAPE), np.random.default_rng(seed)
    q = case.logits.shape[-1]
    found = np.asarray(matches_of(case).o2m[-1]).reshape(6, -1)
    # One query with two targets takes its class from the last one: there order is meant to matter.
    assume(all(len(np.unique(row[row < q])) == (row < q).sum() for row in found))
    order = rng.permutation(4)
    place = np.append(np.argsort(order), 4)
    index = place[case.index].astype(np.int32)
    for b in np.ndindex(3, 2):
        n = case.num_targets[b]
        index[b][:n] = rng.permutation(index[b][:n])
    moved = replace(
        case, index=index, target_boxes=case.target_boxes[:, order], mask_valid=case.mask_valid[:, order],
        target_masks=case.target_masks[:, order],
    )  # fmt: skip
    assert_same(run(moved, CONFIG), run(case, CONFIG), grads=1e-5)


@few
@given(seeds, st.integers(0, 1))
def test_a_masked_out_prompt_equals_an_absent_one(seed, gone):
    case = random_case(seed, **SHAPE)
    masked = replace(case, prompt_valid=np.arange(2)[None].repeat(3, 0) != gone)
    stay = np.array([1 - gone])
    terms, grads = run(masked, CONFIG)
    want, want_grads = run(prompts_of(case, stay), CONFIG)
    got = leaves(prompts_of(gradients_as_case(masked, grads), stay))
    assert_same((terms, got), (want, want_grads), grads=1e-5)
    dead = leaves(prompts_of(gradients_as_case(masked, grads), np.array([gone])))
    assert all(np.abs(g).max() == 0 for g in dead.values())


def matches_of(case: Case, config: LossConfig = CONFIG):
    return _match(to_outputs(case), to_targets(case), jnp.asarray(case.prompt_valid), config)


_match = jax.jit(lambda o, t, v, c: match(o, gather_truth(t, v), c), static_argnums=3)

EXTREMES = {
    "no targets": dict(counts=np.zeros((3, 2), int)),
    "saturated logits": dict(logit_scale=200.0),
    "zero-area targets": dict(zero_area=True),
    "crowded": dict(crowded=True),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_loss_and_gradients_are_finite_at_the_extremes(name):
    case = random_case(1, **SHAPE, **EXTREMES[name])
    case.boxes[0, :, :2, 2:] = 0  # predictions without area
    case.boxes[:, :, 3] = 1.0
    case.boxes_o2m[0, :, :, 2] = 0
    case.masks[:, 0] = 1e4
    case.masks_o2m[:, 1] = -1e4
    for config in (
        CONFIG,
        LossConfig(gamma=0.5, focal_gamma=0.5, presence_gamma=0.5, pos_focal=True),
    ):
        terms, grads = run(case, config)
        assert np.isfinite(list(terms.values())).all()
        assert all(np.isfinite(g).all() for g in grads.values())


def test_a_diverged_model_gives_a_loss_that_is_not_finite_and_an_end():
    case = random_case(1, **SHAPE)
    case.logits[:], case.boxes[:] = np.nan, np.nan
    assert not np.isfinite(run(case, CONFIG)[0]["core_loss"])


def test_no_instances_at_all_needs_no_special_batch():
    case = random_case(1, **SHAPE, counts=np.zeros((3, 2), int))
    empty = replace(
        case, target_boxes=case.target_boxes[:, :0], target_masks=case.target_masks[:, :0],
        mask_valid=case.mask_valid[:, :0], index=np.zeros((3, 2, 0), np.int32),
    )  # fmt: skip
    value = jax.jit(lambda *args: compute_losses(*args, CONFIG)[0])
    valid = jnp.asarray(case.prompt_valid)
    total = value(to_outputs(empty), to_targets(empty), valid)
    np.testing.assert_allclose(total, run(case, CONFIG)[0]["core_loss"], rtol=1e-6)


def test_chunk_size_never_changes_loss_or_gradient():
    case = random_case(2, **SHAPE)
    want = run(case, CONFIG)
    assert_same(run(case, CONFIG.model_copy(update={"mask_chunk": 64})), want, grads=1e-5)


def test_masks_beyond_the_budget_are_reported_and_the_last_to_go_are_one_to_one():
    case = random_case(2, **SHAPE, counts=np.full((3, 2), 3), invalid_masks=False)
    full = run(case, CONFIG)[0]
    assert full["mask_pairs_dropped"] == 0
    assert full["mask_pairs"] > 18
    inputs = to_outputs(case), to_targets(case), jnp.asarray(case.prompt_valid)
    tight = jax.jit(lambda *args: compute_losses(*args, LossConfig(mask_pairs=18))[1])(*inputs)
    assert tight["mask_pairs"] == 18
    assert tight["mask_pairs_dropped"] == full["mask_pairs"] - 18
    np.testing.assert_allclose(tight["loss_mask"], full["loss_mask"], rtol=1e-6)
    assert tight["loss_mask_o2m"] == 0


def test_breakdown_explains_the_total():
    terms, _ = run(random_case(4, **SHAPE), CONFIG)
    parts = breakdown({k: jnp.float32(v) for k, v in terms.items()}, CONFIG)
    kinds = {"bbox", "giou", "ce", "presence", "mask", "dice", "semantic_seg", "semantic_dice"}
    assert {k for k in parts if k.startswith("final/")} == {f"final/{kind}" for kind in kinds}
    assert {k for k in parts if k.startswith("auxiliary/")} == {
        f"auxiliary/{kind}" for kind in ("bbox", "giou", "ce", "presence")
    }
    assert {"o2m/bbox", "o2m/mask"} < set(parts)
    np.testing.assert_allclose(sum(parts.values()), terms["core_loss"], rtol=1e-5)
    l1 = CONFIG.loss_bbox * (terms["loss_bbox_o2m"] + terms["loss_bbox_aux_0_o2m"])
    np.testing.assert_allclose(parts["o2m/bbox"], l1 * 6**0.5, rtol=1e-5)


def on_eight_devices(config: LossConfig):
    """One picture on each of eight devices: inputs, and (total, terms, gradient) of the whole."""
    counts = np.array([[3, 3], [0, 0], [1, 0], [2, 3], [0, 1], [3, 0], [1, 1], [2, 0]])
    case = random_case(5, **{**SHAPE, "images": 8}, counts=counts)
    case.prompt_valid[2, 1] = False
    inputs = to_outputs(case), to_targets(case), jnp.asarray(case.prompt_valid)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    detections = Detections(P(None, "data"), P(None, "data"), P("data"))
    spec = Outputs(detections, detections, P(None, "data"), P("data"), P("data"))

    def device(outputs, targets, valid):
        loss = lambda o: compute_losses(o, targets, valid, config, axis_names=("data",))
        (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(outputs)
        return jax.lax.psum(total, "data"), jax.lax.psum(terms, "data"), grads

    step = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(spec, P("data"), P("data")),
        out_specs=(P(), P(), spec),
        check_vma=True,
    )
    program = jax.jit(step).lower(*inputs).compile()
    assert "callback" not in program.as_text()
    return case, inputs, program(*inputs)


def test_eight_devices_equal_one():
    """Unequal numbers of targets, one device without any; loss, every term and every gradient."""
    _, inputs, (total, terms, grads) = on_eight_devices(CONFIG)
    (_, want), want_grads = loss_and_gradient(CONFIG)(*inputs, None)
    np.testing.assert_allclose(total, want["core_loss"], rtol=1e-5)
    for key, value in want.items():
        np.testing.assert_allclose(terms[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    for got, value in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5 * np.abs(value).max())


def test_local_normalisation_is_the_mean_of_the_devices_own():
    config = LossConfig(normalization="local", masks=False, o2m=False, aux=False)
    case, inputs, (_, terms, _) = on_eight_devices(config)
    one = jax.jit(lambda *args: compute_losses(*args, config)[1])
    o2o = inputs[0].o2o
    alone = []
    for i in range(8):
        pairs = slice(2 * i, 2 * i + 2)
        mine = Detections(o2o.logits[:, pairs], o2o.boxes[:, pairs], o2o.mask_embed[pairs])
        outputs = inputs[0].replace(
            o2o=mine,
            presence_logits=inputs[0].presence_logits[:, pairs],
            pixel_embed=inputs[0].pixel_embed[pairs],
        )
        targets = to_targets(replace(case, **{k: getattr(case, k)[i : i + 1] for k in PER_IMAGE}))
        alone.append(one(outputs, targets, inputs[2][i : i + 1]))
    for key in ("loss_bbox", "loss_giou"):
        np.testing.assert_allclose(terms[key], np.mean([t[key] for t in alone]), rtol=1e-5)


PER_IMAGE = ("target_boxes", "target_masks", "mask_valid", "index", "num_targets", "exhaustive")


def mask_temporaries(pairs: int, chunk: int) -> int:
    """Bytes of temporaries of the mask loss and its gradient, 96 x 96 brought to 336 x 336."""
    shape = jax.ShapeDtypeStruct
    index = shape((1, pairs), jnp.int32)
    inputs = (
        shape((1, 40, 40), jnp.float32),
        shape((1, 96, 96, 40), jnp.float32),
        shape((1, 20, 336, 42), jnp.uint8),
        MaskPairs(index, index, index, shape((1, pairs), bool), None),
    )
    loss = lambda *args: mask_sums(*args, LossConfig(mask_chunk=chunk)).sum()
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*inputs).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_memory_follows_one_chunk_not_the_targets():
    one_mask = 336 * 336 * 4
    few, many = mask_temporaries(20, chunk=4), mask_temporaries(200, chunk=4)
    assert many - few < 0.1 * one_mask
    assert mask_temporaries(200, chunk=8) > many + 4 * one_mask


def test_loss_program_exports_and_hits_the_compilation_cache(tmp_path):
    case = random_case(0, **{**SHAPE, "images": 1, "prompts": 1, "layers": 1})
    inputs = to_outputs(case), to_targets(case), jnp.asarray(case.prompt_valid)
    program = lambda *args: compute_losses(*args, LossConfig())[0]
    exported = jax.export.export(jax.jit(program))(*inputs)
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        compilation_cache.reset_cache()
        want = jax.jit(program).lower(*inputs).compile()(*inputs)
        assert "/jax/compilation_cache/cache_hits" not in events
        jax.clear_caches()
        again = jax.jit(program).lower(*inputs).compile()(*inputs)
        assert "/jax/compilation_cache/cache_hits" in events
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    np.testing.assert_array_equal(again, want)
    np.testing.assert_allclose(exported.call(*inputs), want, rtol=1e-6)


def test_sampled_points_need_a_key():
    case = random_case(0, **SHAPE)
    with pytest.raises(ValueError, match="point_rng"):
        run(case, LossConfig(num_sample_points=4))


def test_masks_of_another_shape_are_refused_by_name():
    case = random_case(0, **SHAPE)
    wide = replace(case, target_masks=case.target_masks.repeat(2, axis=-1))
    with pytest.raises(ValueError, match=r"expected ceil\(18 \* 8 / 6 / 8\) bytes"):
        run(wide, LossConfig())


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", sorted(p.stem for p in GOLDEN.glob("loss_*.npz")))
def test_golden_figures_of_the_torch_package(name):
    """Written by scripts/make_loss_golden.py with sam3 0.1.4; needs no torch to check."""
    stored = np.load(GOLDEN / f"{name}.npz")
    case = Case(**{f.name: stored[f"case/{f.name}"] for f in dataclasses.fields(Case)})
    config = LossConfig(**json.loads(str(stored["config"])))
    parts = {
        p: {k.removeprefix(p): stored[k] for k in stored if k.startswith(p)}
        for p in ("term/", "grad/")
    }
    assert_same(run(case, config), (parts["term/"], parts["grad/"]))


def test_golden_cases_are_there():
    assert len(list(GOLDEN.glob("loss_*.npz"))) >= 5
