"""The published rules of detection in video, called part by part: the oracle of the video tests.

Needs what `torch_reference` needs. The `sam3` package is only ever imported and called.
"""

from __future__ import annotations

import types
import warnings
from typing import Any

import numpy as np
import torch

from tests import torch_reference as base

warnings.filterwarnings("ignore", message=".*autocast.*")
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.geometry_encoders import Prompt
from sam3.model.model_misc import SAM3Output
from sam3.model.sam3_image import Sam3ImageOnVideoMultiGPU
from sam3.model.sam3_video_base import Sam3VideoBase
from sam3.perflib.nms import nms_masks


def nms(probs: np.ndarray, masks: np.ndarray, prob: float, iou: float) -> np.ndarray:
    """keep [N] bool of detections with probs [N] and mask logits [N, Y, X]."""
    return nms_masks(torch.from_numpy(probs), torch.from_numpy(masks), prob, iou).numpy()


def associate(
    detections: np.ndarray, scores: np.ndarray, tracks: np.ndarray, ids: np.ndarray, rules: Any
) -> tuple:
    """(new, unmatched, tracks of a detection, confident detection of a track, empty)."""
    return Sam3VideoBase._associate_det_trk(
        _settings(rules), torch.from_numpy(detections), scores, torch.from_numpy(tracks), ids
    )


def suppress(masks: np.ndarray, last: np.ndarray, rules: Any, reverse: bool = False) -> np.ndarray:
    rule = Sam3VideoBase._get_objects_to_suppress_based_on_most_recently_occluded
    numbers = list(range(len(masks)))
    return rule(
        _settings(rules, rank=1),
        torch.from_numpy(masks),
        torch.from_numpy(last),
        numbers,
        0,
        reverse,
    ).numpy()


def schedule(num_frames: int, world: int, rank: int, reverse: bool = False) -> dict[str, list]:
    """What one device does: which frames it computes, which a call finds, which are kept after it."""
    computed: list[int] = []
    calls: list[list[int]] = []
    kept: list[list[int]] = []
    model = types.SimpleNamespace(world_size=world, rank=rank, gather_backbone_out=False)

    def forward_grounding(*, find_input, **_):
        computed.append(find_input)
        value = torch.tensor([float(find_input)])
        return dict.fromkeys(("pred_logits", "pred_boxes", "pred_boxes_xyxy", "pred_masks"), value)

    def gather(value):  # what the other devices would have computed
        chunk = computed[-1] - computed[-1] % world
        stop = min(chunk + world, num_frames)
        return [torch.tensor([float(min(chunk + r, stop - 1))]) for r in range(world)], None

    model.forward_grounding, model._gather_tensor = forward_grounding, gather
    model._build_multigpu_buffer_next_chunk = types.MethodType(
        Sam3ImageOnVideoMultiGPU._build_multigpu_buffer_next_chunk, model
    )
    buffer: dict = {}
    order = range(num_frames - 1, -1, -1) if reverse else range(num_frames)
    for frame in order:
        out, _ = Sam3ImageOnVideoMultiGPU.forward_video_grounding_multigpu(
            model, None, list(range(num_frames)), None, frame, num_frames, buffer, reverse
        )
        calls.append([frame, int(out["pred_logits"])])
        kept.append(sorted(buffer))
    return {"computed": computed, "calls": calls, "kept": kept}


class Planner:
    """The published planning phase of one device, frame after frame; no tracker behind it."""

    def __init__(self, rules: Any) -> None:
        self._self = _settings(
            rules,
            rank=0,
            world_size=1,
            suppress_det_close_to_boundary=False,
            recondition_every_nth_frame=0,
            reconstruction_bbox_iou_thresh=0.0,
            masklet_confirmation_enable=False,
            _tracker_update_memories=lambda *a, **k: None,
        )
        for name in (
            "_associate_det_trk", "_process_hotstart", "_assign_new_det_to_gpus",
            "_drop_new_det_with_obj_limit", "_suppress_overlapping_based_on_recent_occlusion",
            "_get_objects_to_suppress_based_on_most_recently_occluded",
        ):  # fmt: skip
            setattr(self._self, name, types.MethodType(getattr(Sam3VideoBase, name), self._self))
        self.metadata = Sam3VideoBase._initialize_metadata(self._self)

    def step(
        self, frame: int, detections: np.ndarray, scores: np.ndarray, tracks: np.ndarray,
        reverse: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Mask logits of detections and of the tracks alive -> plan, and the tracks after silencing."""
        masks = torch.from_numpy(tracks.copy())
        found = {
            "mask": torch.from_numpy(detections),
            "scores": torch.from_numpy(scores),
            "bbox": torch.zeros(len(scores), 4),
        }
        plan, self.metadata = Sam3VideoBase.run_tracker_update_planning_phase(
            self._self, frame, 10**6, reverse, found, masks, torch.zeros(len(masks)),
            self.metadata, [],
        )  # fmt: skip
        memory = self.metadata["rank0_metadata"]
        return {
            "new": plan["new_det_fa_inds"].tolist(),
            "new_ids": plan["new_det_obj_ids"].tolist(),
            "removed": {int(i) for i in plan["obj_ids_newly_removed"]},
            "hidden": {int(i) for i in memory["suppressed_obj_ids"].get(frame, ())},
            "dropped": int(plan["num_obj_dropped_due_to_limit"]),
            "ids": self.metadata["obj_ids_all_gpu"].tolist(),
            "silenced": [bool((m == -10).all()) for m in masks],
            "last_occluded": {
                int(i): int(v) for i, v in self.metadata["obj_id_to_last_occluded"].items()
            },
            "score": {int(i): float(v) for i, v in self.metadata["obj_id_to_score"].items()},
            "keep_alive": {int(i): v for i, v in memory["trk_keep_alive"].items()},
        }


def _settings(rules: Any, **more: Any) -> types.SimpleNamespace:
    """Our Rules under the published names."""
    return types.SimpleNamespace(
        assoc_iou_thresh=rules.match_iou,
        trk_assoc_iou_thresh=rules.track_iou,
        new_det_thresh=rules.new_score,
        o2o_matching_masklets_enable=False,
        hotstart_delay=rules.hot_start,
        hotstart_unmatch_thresh=rules.unmatched,
        hotstart_dup_thresh=rules.duplicate,
        init_trk_keep_alive=rules.keep_alive_start,
        max_trk_keep_alive=rules.keep_alive_most,
        min_trk_keep_alive=rules.keep_alive_least,
        decrease_trk_keep_alive_for_empty_masklets=False,
        suppress_unmatched_only_within_hotstart=not rules.hide_unmatched,
        suppress_overlapping_based_on_recent_occlusion_threshold=rules.overlap,
        max_num_objects=rules.most_objects or 10_000,
        **more,
    )


def clip_example(size: base.Size, seed: int, clips: int = 1, frames: int = 3, **options) -> list:
    """One batch a frame, in the form of `base.example`: the same phrases, other targets."""
    batches = [base.example(size, seed + 100 * t, clips, **options) for t in range(frames)]
    for batch in batches:
        batch["texts"] = batches[0]["texts"]
    return batches


def clip_step(
    model: torch.nn.Module,
    frames: list,
    *,
    normalize_by_stage_num: bool = False,
    loss: dict | None = None,
) -> tuple[dict, dict, list]:
    """One backbone pass over all frames, every frame grounded on its own, the published loss.

    Returns (terms under the published keys, sums over stages; gradients of core_loss by parameter;
    core_loss of each frame alone).
    """
    model.train()
    model.zero_grad(set_to_none=True)
    points = [base._datapoint(frame) for frame in frames]
    images = torch.cat([point.img_batch for point, _ in points])
    vocabulary = points[0][0].find_text_batch
    stages, count = [], 0
    for (point, _), frame in zip(points, frames, strict=True):
        stage = point.find_inputs[0]
        stage.img_ids = stage.img_ids + count
        count += len(frame["images"])
        stages.append(stage)
    whole = BatchedDatapoint(
        images, vocabulary, stages, [target for _, target in points], [None] * len(frames)
    )
    seen = {
        "img_batch_all_stages": images,
        **model.backbone.forward_image(images),
        **model.backbone.forward_text(vocabulary, device="cpu"),
    }
    outputs = SAM3Output(iter_mode=SAM3Output.IterMode.LAST_STEP_PER_STAGE)
    for find, target in zip(whole.find_inputs, whole.find_targets, strict=True):
        prompt = Prompt(
            box_embeddings=find.input_boxes,
            box_mask=find.input_boxes_mask,
            box_labels=find.input_boxes_label,
        )
        found = model.forward_grounding(
            backbone_out=seen, find_input=find, find_target=target, geometric_prompt=prompt
        )
        outputs.append([found])
    wrapper = base.loss_wrapper(**(loss or {}))
    wrapper.normalize_by_stage_num = normalize_by_stage_num
    targets = [model.back_convert(t) for t in whole.find_targets]
    alone = []
    for (out,), target in zip(outputs.output, targets, strict=True):
        value = float(wrapper.compute_loss(out, target)["core_loss"].detach())
        scale = len(target["num_boxes"]) ** 0.5 if wrapper.scale_by_find_batch_size else 1.0
        alone.append(value * scale)
    terms = wrapper(outputs, targets)
    terms["core_loss"].backward()
    grads = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
    values = {k: float(v.detach()) if torch.is_tensor(v) else float(v) for k, v in terms.items()}
    return values, grads, alone
