"""The torch interactive path on a CPU: features, prompts, `decode`, from pictures, the published loss.

Beside `tracker_reference.py`, which builds the models.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sam3.model.sam1_task_predictor import SAM3InteractiveImagePredictor
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from scipy import ndimage
from torch import nn

from tests.tracker_reference import OnCpuInFloat32, TrackerSize


@dataclasses.dataclass
class Levels:
    """What the tracker sees of T pictures, finest first: [T, D/8, 4g, 4g], [T, D/4, 2g, 2g] (both behind conv_s0, conv_s1), [T, D, g, g]."""

    fine: torch.Tensor
    middle: torch.Tensor
    coarse: torch.Tensor

    def of(self, pictures: torch.Tensor) -> Levels:
        return Levels(self.fine[pictures], self.middle[pictures], self.coarse[pictures])


def random_levels(
    model: Sam3TrackerPredictor, pictures: int, seed: int, smooth: float = 1.0
) -> Levels:
    """Features that vary over the picture and, less, from frame to frame: levels of a random pyramid through conv_s0 and conv_s1."""
    rng, g, d = np.random.default_rng(seed), model.sam_image_embedding_size, model.hidden_dim

    def level(edge: int) -> torch.Tensor:
        still = rng.normal(size=(1, d, edge, edge))
        field = 0.9 * still + 0.45 * rng.normal(size=(pictures, d, edge, edge))
        field = ndimage.gaussian_filter(field, (0, 0, smooth * edge / g, smooth * edge / g))
        return torch.from_numpy((field / field.std()).astype(np.float32))

    with torch.no_grad():
        heads = model.sam_mask_decoder
        return Levels(heads.conv_s0(level(4 * g)), heads.conv_s1(level(2 * g)), level(g))


def levels_of(detector: nn.Module, model: Sam3TrackerPredictor, images: torch.Tensor) -> Levels:
    """Pictures [T, 3, Y, X] in -1..1 through trunk, second neck and the two projections."""
    fpn = detector.backbone.forward_image(images)["sam2_backbone_out"]["backbone_fpn"]
    heads = model.sam_mask_decoder
    return Levels(heads.conv_s0(fpn[0]), heads.conv_s1(fpn[1]), fpn[2])


def random_masks(
    size: TrackerSize,
    frames: int,
    objects: int,
    seed: int,
    absent: tuple[tuple[int, int], ...] = (),
) -> np.ndarray:
    """Moving ellipses, bool [T, K, Y, X]; `absent` lists (frame, object) pairs that are empty."""
    rng, edge = np.random.default_rng(seed), size.image
    rows, columns = (np.mgrid[:edge, :edge] + 0.5) / edge
    centre, radius = rng.uniform(0.3, 0.7, (objects, 2)), rng.uniform(0.1, 0.3, (objects, 2))
    speed = rng.uniform(-0.04, 0.04, (objects, 2))
    t = np.arange(frames)[:, None, None, None]
    y = (rows - (centre[:, 0, None, None] + speed[:, 0, None, None] * t)) / radius[:, 0, None, None]
    x = (columns - (centre[:, 1, None, None] + speed[:, 1, None, None] * t)) / radius[
        :, 1, None, None
    ]
    masks = y**2 + x**2 < 1
    for frame, k in absent:
        masks[frame, k] = False
    return masks


# Inside: what the parts of a model were given and returned


@contextlib.contextmanager
def watch(model: Sam3TrackerPredictor) -> Iterator[dict]:
    """Record the last call of each part into the dict: sparse, dense, all masks and IoUs, tokens, memories and their positions."""
    seen: dict = {}
    decoder, hooks = model.sam_mask_decoder, []

    def on(module: nn.Module, store) -> None:
        hooks.append(module.register_forward_hook(store, with_kwargs=True))

    def attention(_m, _a, kwargs, out):
        seen.update(
            memory=kwargs["prompt"],
            memory_pos=kwargs["prompt_pos"],
            pointer_tokens=kwargs["num_obj_ptr_tokens"],
            conditioned=out["memory"],
        )

    on(model.sam_prompt_encoder, lambda _m, _a, _k, out: seen.update(sparse=out[0], dense=out[1]))
    on(decoder.transformer, lambda _m, _a, _k, out: seen.update(tokens=out[0], image_tokens=out[1]))
    on(model.transformer.encoder, attention)
    on(
        model.maskmem_backbone.mask_downsampler,
        lambda _m, args, _k, out: seen.update(mask_for_memory=args[0], mask_embedding=out),
    )
    predict = decoder.predict_masks

    def predicted(*args, **kwargs):
        masks, ious, tokens, score = predict(*args, **kwargs)
        seen.update(
            all_masks=masks, all_ious=ious, stability=decoder._get_stability_scores(masks[:, 0:1])
        )
        return masks, ious, tokens, score

    decoder.predict_masks = predicted
    try:
        yield seen
    finally:
        del decoder.predict_masks
        for hook in hooks:
            hook.remove()


# (a) prompts -> masks


def random_prompts(
    size: TrackerSize,
    objects: int,
    points: int,
    seed: int,
    box: bool = False,
    mask: bool = False,
    padded: bool = False,
) -> dict:
    """points [K, N, 2] pixels (x, y); labels [K, N]: 1 inside, 0 outside, 2 and 3 the corners of a box, -1 padding; masks [K, 1, 4g, 4g] logits."""
    rng = np.random.default_rng(seed)
    coordinates = rng.uniform(0, size.image - 1, (objects, points, 2))
    labels = rng.integers(0, 2, (objects, points))
    if points:
        labels[:, 0] = 1
    if padded and points > 1:
        labels[::2, -1] = -1
    if box:
        corners = np.sort(rng.uniform(0, size.image - 1, (objects, 2, 2)), axis=1)
        coordinates, labels = (
            np.concatenate([corners, coordinates], 1),
            np.concatenate([np.tile([2, 3], (objects, 1)), labels], 1),
        )
    prompts = {
        "points": torch.from_numpy(coordinates.astype(np.float32)),
        "labels": torch.from_numpy(labels.astype(np.int32)),
    }
    if mask:
        field = ndimage.gaussian_filter(
            rng.normal(size=(objects, 1, 4 * size.grid, 4 * size.grid)), (0, 0, 3, 3)
        )
        prompts["masks"] = torch.from_numpy((6 * field / field.std()).astype(np.float32))
    return prompts


def decode(
    model: Sam3TrackerPredictor,
    levels: Levels,
    prompts: dict,
    multimask: bool,
    picture: torch.Tensor | None = None,
) -> dict:
    """Prompt encoder and mask decoder on features, one object a row; `picture` [K] says which picture each object is of (default: the first).

    As the image predictor runs them: the object's score does not touch the masks (see `sam_heads` for the tracker's way).
    Returns masks [K, M, 4g, 4g], ious [K, M], tokens of the masks [K, M or 1, D], object_score_logits [K, 1], and the inside (see `watch`).
    """
    k = len(prompts["points"] if prompts.get("points") is not None else prompts["masks"])
    own = levels.of(torch.zeros(k, dtype=torch.long) if picture is None else picture)
    with OnCpuInFloat32(), watch(model) as seen:
        points = None if prompts.get("points") is None else (prompts["points"], prompts["labels"])
        if points is None:  # the tracker's padding point
            points = torch.zeros(k, 1, 2), -torch.ones(k, 1, dtype=torch.int32)
        sparse, dense = model.sam_prompt_encoder(
            points=points, boxes=None, masks=prompts.get("masks")
        )
        masks, ious, tokens, score = model.sam_mask_decoder(
            image_embeddings=own.coarse,
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            repeat_image=False,
            high_res_features=[own.fine, own.middle],
        )
    return {
        "masks": masks,
        "ious": ious,
        "mask_tokens": tokens,
        "object_score_logits": score,
        **seen,
    }


def centre_click(target: np.ndarray, predicted: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The evaluation's click of each object: the point deepest inside the larger error, by exact distance to its border (picture edges count).

    target, predicted bool [K, Y, X]; None: nothing predicted. Returns points [K, 1, 2] (x, y) float32 and labels [K, 1]: 1 where it was
    missed, 0 where it was made up (also where the two are as deep, and at pixel (0, 0) where there is no error). Of ties the first in row order.
    """
    predicted = np.zeros_like(target) if predicted is None else predicted
    points, labels = [], []
    for wanted, got in zip(target, predicted, strict=True):
        depth = [
            ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
            for region in (wanted & ~got, got & ~wanted)
        ]
        missed = depth[0].max() > depth[1].max()
        y, x = np.unravel_index(depth[0 if missed else 1].argmax(), wanted.shape)
        points.append([[x, y]])
        labels.append([int(missed)])
    return np.array(points, np.float32), np.array(labels, np.int32)


def uniform_click(
    target: np.ndarray, predicted: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The training's click: uniform over all pixels in error; in the background where there is none (at (0, 0), label 0, if there is no background)."""
    predicted = np.zeros_like(target) if predicted is None else predicted
    points, labels = [], []
    for wanted, got in zip(target, predicted, strict=True):
        error = wanted != got
        pixels = np.argwhere(error if error.any() else ~wanted)
        y, x = pixels[rng.integers(len(pixels))] if len(pixels) else (0, 0)
        points.append([[x, y]])
        labels.append([int(wanted[y, x] & error[y, x])])
    return np.array(points, np.float32), np.array(labels, np.int32)


def interactive(
    detector: nn.Module,
    model: Sam3TrackerPredictor,
    images: torch.Tensor,
    prompts: dict,
    multimask: bool,
    picture: torch.Tensor,
) -> dict:
    """Trunk, second neck, `no_mem_embed` on the coarse level, `decode`; prompts of object k are about images[picture[k]]."""
    levels = levels_of(detector, model, images)
    first = Levels(
        levels.fine, levels.middle, levels.coarse + model.no_mem_embed.reshape(1, -1, 1, 1)
    )
    return decode(model, first, prompts, multimask, picture) | {
        "fine": levels.fine,
        "middle": levels.middle,
        "coarse": levels.coarse,
    }


def image_predictor(
    detector: nn.Module,
    model: Sam3TrackerPredictor,
    image: torch.Tensor,
    prompts: dict,
    multimask: bool,
) -> tuple:
    """The package's own predictor on one picture [3, Y, X]: (masks at picture size, ious, low_res_masks clamped to +-32) of all objects.

    Objects are a batch on one picture; a box is two points in front. The filling of holes, on by default, is off.
    """
    return ask_predictor(image_predictor_of(detector, model, image), prompts, multimask)


def image_predictor_of(
    detector: nn.Module, model: Sam3TrackerPredictor, image: torch.Tensor
) -> SAM3InteractiveImagePredictor:
    """The package's own predictor, which has looked at a picture [3, Y, X]."""
    predictor = SAM3InteractiveImagePredictor(model, max_hole_area=0.0)
    levels = levels_of(detector, model, image[None])
    coarse = levels.coarse + model.no_mem_embed.reshape(1, -1, 1, 1)
    predictor._features = {"image_embed": coarse, "high_res_feats": [levels.fine, levels.middle]}
    predictor._is_image_set, predictor._orig_hw = True, [tuple(image.shape[-2:])]
    return predictor


def ask_predictor(
    predictor: SAM3InteractiveImagePredictor, prompts: dict, multimask: bool
) -> tuple:
    """What `image_predictor` returns."""
    with OnCpuInFloat32():
        return predictor._predict(
            prompts["points"],
            prompts["labels"],
            None,
            prompts.get("masks"),
            multimask,
            return_logits=True,
        )


# The published loss (SAM 2's training code; sam3 ships it commented out), from its formulas


@dataclasses.dataclass(frozen=True)
class LossWeights:
    mask: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    score: float = 1.0
    alpha: float = 0.25
    gamma: float = 2.0
    iou_error: str = "l1"  # or "mse"
    supervise_all_ious: bool = True


def tracking_loss(
    frames: list[dict],
    targets: torch.Tensor,
    weights: LossWeights = LossWeights(),
    objects: float | None = None,
) -> dict:
    """Sum over frames and over the steps of a frame; each object's share is divided by the number of objects.

    frames: what `propagate` returned. targets bool [T, K, Y, X]. Of several masks the one with the least mask * focal + dice * dice counts;
    the IoU head is taught on all of them (mean) or on that one. Where the object is absent only its score is taught. Focal is the mean over
    pixels, dice has 1 added above and below, the IoU wanted is that of (logit > 0), the score's loss is plain cross-entropy.
    Returns loss_mask, loss_dice, loss_iou, loss_class, unweighted sums, and core_loss.
    """
    n = float(objects or targets.shape[1])
    terms = dict.fromkeys(("loss_mask", "loss_dice", "loss_iou", "loss_class"), torch.zeros(()))
    for frame, target in zip(frames, targets, strict=True):
        wanted = target[:, None].float()
        present = target.flatten(1).any(1).float()
        for step in frame["steps"]:
            logits, ious, score = (
                step["high_res_multimasks"],
                step["ious"],
                step["object_score_logits"],
            )
            t = wanted.expand_as(logits)
            p = torch.sigmoid(logits)
            hit = p * t + (1 - p) * (1 - t)
            balance = weights.alpha * t + (1 - weights.alpha) * (1 - t)
            entropy = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
            focal = (balance * (1 - hit) ** weights.gamma * entropy).mean((2, 3))  # [K, M]
            dice = 1 - (2 * (p * t).sum((2, 3)) + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)
            on, is_on = logits > 0, t > 0
            overlap = (on & is_on).sum((2, 3)) / (on | is_on).sum((2, 3)).clamp(min=1)
            miss = (ious - overlap).abs() if weights.iou_error == "l1" else (ious - overlap) ** 2
            best = (weights.mask * focal + weights.dice * dice).argmin(1, keepdim=True)
            miss = (
                miss.mean(1, keepdim=True) if weights.supervise_all_ious else miss.gather(1, best)
            )
            share = {
                "loss_mask": focal.gather(1, best),
                "loss_dice": dice.gather(1, best),
                "loss_iou": miss,
            }
            for name, value in share.items():
                terms[name] = terms[name] + (value[:, 0] * present).sum() / n
            terms["loss_class"] = (
                terms["loss_class"]
                + F.binary_cross_entropy_with_logits(score[:, 0], present, reduction="sum") / n
            )
    total = (
        weights.mask * terms["loss_mask"]
        + weights.dice * terms["loss_dice"]
        + weights.iou * terms["loss_iou"]
        + weights.score * terms["loss_class"]
    )
    return terms | {"core_loss": total}


def gradients(
    model: nn.Module, total: torch.Tensor, inputs: dict[str, torch.Tensor] | None = None
) -> dict[str, np.ndarray]:
    """Gradient of `total` with respect to every parameter it depends on, by name, and to `inputs` (leaves that require one)."""
    named = {n: p for n, p in model.named_parameters()} | {
        f"input/{n}": x for n, x in (inputs or {}).items()
    }
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: g.numpy().copy() for name, g in zip(named, found, strict=True) if g is not None}
