"""Matching against scipy and torch, and what a device program must and must not contain."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sam3jax.config import LossConfig
from sam3jax.matching import hungarian, match_cost, match_one_to_many

solve = jax.jit(hungarian)


def random_problems(rng, kind: str, n: int, q: int, t: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (n, q, t)
    if kind == "random":
        cost = rng.normal(size=shape)
    elif kind == "ties":
        cost = rng.integers(0, 3, shape)
    elif kind == "two values":
        cost = rng.integers(0, 2, shape) * 1e3
    elif kind == "equal rows":
        cost = np.repeat(rng.normal(size=(n, 1, t)), q, 1)
    else:  # a sum of a row and a column cost: every assignment of square problems is optimal
        cost = rng.integers(0, 9, (n, q, 1)) + rng.integers(0, 9, (n, 1, t))
    return cost.astype(np.float32), rng.integers(0, t + 1, n).astype(np.int32)


@pytest.mark.parametrize(("q", "t"), [(7, 5), (20, 20), (5, 9), (30, 70)])
def test_ten_thousand_random_and_tied_problems_cost_what_scipy_finds(q, t):
    """2,500 per shape; more targets than queries in two of them."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(q * t)
    kinds = ("random", "ties", "two values", "equal rows", "sums")
    made = [random_problems(rng, kind, 500, q, t) for kind in kinds]
    cost, count = (np.concatenate(parts) for parts in zip(*made))
    got = np.asarray(solve(cost, count))
    for c, n, queries in zip(cost.astype(np.float64), count, got):
        assert (queries[n:] == q).all(), "padding was matched"
        matched = np.flatnonzero(queries < q)
        assert len(matched) == min(n, q)
        assert len(set(queries[matched])) == len(matched), "a query was given twice"
        best = c[:, :n][optimize.linear_sum_assignment(c[:, :n])].sum()
        np.testing.assert_allclose(c[queries[matched], matched].sum(), best, rtol=1e-6, atol=1e-5)


def test_random_problems_have_scipys_assignment():
    optimize = pytest.importorskip("scipy.optimize")
    cost, count = random_problems(np.random.default_rng(0), "random", 300, 20, 20)
    for c, n, queries in zip(cost, count, np.asarray(solve(cost, count))):
        rows, columns = optimize.linear_sum_assignment(c[:, :n])
        np.testing.assert_array_equal(queries[columns], rows)


@pytest.mark.parametrize("filler", [0.0, -1e9, np.nan, np.inf])
def test_what_padding_holds_never_matters(filler):
    cost, count = random_problems(np.random.default_rng(1), "random", 9, 12, 5)
    padded = np.full((9, 12, 40), filler, np.float32)
    for row, c, n in zip(padded, cost, count):
        row[:, :n] = c[:, :n]
    wide = np.asarray(solve(padded, count))
    np.testing.assert_array_equal(wide[:, :5], solve(cost, count))
    assert (wide[:, 5:] == 12).all()


def test_the_targets_left_over_are_the_dearest():
    cost = jnp.array([[[5.0, 1.0, 9.0], [4.0, 2.0, 9.0]]])  # two queries, three targets
    np.testing.assert_array_equal(solve(cost, jnp.array([3])), [[1, 0, 2]])
    np.testing.assert_array_equal(solve(cost, jnp.array([2])), [[1, 0, 2]])
    np.testing.assert_array_equal(solve(cost, jnp.array([0])), [[2, 2, 2]])


def test_costs_that_are_not_numbers_end_the_search_all_the_same():
    cost = np.full((3, 6, 4), np.nan, np.float32)
    cost[1, :3], cost[2] = np.inf, -np.inf
    got = np.asarray(solve(cost, np.full(3, 4, np.int32)))
    assert all(len(set(row)) == 4 and row.max() < 6 for row in got)


def test_no_problems_and_no_targets_give_empty_results():
    assert hungarian(jnp.zeros((0, 5, 3)), jnp.zeros(0, jnp.int32)).shape == (0, 3)
    assert hungarian(jnp.zeros((2, 5, 0)), jnp.zeros(2, jnp.int32)).shape == (2, 0)


def test_vmap_and_shard_map_give_what_one_call_gives():
    cost, count = random_problems(np.random.default_rng(2), "random", 16, 12, 20)
    want = np.asarray(solve(cost, count))
    per_image = jax.vmap(hungarian)(cost.reshape(8, 2, 12, 20), count.reshape(8, 2))
    np.testing.assert_array_equal(per_image.reshape(16, 20), want)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = P("data")
    sharded = jax.shard_map(
        hungarian, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=True
    )
    program = jax.jit(sharded).lower(cost, count).compile()
    np.testing.assert_array_equal(program(cost, count), want)
    text = program.as_text()
    for word in ("custom-call", "all-reduce", "all-gather", "collective"):
        assert word not in text, f"the matcher contains a {word}"


def test_matching_exports():
    shapes = jax.ShapeDtypeStruct((4, 12, 9), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    exported = jax.export.export(solve)(*shapes)
    cost, count = random_problems(np.random.default_rng(3), "random", 4, 12, 9)
    np.testing.assert_array_equal(exported.call(cost, count), solve(cost, count))


def predictions(seed: int, q: int = 9, t: int = 4, b: int = 3):
    rng = np.random.default_rng(seed)
    box = lambda *shape: np.concatenate(
        [rng.uniform(0.3, 0.7, (*shape, 2)), rng.uniform(0.1, 0.5, (*shape, 2))], -1
    )
    logits, targets = rng.normal(0, 3, (b, q)), box(b, t)
    near = targets[:, rng.integers(0, t, q)] + rng.normal(0, 0.02, (b, q, 4))
    boxes = np.where(np.arange(q)[:, None] % 3, near, box(b, q))
    return tuple(x.astype(np.float32) for x in (logits, boxes, targets)), rng.integers(0, t + 1, b)


def test_cost_is_finite_for_any_logit_and_for_boxes_without_area():
    logits = jnp.array([-1e4, -80.0, 0.0, 80.0, 1e4])
    boxes = jnp.zeros((5, 4)).at[:2].set(0.3)
    targets = jnp.array([[0.0, 0, 0, 0], [0.3, 0.3, 0, 0.2], [0.5, 0.5, 1, 1]])
    for dtype in (jnp.float32, jnp.bfloat16):
        cost = match_cost(*(x.astype(dtype) for x in (logits, boxes, targets)), config=LossConfig())
        assert cost.shape == (5, 3)
        assert cost.dtype == jnp.float32
        assert np.isfinite(cost).all()


def test_costs_of_several_layers_share_their_targets():
    (logits, boxes, targets), _ = predictions(0)
    cost = functools.partial(match_cost, config=LossConfig())
    layers = cost(jnp.stack([logits, -logits]), jnp.stack([boxes, boxes]), targets)
    np.testing.assert_allclose(layers[1], cost(-logits, boxes, targets), rtol=1e-6)


@pytest.mark.parametrize("topk", [1, 4, 9])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_one_to_many_equals_torch(topk, threshold):
    torch = pytest.importorskip("torch")
    matcher = pytest.importorskip("sam3.train.matcher").BinaryOneToManyMatcher
    config = LossConfig(o2m_topk=topk, o2m_threshold=threshold)
    match = jax.jit(functools.partial(match_one_to_many, config=config))
    for seed in range(20):
        (logits, boxes, targets), count = predictions(seed)
        if seed % 4 == 0:  # twins: the k-th best ties with the next, and torch keeps neither
            logits[:, 1:], boxes[:, 1:] = logits[:, :-1], boxes[:, :-1]
            logits[:, ::2], boxes[:, ::2] = logits[:, 1:2], boxes[:, 1:2]
        out = {
            "pred_logits": torch.from_numpy(logits[..., None]),
            "pred_boxes": torch.from_numpy(boxes),
        }
        truth = {"num_boxes": torch.from_numpy(count), "boxes_padded": torch.from_numpy(targets)}
        b, query, target = matcher(alpha=0.3, threshold=threshold, topk=topk)(out, truth)
        offset = np.concatenate([[0], count.cumsum()])
        want = {(int(i), int(t) - offset[int(i)], int(n)) for i, n, t in zip(b, query, target)}
        got = np.asarray(match(logits, boxes, targets, count))
        assert got.shape == (3, 4, topk)
        assert {(i, t, int(got[i, t, k])) for i, t, k in np.argwhere(got < 9)} == want


def test_one_to_many_with_fewer_queries_than_it_may_take():
    (logits, boxes, targets), count = predictions(1, q=3)
    got = match_one_to_many(logits, boxes, targets, count, config=LossConfig(o2m_topk=4))
    assert got.shape == (3, 4, 3)
