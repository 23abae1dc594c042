"""The geometry encoder: box exemplars and a class token, encoded against the picture.

Answers to sam3.model.geometry_encoders. Points belong to interactive prompts; their three
projections reach no output here and are carried beside the model (sam3jax.weights.names).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3jax.boxes import cxcywh_to_xyxy
from sam3jax.config import ModelConfig
from sam3jax.model.fusion_encoder import encoder_layers
from sam3jax.model.layers import Conv, Linear, layer_norm
from sam3jax.model.positions import sine

ROI = 7  # cells along an edge of a pooled box


def roi_align(features: jax.Array, boxes_xyxy: jax.Array) -> jax.Array:
    """Average-pool boxes to 7 x 7 cells: features [B, y, x, D], boxes [B, G, 4] in cells -> [B, G, 7, 7, D].

    torchvision's `roi_align(aligned=False, sampling_ratio=-1)`: every cell averages
    ceil(size / 7) bilinear samples along each axis. Samples form a grid, so pooling is separable:
    one [7, y] and one [7, x] weight matrix per box. Boxes up to the picture's size are exact.
    """
    rows, columns = features.shape[1:3]
    wy = _roi_weights(boxes_xyxy[..., 1], boxes_xyxy[..., 3], rows)  # [B, G, 7, y]
    wx = _roi_weights(boxes_xyxy[..., 0], boxes_xyxy[..., 2], columns)
    pooled = jnp.einsum("bgpy,byxd->bgpxd", wy, features, preferred_element_type=jnp.float32)
    return jnp.einsum("bgqx,bgpxd->bgpqd", wx, pooled, preferred_element_type=jnp.float32)


def _roi_weights(start: jax.Array, end: jax.Array, cells: int) -> jax.Array:
    """Weights [..., 7, cells] of one axis."""
    size = jnp.maximum(end - start, 1.0)
    count = jnp.ceil(size / ROI)  # samples per bin
    most = -(-cells // ROI) + 1
    cell, sample = jnp.arange(ROI)[:, None], jnp.arange(most)
    size, count, start = (x[..., None, None] for x in (size, count, start))
    at = start + (cell + (sample + 0.5) / count) * size / ROI  # [..., 7, most]
    inside = (at >= -1.0) & (at <= cells) & (sample < count)
    at = jnp.clip(at, 0.0, cells - 1.0)
    low = jnp.floor(at)
    grid = jnp.arange(cells)
    share = at - low
    weight = jnp.where(grid == low[..., None], 1.0 - share[..., None], 0.0)
    weight += jnp.where(grid == low[..., None] + 1, share[..., None], 0.0)
    weight = jnp.where(inside[..., None], weight, 0.0)  # [..., 7, most, cells]
    return weight.sum(-2) / count


class GeometryEncoder(nn.Module):
    """Box exemplars -> prompt tokens [B, G + 1, D] and valid [B, G + 1]; the class token is last.

    boxes [B, G, 4] cxcywh in 0..1, labels [B, G], valid [B, G]; image [B, y, x, D] with positions
    [y * x, D]. With `geometry_without_boxes` off, a prompt without boxes gets no token at all.
    """

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(
        self,
        boxes: jax.Array,
        labels: jax.Array,
        valid: jax.Array,
        image: jax.Array,
        position: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        b, rows, columns, d = image.shape
        normal = nn.initializers.normal

        def linear(name):
            return Linear(d, dtype=dtype, train=self.train, name=name)

        # Run also for G = 0: the parameters exist whatever the batch holds.
        features = layer_norm(dtype, name="img_pre_norm")(image)
        scale = jnp.array([columns, rows, columns, rows], boxes.dtype)
        pooled = roi_align(features, cxcywh_to_xyxy(boxes) * scale)  # [B, G, 7, 7, D]
        pooled = pooled.reshape(-1, ROI, ROI, d)
        # A size-7 convolution of a 7 x 7 map without padding: one vector per box.
        pooled = Conv(d, ROI, dtype=dtype, name="boxes_pool_project")(pooled)
        half = d // 2
        centre = [sine(boxes[..., 1], half), sine(boxes[..., 0], half)]
        encoded = jnp.concatenate([*centre, boxes[..., 3:], boxes[..., 2:3]], -1)
        label_table = self.param("label_embed", normal(1.0), (2, d)).astype(dtype)
        tokens = linear("boxes_direct_project")(boxes)
        tokens = tokens + pooled.reshape(b, -1, d)
        tokens = tokens + linear("boxes_pos_enc_project")(jax.lax.stop_gradient(encoded))
        tokens = tokens + label_table[labels]

        cls = self.param("cls_embed", normal(1.0), (1, d)).astype(dtype)
        tokens = jnp.concatenate([tokens, jnp.broadcast_to(cls, (b, 1, d))], 1)
        has_cls = jnp.ones((b, 1), bool)
        attended = jnp.concatenate([valid, has_cls], 1)  # the class token attends in any case
        if not c.geometry_without_boxes:
            has_cls = valid.any(-1, keepdims=True)
        valid = jnp.concatenate([valid, has_cls], 1)

        tokens = layer_norm(dtype, name="norm")(linear("final_proj")(tokens))
        layers = encoder_layers(c, c.geometry_layers, self.train, self.backend, "encode")
        flat = image.reshape(b, rows * columns, d)
        tokens, _ = layers(tokens, flat, None, position, attended, None)
        return layer_norm(dtype, name="encode_norm")(tokens), valid
