"""The training loss of the detector. Answers to Sam3LossWrapper, IABCEMdetr and Boxes (sam3.train.loss).

Every loss is computed for all decoder layers at once (an axis, not a loop). `loss_shares` returns the
share of one micro-batch of one device: it is divided by the totals of the whole batch (`totals`), so
shares add up to the loss of the batch, equal to torch on one process.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from sam3jax.boxes import cxcywh_to_xyxy, giou, iou
from sam3jax.config import LossConfig
from sam3jax.losses.elementwise import bce, focal, power
from sam3jax.losses.masks import mask_sums
from sam3jax.losses.matches import Matches, mask_pairs, match
from sam3jax.losses.semantic import semantic_losses
from sam3jax.losses.totals import Divisors, Stages, Totals, count_totals, divisors, stages_of
from sam3jax.losses.truth import Truth, at_least_one_mask, gather_truth, visible
from sam3jax.types import Detections, Outputs, Targets

KINDS = {
    "loss_bbox": "bbox", "loss_giou": "giou", "loss_ce": "ce", "presence_loss": "presence",
    "loss_mask": "mask", "loss_dice": "dice", "loss_semantic_seg": "semantic_seg",
    "loss_semantic_dice": "semantic_dice",
}  # fmt: skip
_HITS, _ERRORS = "ce_hits", "ce_errors"  # the counts behind `ce_f1`


class Shares(NamedTuple):
    """What a part of a batch contributes to the loss. Parts add up; `weigh` makes a loss of the sum.

    terms: name -> [S], divided by the totals. open: name -> [S], what else divides that term: with
    `weak_loss` the queries that count, which are known when all parts are matched. counts: name -> [].
    """

    terms: dict[str, jax.Array]
    open: dict[str, jax.Array]
    counts: dict[str, jax.Array]


def compute_losses(
    outputs: Outputs,
    targets: Targets,
    prompt_valid: jax.Array,
    config: LossConfig,
    *,
    stage: jax.Array | None = None,
    stages: int = 1,
    axis_names: tuple[str, ...] | None = None,
    point_rng: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss and its terms under the published names.

    prompt_valid [I, P]: a prompt that is not valid counts as absent, in sums and in normalisers.
    Returns (total, terms). Terms are not yet weighted, except that losses of one-to-many queries carry
    o2m_weight, as in torch: `loss_bbox`, `loss_giou`, `loss_ce`, `presence_loss`, `loss_mask`,
    `loss_dice`, the metrics `ce_f1` and `presence_dec_acc`, with the suffixes `_aux_{layer}`, `_o2m`,
    `_aux_{layer}_o2m`; `core_loss` = total; `mask_pairs` and `mask_pairs_dropped` count masks (never
    silently: see `mask_pairs` in LossConfig). torch's presence terms of one-to-many queries, constant
    zeros, are left out.

    stage [I] int32 < stages: the time step of each frame, where the batch is clips. Each stage is
    normalised by its own targets and prompts, and the stages are summed.
    axis_names: mesh axes over which the batch is split (inside shard_map). Totals are summed over
    them; total and terms are this device's shares: their psum is the loss of the whole batch.
    point_rng: key for `num_sample_points`; give each device its own.
    """
    targets = jax.tree.map(jnp.asarray, targets)
    totals = count_totals(
        targets, prompt_valid, config, prediction_size=outputs.semantic_logits.shape[1:],
        stage=stage, stages=stages, axis_names=axis_names,
    )  # fmt: skip
    if axis_names:
        totals = jax.lax.psum(totals, axis_names)
    total, terms = loss_shares(
        outputs, targets, prompt_valid, config, totals, stage=stage, axis_names=axis_names, point_rng=point_rng
    )  # fmt: skip
    return total, with_f1(terms, axis_names)


def loss_shares(
    outputs: Outputs,
    targets: Targets,
    prompt_valid: jax.Array,
    config: LossConfig,
    totals: Totals,
    *,
    stage: jax.Array | None = None,
    axis_names: tuple[str, ...] | None = None,
    point_rng: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`compute_losses` of one micro-batch of one device, divided by `totals` of the whole batch.

    Everything returned may be added over micro-batches and devices; `with_f1` of the sum then holds
    the same terms as `compute_losses` of the whole batch. (One divisor cannot be counted ahead: with
    `weak_loss` that of classification holds the queries matched here, summed over axis_names only.)
    """
    shares = part_shares(
        outputs, targets, prompt_valid, config, totals, stage=stage, axis_names=axis_names, point_rng=point_rng
    )  # fmt: skip
    return weigh(shares, config, totals, axis_names)


def part_shares(
    outputs: Outputs,
    targets: Targets,
    prompt_valid: jax.Array,
    config: LossConfig,
    totals: Totals,
    *,
    stage: jax.Array | None = None,
    axis_names: tuple[str, ...] | None = None,
    point_rng: jax.Array | None = None,
) -> Shares:
    """The shares of some pictures; no collective. Arguments as of `loss_shares`."""
    chex.assert_rank([prompt_valid, outputs.o2o.logits, outputs.o2o.boxes], [2, 3, 4])
    chex.assert_equal_shape([prompt_valid, targets.num_targets])
    if not config.o2m:
        outputs = outputs.replace(o2m=None)
    if not config.aux:
        outputs = _last_layer(outputs)
    targets = at_least_one_mask(targets)
    truth = gather_truth(targets, prompt_valid)
    by = stages_of(stage, len(totals.prompts), prompt_valid.shape[1])
    norm = divisors(totals, config, axis_names)
    matches = match(outputs, truth, config)

    shares = Shares({}, {}, {})
    names = [f"_aux_{i}" for i in range(len(outputs.o2o.logits) - 1)] + [""]
    groups: list[tuple[Detections, Any, jax.Array | None, float, str]] = [
        (outputs.o2o, matches.o2o, outputs.presence_logits, 1.0, "")
    ]
    if outputs.o2m is not None:
        groups.append((outputs.o2m, matches.o2m, None, config.o2m_weight, "_o2m"))
    for detections, queries, presence_logits, weight, suffix in groups:
        found = _box_losses(detections, queries, truth, norm, by)
        classes, hits, weak = _class_losses(detections, queries, truth, norm, by, config)
        found |= classes
        if presence_logits is not None and config.use_presence:
            found |= _presence_losses(presence_logits, truth, norm, by, config)
        for key, values in found.items():
            shares.terms.update({f"{key}{n}{suffix}": weight * v for n, v in zip(names, values)})
        for part, values in ((shares.open, weak), (shares.counts, hits)):
            part.update({f"{k}{n}{suffix}": v for k in values for n, v in zip(names, values[k])})
    if config.masks:
        masks, pairs = _mask_losses(outputs, matches, truth, targets, norm, by, config, point_rng)  # fmt: skip
        shares.terms.update(masks)
        shares.counts.update(pairs)
    if config.semantic:
        found = semantic_losses(outputs.semantic_logits, targets, truth, config)
        unions = norm.unions + 1e-6 if config.semantic_positive_only else norm.prompts
        overlaps = by.sums(found.pop("miou_semantic_seg")) / jnp.maximum(norm.unions, 1)
        shares.terms.update({key: by.sums(value) / unions for key, value in found.items()})
        shares.counts["miou_semantic_seg"] = overlaps.sum()
    return shares


def weigh(
    shares: Shares, config: LossConfig, totals: Totals, axis_names: tuple[str, ...] | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(total, terms) of the shares of everything that one device holds."""
    parts = dict(shares.terms)
    for key, counted in shares.open.items():
        parts[key] = parts[key] / (_over_devices(counted, axis_names) + 1e-6)
    weights = {key: getattr(config, key) for key in KINDS}
    total: Any = sum(weights[kind] * parts[key] for key, kind in _weighted(parts))  # [S]
    if config.scale_by_find_batch_size:
        total = total * jnp.sqrt(divisors(totals, config, axis_names).prompts)
    total = total.sum()
    if config.normalize_by_stage_num:
        total = total / len(totals.prompts)
    terms = {key: value.sum() for key, value in parts.items()}
    return total, {**terms, **shares.counts, "core_loss": total}


def with_f1(
    terms: dict[str, jax.Array], axis_names: tuple[str, ...] | None = None
) -> dict[str, jax.Array]:
    """The terms with `ce_f1` in the place of the counts it is made of (a share, given axis_names)."""
    out = {key: v for key, v in terms.items() if not key.startswith((_HITS, _ERRORS))}
    for key in terms:
        if key.startswith(_HITS):
            suffix = key.removeprefix(_HITS)
            hits, errors = terms[key], terms[f"{_ERRORS}{suffix}"]
            both = _over_devices(2 * hits + errors, axis_names)
            out[f"ce_f1{suffix}"] = 2 * hits / jnp.maximum(both, 1)
    return out


def breakdown(terms: dict[str, jax.Array], config: LossConfig) -> dict[str, jax.Array]:
    """The weighted contributions behind `core_loss`, grouped; they sum to it.

    Keys `final/bbox`, `auxiliary/ce`, `o2m/mask`, ...: the last layer, the layers before it, and the
    one-to-many queries of all layers, each by kind.
    """
    grouped: dict[str, jax.Array] = {}
    for key, term in _weighted(terms):
        group = "o2m" if key.endswith("_o2m") else "auxiliary" if "_aux_" in key else "final"
        name = f"{group}/{KINDS[term]}"
        grouped[name] = grouped.get(name, 0.0) + getattr(config, term) * terms[key]
    # The scale by the number of prompts is one factor on everything; every part is >= 0.
    plain = sum(grouped.values())
    scale = jnp.where(plain > 0, terms["core_loss"] / jnp.where(plain > 0, plain, 1.0), 1.0)
    return {name: scale * value for name, value in grouped.items()}


def _weighted(terms: dict[str, jax.Array]) -> list[tuple[str, str]]:
    """(key, kind) of the terms that enter the total: `loss_ce_aux_0_o2m` is of kind `loss_ce`."""
    kinds = ((key, key.removesuffix("_o2m").split("_aux_")[0]) for key in terms)
    return [(key, kind) for key, kind in kinds if kind in KINDS]


def _over_devices(x: jax.Array, axis_names) -> jax.Array:
    return jax.lax.psum(x, axis_names) if axis_names else x


def _box_losses(
    detections: Detections, queries: jax.Array, truth: Truth, norm: Divisors, by: Stages
) -> dict[str, jax.Array]:
    """L1 and GIoU, summed over pairs; a query with several targets counts once for each. [L, S] each."""
    q = detections.boxes.shape[2]
    layers, pairs, t, k = queries.shape
    rows = jnp.minimum(queries, q - 1).reshape(layers, pairs, t * k, 1)
    boxes = jnp.take_along_axis(detections.boxes.astype(jnp.float32), rows, axis=2)
    boxes = boxes.reshape(layers, pairs, t, k, 4)
    wanted, matched = truth.boxes[:, :, None], queries < q
    l1 = jnp.abs(boxes - wanted).sum(-1)  # [L, B, T, k]
    overlap = giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return {
        "loss_bbox": by.layer_sums(jnp.where(matched, l1, 0.0)) / norm.targets,
        "loss_giou": by.layer_sums(jnp.where(matched, 1 - overlap, 0.0)) / norm.targets,
    }


def _class_losses(
    detections: Detections,
    queries: jax.Array,
    truth: Truth,
    norm: Divisors,
    by: Stages,
    config: LossConfig,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """IABCEMdetr: classification towards the quality of the box, [L, S]; counts of right and wrong, [L];
    and what still divides the first, [L, S], with `weak_loss`.

    Positives: BCE(x, s) * pos_weight with s = max(.01, p^alpha IoU^(1 - alpha)), detached; negatives:
    BCE(x, 0) p^gamma, p not detached. Of several targets of one query the last one counts.
    """
    logits = detections.logits.astype(jnp.float32)
    q, t = logits.shape[-1], queries.shape[2]
    chosen = queries[:, :, None] == jnp.arange(q)[:, None, None]  # [L, B, Q, T, k]
    winner = jnp.where(chosen.any(-1), jnp.arange(t), -1).max(-1)  # [L, B, Q]
    positive = winner >= 0
    wanted = jnp.take_along_axis(truth.boxes[None], jnp.maximum(winner, 0)[..., None], axis=2)
    prob = jax.nn.sigmoid(logits)
    quality = jax.lax.stop_gradient(prob) ** config.alpha * iou(
        cxcywh_to_xyxy(jax.lax.stop_gradient(detections.boxes.astype(jnp.float32))),
        cxcywh_to_xyxy(wanted),
    ) ** (1 - config.alpha)
    soft = jnp.where(positive, jnp.maximum(quality, 0.01), 0.0)
    gain = (
        focal(logits, soft, alpha=0.5, gamma=config.gamma)
        if config.pos_focal
        else bce(logits, soft)
    )
    padded = config.pad_n_queries is not None and q < config.pad_n_queries
    gain = gain * config.pos_weight * (config.pad_scale_pos if padded else 1.0)
    loss = jnp.where(positive, gain, bce(logits, 0.0) * power(prob, config.gamma))
    if config.use_presence:
        loss = jnp.where(visible(truth)[:, None], loss, 0.0)
    counted = jnp.broadcast_to(truth.valid[:, None], loss.shape)
    if config.weak_loss:
        counted &= truth.exhaustive[:, None] | positive
    said = (prob > 0.5) & truth.valid[:, None]
    hits, errors = (said & positive).sum((1, 2)), (said != positive).sum((1, 2))
    loss, found = by.layer_sums(jnp.where(counted, loss, 0.0)), {_HITS: hits, _ERRORS: errors}
    if config.weak_loss:
        return {"loss_ce": loss}, found, {"loss_ce": by.layer_sums(counted)}
    divisor = norm.prompts * max(q, config.pad_n_queries or 0)
    return {"loss_ce": loss / divisor}, found, {}


def _presence_losses(
    logits: jax.Array, truth: Truth, norm: Divisors, by: Stages, config: LossConfig
) -> dict[str, jax.Array]:
    """Is there anything? Focal loss and accuracy, means over prompts. logits [L, B] -> [L, S] each."""
    logits, wanted = logits.astype(jnp.float32), visible(truth)
    loss = focal(
        logits, wanted.astype(jnp.float32), alpha=config.presence_alpha, gamma=config.presence_gamma
    )
    right = (jax.nn.sigmoid(logits) > 0.5) == wanted
    return {
        "presence_loss": by.layer_sums(jnp.where(truth.valid, loss, 0.0)) / norm.prompts,
        "presence_dec_acc": by.layer_sums(right & truth.valid) / norm.prompts,
    }


def _mask_losses(
    outputs: Outputs,
    matches: Matches,
    truth: Truth,
    targets: Targets,
    norm: Divisors,
    by: Stages,
    config: LossConfig,
    point_rng: jax.Array | None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Focal and dice of the last layer's pairs, one-to-one and one-to-many, [S]; counts of pairs."""
    pairs, dropped = mask_pairs(outputs, matches, truth, config, point_rng)
    groups = [outputs.o2o] if outputs.o2m is None else [outputs.o2o, outputs.o2m]
    embed = jnp.concatenate([g.mask_embed for g in groups], axis=1)
    sums = mask_sums(
        embed, outputs.pixel_embed, targets.masks, pairs, config, targets.void
    )  # [B, 2, 2]
    shares = {}
    for group, (suffix, weight) in enumerate((("", 1.0), ("_o2m", config.o2m_weight))[: len(groups)]):  # fmt: skip
        for kind, name in enumerate(("loss_mask", "loss_dice")):
            shares[f"{name}{suffix}"] = weight * (by.sums(sums[:, group, kind]) / norm.targets)
    counts = {"mask_pairs": pairs.keep.sum(), "mask_pairs_dropped": dropped}
    return shares, {key: value.astype(jnp.float32) for key, value in counts.items()}


def _last_layer(outputs: Outputs) -> Outputs:
    last = lambda d: d if d is None else d.replace(logits=d.logits[-1:], boxes=d.boxes[-1:])
    return outputs.replace(
        o2o=last(outputs.o2o), o2m=last(outputs.o2m), presence_logits=outputs.presence_logits[-1:]
    )
