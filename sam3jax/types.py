"""The records that flow through the program, and the legend of their axes.

Axes, in every shape comment of this project:

    I  images                 P  prompts per image       B  image-prompt pairs, B = I * P
    Q  queries                T  targets of a prompt     M  instances of an image
    L  decoder layers         N  tokens                  D  width
    H  heads                  K  width of a head         G  box exemplars of a prompt
    V  phrases (vocabulary)   R  LoRA rank               Y X  rows, columns
    A  points of an object's prompt (clicks); there B is objects, each of a picture beside it

Boxes are centre x, centre y, width, height in 0..1 of the (resized, padded) picture unless a name
says otherwise. Everything is padded to static shapes; what is padding is said by a mask or a count
beside it and must never change a result.
"""

from __future__ import annotations

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray  # what a loader returns is numpy, what a step works on is jax
AXIS = "data"  # the mesh axis over which pictures are split


class Prompts(struct.PyTreeNode):
    """What is asked of each picture: phrases, with optional box exemplars.

    text_id [I, P] int32, the row of the phrase in the tokens or text features beside it.
    valid [I, P] bool, False for padding.
    boxes [I, P, G, 4] exemplars, valid ones first; G may be 0.
    box_labels [I, P, G] int32, 1 for "like this", 0 for "not like this".
    box_valid [I, P, G] bool.
    """

    text_id: Array
    valid: Array
    boxes: Array
    box_labels: Array
    box_valid: Array


class Targets(struct.PyTreeNode):
    """What is true of each picture, stored once per instance; prompts point into it.

    boxes [I, M, 4]; masks [I, M, Y, ceil(X / 8)] uint8, rows packed by `np.packbits` (big bit order).
    mask_valid [I, M] bool, False for instances without a usable mask (their boxes still train).
    index [I, P, T] int32 into M, real targets first, M where there is none.
    num_targets [I, P] int32 <= T.
    is_exhaustive [I, P] bool, False where the picture may hold unlabelled instances of the phrase.
    void [I, Y, ceil(X / 8)] uint8, packed: pixels of which nobody knows what they are, neither target
    nor error of a mask. None: there is no such pixel in the data.
    """

    boxes: Array
    masks: Array
    mask_valid: Array
    index: Array
    num_targets: Array
    is_exhaustive: Array
    void: Array | None = None


class Batch(struct.PyTreeNode):
    """One training or validation step's worth of pictures.

    images [I, Y, X, 3] uint8, RGB, normalised on the device; with `cache_trunk` the trunk's features
    [I, y, x, D] in the compute dtype.
    tokens [V, N] int32, the phrases that `prompts.text_id` numbers; 0 is padding.
    image_valid [I] bool, False for a repeated picture that only fills up the batch.
    image_id [I] int32, the row of the picture in its data set.
    """

    images: Array
    tokens: Array
    prompts: Prompts
    targets: Targets
    image_valid: Array
    image_id: Array


class ClickBatch(struct.PyTreeNode):
    """Pictures with up to K objects each, for clicks: B = I * K rows, row b of picture b // K.

    images as in Batch, squares; masks [I, K, Y, ceil(X / 8)] uint8, packed as in Targets.
    valid [I, K] bool, False for padding.
    points [I, K, A, 2] stored with an object, x and y in pixels of these pictures; A may be 0.
    labels [I, K, A] int32: 1 inside, 0 outside, -2 no point.
    image_valid [I] bool, image_id [I] int32 as in Batch.
    luck [I] uint32, what the prompts of a picture are drawn from; another one each time it is shown.
    """

    images: Array
    masks: Array
    valid: Array
    points: Array
    labels: Array
    image_valid: Array
    image_id: Array
    luck: Array

    @property
    def edge(self) -> int:
        """Pixels of an edge of the pictures, also where their features stand in their place."""
        return self.masks.shape[2]


class TextFeatures(struct.PyTreeNode):
    """Encoded phrases: features [V, N, D]; valid [V, N] bool, False for padding tokens."""

    features: jax.Array
    valid: jax.Array


class ImageFeatures(struct.PyTreeNode):
    """Backbone output, finest first: levels of [I, Y/4.., X/4.., D], strides 1/4, 1/2, 1 of a patch."""

    levels: tuple[jax.Array, ...]


class ClickFeatures(struct.PyTreeNode):
    """What the mask decoder reads of a picture with a grid of g x g patches, finest first.

    fine [I, 4g, 4g, D/8]; middle [I, 2g, 2g, D/4]; coarse [I, g, g, D].
    """

    fine: jax.Array
    middle: jax.Array
    coarse: jax.Array


class PromptedMasks(struct.PyTreeNode):
    """What the mask decoder says of B prompted objects; see sam3jax.model.mask_decoder.choose.

    masks [B, 4, 4g, 4g] float32 logits, mask 0 for a clear prompt, 1 to 3 for one that may mean
    several things; ious [B, 4] the predicted IoU of each; tokens [B, 4, D], what a pointer of a track
    is made of; score [B], logit of the object being there at all.
    """

    masks: jax.Array
    ious: jax.Array
    tokens: jax.Array
    score: jax.Array


class Detections(struct.PyTreeNode):
    """What one group of queries predicts, every decoder layer (the last one is the answer).

    logits [L, B, Q]; boxes [L, B, Q, 4]; mask_embed [B, Q, D], last layer only: the mask logits of
    query q are `einsum("d,yxd->yx", mask_embed[b, q], pixel_embed[b])` (see `draw_masks`).
    """

    logits: jax.Array
    boxes: jax.Array
    mask_embed: jax.Array


class Outputs(struct.PyTreeNode):
    """What the detector returns for B = I * P pairs, pair b = image b // P, prompt b % P.

    o2o: the one-to-one queries. o2m: the one-to-many queries, in training only, else None.
    presence_logits [L, B], one per prompt: is there any instance at all?
    pixel_embed [B, Y', X', D] with Y' = 4 Y / patch; semantic_logits [B, Y', X'].
    """

    o2o: Detections
    o2m: Detections | None
    presence_logits: jax.Array
    pixel_embed: jax.Array
    semantic_logits: jax.Array


class ClipBatch(Batch):
    """A batch whose pictures are frames of clips, one clip after the other; image_id is the frame.

    clip [I] int32, which clip of the batch; frame [I] int32, its number in the video; stage [I] int32,
    its place in the clip, 0 first: losses are normalised by stage. object_id [I, M] int32: an object
    has the same row in all frames of its clip; -1 where the row holds nothing.
    """

    clip: Array
    frame: Array
    stage: Array
    object_id: Array
