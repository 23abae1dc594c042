"""Detection in a whole video, its frames spread over all devices.

A chunk is as many frames as devices (times `frames_per_device`). Each device encodes its frames one
at a time, asks every phrase, drops detections that overlap a stronger one and keeps the strongest;
then all devices receive all frames of the chunk. The next chunk is dispatched before this one is
read, so that devices and host work at the same time; the chunk before is freed. Memory therefore
does not depend on the video's length.

Answers to forward_video_grounding_multigpu (sam3.model.sam3_image). One process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from sam3jax.boxes import cxcywh_to_xyxy
from sam3jax.config import ModelConfig
from sam3jax.data import transforms
from sam3jax.errors import UserError
from sam3jax.model import Sam3, draw_masks
from sam3jax.model.tracker_neck import TrackerNeck
from sam3jax.types import Outputs, Prompts, TextFeatures
from sam3jax.video.nms import lower, nms
from sam3jax.video.schedule import Chunk, chunks

Variables = Any
# (variables, the trunk's features [1, y, x, D]) -> arrays [1, ...]: what a tracker reads beside detections.
Levels = Callable[[Variables, jax.Array], Any]

NMS_IOU = 0.1  # of masks of one phrase, as published for videos
_EPSILON = 1e-3  # of the published inverse sigmoid: probabilities stay within .001 to .999
_LOGIT_CLAMP = 10.0


class ChunkOptions(NamedTuple):
    """How frames are asked. Static: another value compiles anew.

    keep: detections of each phrase. joint_presence: the video detector's score, class times presence;
    without it presence is ignored here. mask_dtype: of the mask logits that leave the device.
    """

    keep: int = 100
    joint_presence: bool = True
    mask_dtype: str = "float32"
    frames_per_device: int = 1


class Thresholds(NamedTuple):
    """Which detections stay; other values compile nothing anew. The defaults are the published ones.

    prob: one for all phrases, or one for each of P, [P]. iou: of masks, from which of two detections
    the weaker one is dropped.
    """

    prob: ArrayLike = 0.5
    iou: ArrayLike = NMS_IOU


@dataclass(frozen=True)
class SecondNeck:
    """`Levels` of the second neck, which a tracker reads: three arrays, finest first, [1, 4y, 4x, D],
    [1, 2y, 2x, D] and [1, y, x, D].

    Variables must hold `tracker_neck`.
    """

    config: ModelConfig

    def __call__(self, variables: Variables, trunk: jax.Array) -> Any:
        own = {"params": variables["params"]["tracker_neck"]}
        return TrackerNeck(self.config).apply(own, trunk)


class FrameDetections(struct.PyTreeNode):
    """The K strongest detections of P phrases in a frame; a chunk has an axis of frames before.

    logits [P, K], strongest first: those that a stronger one overlaps, and all below the threshold,
    are lowered by 1e4. boxes, boxes_xyxy [P, K, 4] in 0..1; masks [P, K, Y', X'] logits; query [P, K],
    whose answer it is. levels: what `Levels` returned, in bfloat16, on the device; None without it.
    """

    logits: jax.Array
    boxes: jax.Array
    boxes_xyxy: jax.Array
    masks: jax.Array
    query: jax.Array
    levels: Any = None

    def of_phrases(self, number: int) -> FrameDetections:
        """Of the first phrases alone."""
        own = jax.tree.map(lambda x: x[:number], self.replace(levels=None))
        return own.replace(levels=self.levels)


def joint_logits(outputs: Outputs) -> jax.Array:
    """[B, Q]: logit of sigmoid(class) * sigmoid(presence), never beyond +-10.

    The published inverse sigmoid clamps at 1e-3, so the probability never leaves .001 to .999.
    """
    class_prob = jax.nn.sigmoid(outputs.o2o.logits[-1].astype(jnp.float32))
    prob = class_prob * jax.nn.sigmoid(outputs.presence_logits[-1].astype(jnp.float32))[:, None]
    odds = jnp.maximum(prob, _EPSILON) / jnp.maximum(1 - prob, _EPSILON)
    return jnp.clip(jnp.log(odds), -_LOGIT_CLAMP, _LOGIT_CLAMP)


def detect_frame(
    model: Sam3,
    options: ChunkOptions,
    levels: Levels | None,
    variables: Variables,
    text: TextFeatures,
    prompts: Prompts,
    thresholds: Thresholds,
    frame: jax.Array,
) -> FrameDetections:
    """frame [Y, X, 3] uint8, prompts of one picture (I = 1)."""
    trunk: Any = model.apply(variables, frame[None], method="encode_trunk")
    image = model.apply(variables, trunk, method="from_trunk")
    outputs: Any = model.apply(variables, image, text, prompts, method="detect")
    last = outputs.o2o
    logits = last.logits[-1].astype(jnp.float32)
    logits = joint_logits(outputs) if options.joint_presence else logits  # [P, Q]
    masks = draw_masks(last.mask_embed, outputs.pixel_embed)  # [P, Q, Y', X']
    keep = nms(
        jax.nn.sigmoid(logits),
        masks > 0,
        prob_threshold=thresholds.prob,
        iou_threshold=thresholds.iou,
    )
    ranked, query = lax.top_k(lower(logits, keep), min(options.keep, logits.shape[-1]))  # [P, K]
    boxes = jnp.take_along_axis(last.boxes[-1].astype(jnp.float32), query[..., None], axis=1)
    masks = jnp.take_along_axis(masks, query[..., None, None], axis=1)
    return FrameDetections(
        logits=ranked,
        boxes=boxes,
        boxes_xyxy=cxcywh_to_xyxy(boxes),
        masks=masks.astype(options.mask_dtype),
        query=query,
        levels=None if levels is None else _bfloat16(levels(variables, trunk)),
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _detect_chunk(
    model: Sam3,
    options: ChunkOptions,
    levels: Levels | None,
    mesh: Mesh,
    variables: Variables,
    text: TextFeatures,
    prompts: Prompts,
    thresholds: Thresholds,
    frames: jax.Array,
) -> FrameDetections:
    """frames [W, Y, X, 3] uint8, split over the mesh -> every frame's detections on every device."""
    split = P(mesh.axis_names)

    def one_device(variables, text, prompts, thresholds, frames):
        one = partial(detect_frame, model, options, levels, variables, text, prompts, thresholds)
        return lax.map(one, frames)  # one frame at a time: memory follows one frame

    # Out as split and then constrained: XLA makes one all-gather a leaf of it. An all_gather inside
    # is refused under check_vma, since its result is not provably equal on all devices.
    sharded = jax.shard_map(
        one_device, mesh=mesh, in_specs=(*[P()] * 4, split), out_specs=split, check_vma=True
    )
    found = sharded(variables, text, prompts, thresholds, frames)
    return lax.with_sharding_constraint(found, NamedSharding(mesh, P()))


class VideoDetector:
    """Asks the same phrases of all frames of a video. Compiled once for all videos and thresholds.

    variables, text and prompts (of one picture, I = 1) are placed on every device of the mesh here.
    """

    def __init__(
        self,
        model: Sam3,
        variables: Variables,
        text: TextFeatures,
        prompts: Prompts,
        mesh: Mesh,
        options: ChunkOptions = ChunkOptions(),  # noqa: B008 - a constant
        thresholds: Thresholds = Thresholds(),  # noqa: B008 - a constant
        levels: Levels | None = None,
    ) -> None:
        if options.frames_per_device < 1:
            raise UserError(f"{options.frames_per_device} frames a device: give 1 or more")
        self.options, self._model, self._mesh, self._levels = options, model, mesh, levels
        self._size = model.config.image_size
        everywhere = NamedSharding(mesh, P())
        asked = prompts.text_id.shape[1]
        limits = Thresholds(
            np.broadcast_to(np.asarray(thresholds.prob, np.float32), asked),
            np.asarray(thresholds.iou, np.float32),
        )
        self._inputs = jax.device_put((variables, text, prompts, limits), everywhere)
        self._split = NamedSharding(mesh, P(mesh.axis_names))

    @property
    def width(self) -> int:
        """Frames of a chunk."""
        return self._mesh.size * self.options.frames_per_device

    def detections(
        self, frames: Sequence[np.ndarray], reverse: bool = False
    ) -> Iterator[tuple[int, FrameDetections]]:
        """(number, detections) of each frame, from the last to the first with `reverse`.

        frames: anything with a length that gives [Y, X, 3] uint8 by number; a chunk is read at a time.
        Arrays are of numpy, but for `levels`, which stay on the devices.
        """
        waiting: tuple[Chunk, FrameDetections] | None = None
        for chunk in chunks(len(frames), self.width, reverse):
            running = (chunk, self._dispatch(frames, chunk))
            if waiting is not None:
                yield from _frames_of(*waiting, reverse)
            waiting = running
            del running  # nobody else holds the older chunk
        if waiting is not None:
            yield from _frames_of(*waiting, reverse)

    def _dispatch(self, frames: Sequence[np.ndarray], chunk: Chunk) -> FrameDetections:
        """Starts the devices on a chunk and returns at once."""
        own = [self._squashed(frames[k]) for k in chunk.frames()]
        pixels = np.stack([own[k - chunk.first] for k in chunk.rows(self.width)])
        return _detect_chunk(
            self._model,
            self.options,
            self._levels,
            self._mesh,
            *self._inputs,
            jax.device_put(pixels, self._split),
        )

    def _squashed(self, frame: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        return transforms.move_picture(transforms.square(width, height, self._size), frame)


def _frames_of(
    chunk: Chunk, found: FrameDetections, reverse: bool
) -> Iterator[tuple[int, FrameDetections]]:
    """Frame by frame; rows beyond the video's end, copies of the last frame, are left out."""
    levels, host = found.levels, jax.device_get(found.replace(levels=None))
    for number in chunk.frames(reverse):
        row = number - chunk.first
        one = jax.tree.map(lambda x, row=row: x[row], host)
        yield number, one.replace(levels=jax.tree.map(lambda x, row=row: x[row], levels))


def _bfloat16(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0].astype(jnp.bfloat16), tree)
