"""The published torch loss on a case of tests.loss_cases: terms, gradients and assignments."""

from __future__ import annotations

import functools

import numpy as np
import torch
from sam3.model.box_ops import box_cxcywh_to_xyxy
from sam3.train.loss import loss_fns, sam3_loss
from sam3.train.matcher import BinaryHungarianMatcherV2, BinaryOneToManyMatcher

from sam3jax.config import LossConfig
from tests.loss_cases import LEAVES, Case

# The Triton kernel needs a GPU; the function's own torch branch is the same formula.
if not isinstance(loss_fns.sigmoid_focal_loss, functools.partial):
    loss_fns.sigmoid_focal_loss = functools.partial(loss_fns.sigmoid_focal_loss, triton=False)


def matcher(c: LossConfig) -> BinaryHungarianMatcherV2:
    return BinaryHungarianMatcherV2(
        focal=True, cost_class=c.cost_class, cost_bbox=c.cost_bbox, cost_giou=c.cost_giou,
        alpha=c.cost_alpha, gamma=c.cost_gamma, stable=False,
    )  # fmt: skip


def wrapper(c: LossConfig) -> sam3_loss.Sam3LossWrapper:
    """The torch loss that a LossConfig names."""
    terms = [
        loss_fns.Boxes(weight_dict={"loss_bbox": c.loss_bbox, "loss_giou": c.loss_giou}),
        loss_fns.IABCEMdetr(
            weight_dict={"loss_ce": c.loss_ce, "presence_loss": c.presence_loss},
            pos_weight=c.pos_weight, alpha=c.alpha, gamma=c.gamma, weak_loss=c.weak_loss, pos_focal=c.pos_focal,
            pad_n_queries=c.pad_n_queries, pad_scale_pos=c.pad_scale_pos, use_presence=c.use_presence,
            presence_alpha=c.presence_alpha, presence_gamma=c.presence_gamma,
        ),
    ]  # fmt: skip
    if c.masks:
        terms.append(
            loss_fns.Masks(
                weight_dict={"loss_mask": c.loss_mask, "loss_dice": c.loss_dice}, compute_aux=False,
                focal_alpha=c.focal_alpha, focal_gamma=c.focal_gamma, num_sample_points=c.num_sample_points,
                oversample_ratio=c.oversample_ratio, importance_sample_ratio=c.importance_sample_ratio,
            )
        )  # fmt: skip
    semantic = None
    if c.semantic:
        semantic = loss_fns.SemanticSegCriterion(
            weight_dict={"loss_semantic_seg": c.loss_semantic_seg, "loss_semantic_dice": c.loss_semantic_dice},
            focal=c.semantic_focal, focal_alpha=c.semantic_focal_alpha, focal_gamma=c.semantic_focal_gamma,
            downsample=c.semantic_downsample, presence_head=c.semantic_positive_only, presence_loss=False,
        )  # fmt: skip
    return sam3_loss.Sam3LossWrapper(
        loss_fns_find=terms, loss_fn_semantic_seg=semantic, matcher=matcher(c),
        o2m_matcher=BinaryOneToManyMatcher(alpha=c.o2m_alpha, threshold=c.o2m_threshold, topk=c.o2m_topk),
        o2m_weight=c.o2m_weight, use_o2m_matcher_on_o2m_aux=c.use_o2m_matcher_on_o2m_aux,
        # One process: its local normalisation is the global one, without a process group.
        normalization="local" if c.normalization == "global" else c.normalization,
        normalize_by_valid_object_num=c.normalize_by_valid_object_num,
        scale_by_find_batch_size=c.scale_by_find_batch_size,
    )  # fmt: skip


def run(case: Case, c: LossConfig) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Terms (core_loss scaled), gradients of core_loss by leaf."""
    leaf = {k: torch.from_numpy(np.array(getattr(case, k))).requires_grad_() for k in LEAVES}
    layers, pairs = case.logits.shape[:2]

    def stage(i: int, last: bool) -> dict:
        out = {}
        for key in ("", "_o2m") if c.o2m else ("",):
            out[f"pred_logits{key}"] = leaf[f"logits{key}"][i][..., None]
            out[f"pred_boxes{key}"] = leaf[f"boxes{key}"][i]
            out[f"pred_boxes_xyxy{key}"] = box_cxcywh_to_xyxy(leaf[f"boxes{key}"][i])
            if last:
                out[f"pred_masks{key}"] = leaf[f"masks{key}"]
        out["presence_logit_dec"] = leaf["presence"][i][:, None]
        return out

    out = stage(layers - 1, True)
    out["semantic_seg"], out["presence_logit"] = leaf["semantic"][:, None], torch.zeros(pairs, 1)
    if c.aux:
        out["aux_outputs"] = [stage(i, False) for i in range(layers - 1)]
    targets = to_torch_targets(case)
    loss = wrapper(c)
    for o in (out, *out.get("aux_outputs", [])):
        o["indices"] = loss.matcher(o, targets)
    find_targets = targets
    if c.mask_resolution == "prediction":
        small = torch.nn.functional.interpolate(
            targets["masks"][:, None].float(), size=case.masks.shape[-2:], mode="nearest-exact"
        )
        find_targets = {**targets, "masks": small[:, 0] > 0}
    terms = loss.compute_loss(out, find_targets)
    if loss.loss_fn_semantic_seg is not None:
        more = loss.loss_fn_semantic_seg(out, targets)
        terms["core_loss"] = terms["core_loss"] + more.pop("core_loss")
        terms |= more
    if loss.scale_by_find_batch_size:
        terms["core_loss"] = terms["core_loss"] * pairs**0.5
    terms["core_loss"].backward()
    grads = {
        k: (v.grad if v.grad is not None else torch.zeros_like(v)).numpy() for k, v in leaf.items()
    }
    values = {k: float(v.detach()) for k, v in terms.items()}
    # torch weights the F1 of one-to-many queries like a loss (a value of 1.4); ours stays a share.
    f1 = [k for k in values if k.startswith("ce_f1") and k.endswith("_o2m")]
    return {**values, **{k: values[k] / c.o2m_weight for k in f1}}, grads


def to_torch_targets(case: Case) -> dict:
    images, prompts, t = case.index.shape
    rows = [
        (i, p, case.index[i, p, : case.num_targets[i, p]]) for i, p in np.ndindex(images, prompts)
    ]
    boxes = torch.from_numpy(np.concatenate([case.target_boxes[i][idx] for i, _, idx in rows]))
    masks = torch.from_numpy(np.concatenate([case.target_masks[i][idx] for i, _, idx in rows]))
    valid = torch.from_numpy(np.concatenate([case.mask_valid[i][idx] for i, _, idx in rows]))
    padded = torch.zeros(images * prompts, t, 4)
    ids = torch.full((images * prompts, t), -1)
    for b, (i, _, idx) in enumerate(rows):
        padded[b, : len(idx)] = torch.from_numpy(case.target_boxes[i][idx])
        ids[b, : len(idx)] = torch.arange(len(idx))
    return {
        "boxes": boxes, "boxes_xyxy": box_cxcywh_to_xyxy(boxes), "boxes_padded": padded,
        "num_boxes": torch.from_numpy(case.num_targets.reshape(-1)).long(), "masks": masks, "semantic_masks": None,
        "is_valid_mask": valid, "is_exhaustive": torch.from_numpy(case.exhaustive.reshape(-1)), "object_ids_padded": ids,
    }  # fmt: skip
