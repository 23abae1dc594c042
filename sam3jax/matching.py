"""Which query answers for which target. Answers to sam3.train.matcher.

One-to-one: `match_cost` and `hungarian` (BinaryHungarianMatcherV2). One-to-many: `match_one_to_many`
(BinaryOneToManyMatcher). Everything runs on the device, takes static shapes and needs no callback and
no collective, so it may sit inside jit, vmap and shard_map.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from sam3jax.boxes import cxcywh_to_xyxy, giou, iou
from sam3jax.config import LossConfig

# Stands for a cost that is not a number (a model that has diverged): the loop must still end.
_NOT_FINITE = 1e8
# Problems that advance together: more wait longer for the slowest of them, and leave a CPU's cache.
_TOGETHER = 128


def match_cost(
    logits: jax.Array, boxes: jax.Array, target_boxes: jax.Array, *, config: LossConfig
) -> jax.Array:
    """Cost of giving target t to query q, lower is better; always float32 and finite.

    logits [..., Q], boxes [..., Q, 4], target_boxes [..., T, 4] -> [..., Q, T]; leading axes broadcast
    (the decoder layers of one prompt share its targets).

    cost_class * focal class cost + cost_bbox * L1 - cost_giou * GIoU, the class cost being
    -alpha (1 - p)^gamma log p + (1 - alpha) p^gamma log(1 - p), from log-sigmoids, so that logits of
    any size are safe. GIoU without area is defined in `boxes` (torch: NaN, and scipy stops).
    """
    logits, boxes, target_boxes = _float32(logits, boxes, target_boxes)
    prob = jax.nn.sigmoid(logits)
    cost_class = -config.cost_alpha * (1 - prob) ** config.cost_gamma * jax.nn.log_sigmoid(logits)
    cost_class += (1 - config.cost_alpha) * prob**config.cost_gamma * jax.nn.log_sigmoid(-logits)
    queries, targets = boxes[..., :, None, :], target_boxes[..., None, :, :]
    cost_bbox = jnp.abs(queries - targets).sum(-1)  # [..., Q, T]
    cost_giou = -giou(cxcywh_to_xyxy(queries), cxcywh_to_xyxy(targets))
    return (
        config.cost_bbox * cost_bbox
        + config.cost_class * cost_class[..., None]
        + config.cost_giou * cost_giou
    )


def hungarian(cost: jax.Array, num_targets: jax.Array) -> jax.Array:
    """Minimum-cost one-to-one matching of each real target to a query, exact as scipy's.

    cost [N, Q, T], real targets first; num_targets [N] <= T.
    Returns [N, T] int32: the query of each target; Q for padding and for targets left over where a
    problem has more than Q, so that `.at[...].set(mode="drop")` ignores it. Which targets are left
    over is part of the optimum.

    Shortest augmenting paths (Jonker and Volgenant 1987; Crouse 2016, as scipy). Targets enter one
    after another; padding never enters, so it costs nothing. All N problems advance together, each at
    its own pace. Costs that are not finite count as 1e8.
    """
    chex.assert_rank([cost, num_targets], [3, 1])
    n, _, t = cost.shape
    if t == 0 or n == 0:
        return jnp.zeros((n, t), jnp.int32)
    cost = jax.lax.stop_gradient(cost.astype(jnp.float32))
    num_targets = num_targets.astype(jnp.int32)
    # Few of many padded targets are real as a rule: only the part that holds them is transposed.
    sizes = sorted({min(t, size) for size in (16, 64, t)})
    rung = sum(((num_targets > size).any().astype(jnp.int32) for size in sizes[:-1]), 0)
    solve = [functools.partial(_solve_first, size) for size in sizes]
    return (
        jax.lax.switch(rung, solve, cost, num_targets)
        if len(solve) > 1
        else solve[0](cost, num_targets)
    )


def _solve_first(size: int, cost: jax.Array, num_targets: jax.Array) -> jax.Array:
    """`hungarian` where no problem has more than `size` real targets."""
    _, q, t = cost.shape
    # Under vmap a switch runs all of its branches: those for smaller problems must end as well.
    num_targets = jnp.minimum(num_targets, size)
    cost = cost[:, :, :size].swapaxes(1, 2)  # [N, size, Q]
    cost = jnp.where(jnp.isfinite(cost), cost, _NOT_FINITE)
    if size > q:
        # A problem with more targets than queries gets as many free places as it has targets too
        # many: a square problem, in which every query is used whatever a free place costs.
        place = jnp.arange(size - q) < (num_targets - q)[:, None]
        places = jnp.where(place[:, None], jnp.zeros_like(cost[..., :1]), jnp.inf)
        cost = jnp.concatenate([cost, places], axis=2)
    solve = lambda problem: _shortest_augmenting_paths(*problem)
    queries = jnp.minimum(jax.lax.map(solve, (cost, num_targets), batch_size=_TOGETHER), q)
    return jnp.pad(queries, ((0, 0), (0, t - size)), constant_values=q)


def _shortest_augmenting_paths(cost: jax.Array, num_rows: jax.Array) -> jax.Array:
    """Column of each of the first num_rows rows of cost [rows, columns], rows <= columns, else columns.

    One loop for everything, so that under vmap each problem goes at its own pace. A turn extends the
    tree of shortest paths by the nearest column; if that column is free it starts to re-assign the
    columns on the path to it, one per turn. Column prices `v` suffice: the price of an assigned row
    follows from its own column, and that of the entering row only shifts every distance.
    """
    rows, columns = cost.shape
    row_index, column_index = jnp.arange(rows), jnp.arange(columns)
    # Carries are made from the inputs: under shard_map a constant is not "varying" as they are.
    like_columns, like_rows = jnp.zeros_like(cost[0]), jnp.zeros_like(cost[:, 0])
    zero = jnp.zeros_like(num_rows)
    state = dict(
        entering=zero,  # row being placed
        fresh=zero
        == 0,  # it has only just come in: distances and scanned are those of the last one
        row=zero,  # row the search stands on, reached through `column`
        column=zero,
        low=like_columns[0],  # length of the shortest path to `column`
        augmenting=zero > 0,
        v=like_columns,
        distance=like_columns,
        path=like_columns.astype(jnp.int32),  # row before each column
        scanned=like_columns > 0,
        row_of=like_columns.astype(jnp.int32) + rows,  # `rows` where free
        column_of=like_rows.astype(jnp.int32) + columns,
    )

    def turn(s: dict) -> dict:
        # Extend the tree from s["row"].
        edge, searching = cost[s["row"]], ~s["augmenting"]
        price_of_row = edge[s["column"]] - s["v"][s["column"]]
        offset = jnp.where(s["fresh"], 0.0, s["low"] - price_of_row)
        scanned = s["scanned"] & ~s["fresh"]
        reach = searching & ~scanned
        candidate = jnp.where(reach, edge - s["v"] + offset, jnp.inf)
        distance = jnp.minimum(candidate, jnp.where(s["fresh"], jnp.inf, s["distance"]))
        path = jnp.where(reach & (candidate == distance), s["row"], s["path"])
        open_distance = jnp.where(scanned, jnp.inf, distance)
        low = open_distance.min()
        # The nearest column, a free one where several are equally near: free columns sort first.
        # In float32, whose minimum is several times faster on a CPU than that of integers.
        order = column_index.astype(jnp.float32) + jnp.where(s["row_of"] == rows, 0.0, columns)
        nearest = jnp.where(open_distance == low, order, 2.0 * columns - 1).min().astype(jnp.int32)
        found = nearest < columns
        nearest = jnp.where(found, nearest, nearest - columns)
        v = jnp.where(scanned & found & searching, s["v"] + (distance - low), s["v"])

        # Re-assign one column of the path.
        augment = s["augmenting"] | found
        column = jnp.where(s["augmenting"], s["column"], nearest)
        row = path[column]
        last = augment & (row == s["entering"])
        next_column, next_row = s["column_of"][row], s["row_of"][column]
        here = column_index == column
        entering = s["entering"] + last
        return dict(
            entering=entering,
            fresh=last,
            row=jnp.where(augment, entering, next_row),
            column=jnp.where(augment, next_column, column),
            low=low,
            augmenting=augment & ~last,
            v=v,
            distance=distance,
            path=path,
            scanned=scanned | (here & ~augment),
            row_of=jnp.where(here & augment, row, s["row_of"]),
            column_of=jnp.where((row_index == row) & augment, column, s["column_of"]),
        )

    return jax.lax.while_loop(lambda s: s["entering"] < num_rows, turn, state)["column_of"]


def match_one_to_many(
    logits: jax.Array,
    boxes: jax.Array,
    target_boxes: jax.Array,
    num_targets: jax.Array,
    *,
    config: LossConfig,
) -> jax.Array:
    """The best queries of each target, at most o2m_topk; a query may serve several targets.

    logits [..., Q], boxes [..., Q, 4], target_boxes [..., T, 4], num_targets [...]
    -> [..., T, k] int32 with k = min(o2m_topk, Q): queries, best first; Q where there is none.

    Score = o2m_alpha * p + (1 - o2m_alpha) * IoU. Kept are the queries above o2m_threshold whose score
    exceeds the target's quantile 1 - o2m_topk / Q over the queries, with torch.quantile's linear
    interpolation: the k best, or fewer where the k-th ties with the next. (torch refuses
    o2m_topk > Q; here it means the quantile 0.)
    """
    logits, boxes, target_boxes = _float32(*jax.lax.stop_gradient((logits, boxes, target_boxes)))
    q, t = logits.shape[-1], target_boxes.shape[-2]
    overlap = iou(
        cxcywh_to_xyxy(target_boxes)[..., :, None, :], cxcywh_to_xyxy(boxes)[..., None, :, :]
    )  # [..., T, Q]
    prob = jax.nn.sigmoid(logits)[..., None, :]
    score = config.o2m_alpha * prob + (1 - config.o2m_alpha) * overlap
    k = min(config.o2m_topk, q)
    best, queries = jax.lax.top_k(score, min(k + 1, q))
    quantile = best[..., -1:]
    if k < q:
        # The rank (1 - k / Q)(Q - 1) lies k / Q of the way from the (k+1)-th best to the k-th;
        # interpolated from the nearer end, as torch.lerp does.
        low, high, weight = best[..., k : k + 1], best[..., k - 1 : k], k / q
        step = high - low
        quantile = low + weight * step if weight < 0.5 else high - (1 - weight) * step
    best, queries = best[..., :k], queries[..., :k]
    real = jnp.arange(t) < num_targets[..., None]
    keep = (best > quantile) & (best > config.o2m_threshold) & real[..., None]
    return jnp.where(keep, queries, q).astype(jnp.int32)


def _float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(a.astype(jnp.float32) for a in arrays)
