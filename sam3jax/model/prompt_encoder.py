"""Prompts of an object as tokens: points, corners of a box, a mask (sam3.sam.prompt_encoder).

A batch holds rows with different prompts, so the number of points is padded. The published padding
(label -1) is a token that every other token attends to: it changes the answer. Label -2 is ours:
such a point is hidden from all attention, so it equals leaving the point out.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3jax.config import ModelConfig
from sam3jax.model.layers import Conv, Downsample2x, gelu, layer_norm

OUTSIDE, INSIDE, BOX_START, BOX_END = 0, 1, 2, 3  # labels of points; a box is two of them
PADDING = -1  # the published "not a point" token: seen by all others
ABSENT = -2  # no token at all
LAYER_NORM_2D_EPS = 1e-6


class PromptEncoder(nn.Module):
    """Tokens of the points, and the mask prompt as a map that is added to the picture's features."""

    config: ModelConfig

    def setup(self) -> None:
        c, d = self.config, self.config.dim
        dtype = jnp.dtype(c.compute_dtype)
        wide = nn.initializers.normal(1.0)
        # Random frequencies, never trained: a buffer of the published model.
        self.frequencies = self.param("frequencies", wide, (2, d // 2))
        self.point_embed = self.param("point_embed", wide, (4, d))
        self.not_a_point_embed = self.param("not_a_point_embed", wide, (1, d))
        self.no_mask_embed = self.param("no_mask_embed", wide, (1, d))
        channels = c.mask_prompt_channels
        self.mask_downscaling_0 = Downsample2x(channels // 4, dtype)
        self.mask_downscaling_1 = layer_norm(dtype, LAYER_NORM_2D_EPS)
        self.mask_downscaling_3 = Downsample2x(channels, dtype)
        self.mask_downscaling_4 = layer_norm(dtype, LAYER_NORM_2D_EPS)
        self.mask_downscaling_6 = Conv(d, 1, dtype=dtype)

    def __call__(
        self,
        points: jax.Array,  # [B, A, 2]
        labels: jax.Array,  # [B, A]
        masks: jax.Array | None = None,  # [B, 4g, 4g]
        has_mask: jax.Array | None = None,  # [B]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens [B, A, D], which of them exist [B, A], and the map to add, [B or 1, g or 1, g or 1, D].

        points are x, y in pixels of the model's square picture, 0 being the first pixel's corner less
        one half: pixel (0, 0) is the point 0, 0. masks are logits at four times the grid; where
        `has_mask` is False (None: nowhere) the row counts as one without a mask.
        """
        tokens = self._points(points, labels)
        without = self.no_mask_embed.reshape(1, 1, 1, -1)
        if masks is None:
            return tokens, labels != ABSENT, without
        dense = self._masks(masks)
        if has_mask is not None:
            dense = jnp.where(has_mask[:, None, None, None], dense, without.astype(dense.dtype))
        return tokens, labels != ABSENT, dense

    def grid_positions(self) -> jax.Array:
        """Positions of the coarse grid's cells, [g, g, D] float32."""
        centre = (jnp.arange(self.config.grid) + 0.5) / self.config.grid
        x, y = jnp.meshgrid(centre, centre)
        return self._positions(jnp.stack([x, y], -1))

    def _points(self, points: jax.Array, labels: jax.Array) -> jax.Array:
        place = self._positions((points.astype(jnp.float32) + 0.5) / self.config.image_size)
        place = place + self.point_embed[jnp.clip(labels, 0, 3)]
        label = labels[..., None]
        return jnp.where(label >= 0, place, jnp.where(label == PADDING, self.not_a_point_embed, 0))

    def _positions(self, places: jax.Array) -> jax.Array:
        """Sines and cosines of places [..., 2] (x, y in 0..1) -> [..., D], in float32."""
        frequencies = jax.lax.stop_gradient(self.frequencies)
        at = 2.0 * places - 1.0
        # Written out: a short float32 product on an accelerator would blur the angles.
        angle = at[..., :1] * frequencies[0] + at[..., 1:] * frequencies[1]
        angle = 2 * math.pi * angle
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)

    def _masks(self, masks: jax.Array) -> jax.Array:
        x = gelu(self.mask_downscaling_1(self.mask_downscaling_0(masks[..., None])))
        x = gelu(self.mask_downscaling_4(self.mask_downscaling_3(x)))
        return self.mask_downscaling_6(x)
