"""The simple feature pyramid behind the ViT (sam3.model.necks): strides 1/4, 1/2 and 1 of a patch."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3jax.config import ModelConfig
from sam3jax.model.layers import Conv, Upsample2x, gelu


class Neck(nn.Module):
    """ViT features [I, y, x, D] -> levels [I, 4y, 4x, d], [I, 2y, 2x, d], [I, y, x, d].

    Torch has a fourth level (half resolution) that is computed and dropped: `convs_3` reaches no
    output, and its tensors are carried beside the model (sam3jax.weights.names).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        half, quarter = c.vit_dim // 2, c.vit_dim // 4
        fine = gelu(Upsample2x(half, dtype, name="convs_0_dconv_2x2_0")(x))
        fine = Upsample2x(quarter, dtype, name="convs_0_dconv_2x2_1")(fine)
        middle = Upsample2x(half, dtype, name="convs_1_dconv_2x2")(x)
        levels = []
        for i, level in enumerate((fine, middle, x)):
            level = Conv(c.dim, 1, dtype=dtype, name=f"convs_{i}_conv_1x1")(level)
            levels.append(Conv(c.dim, 3, 1, dtype=dtype, name=f"convs_{i}_conv_3x3")(level))
        return tuple(levels)
