"""Pixel decoder, mask embeddings and semantic head (sam3.model.maskformer_segmentation)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3jax.config import ModelConfig
from sam3jax.model.attention import MultiHeadAttention, remat
from sam3jax.model.layers import Conv, Mlp, group_norm, layer_norm

GROUPS = 8


def draw_masks(mask_embed: jax.Array, pixel_embed: jax.Array) -> jax.Array:
    """Mask logits of queries: [..., Q, D] and [..., Y', X', D] -> [..., Q, Y', X'] float32."""
    return jnp.einsum(
        "...qd,...yxd->...qyx", mask_embed, pixel_embed, preferred_element_type=jnp.float32
    )


class PixelDecoder(nn.Module):
    """Pyramid, finest first [B, *, *, D] -> [B, 4y, 4x, D], nearest upsampling between.

    Torch has a third stage that no output passes through (`conv_layers.2`, `norms.2`): its tensors
    are carried beside the model (sam3jax.weights.names).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...]) -> jax.Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        x = levels[-1]
        for i, level in enumerate(levels[-2::-1]):
            x = level + jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
            x = Conv(x.shape[-1], 3, 1, dtype=dtype, name=f"conv_layers_{i}")(x)
            x = nn.relu(group_norm(GROUPS, dtype, name=f"norms_{i}")(x))
        return x


class SegmentationHead(nn.Module):
    """Encoded image, pyramid, last-layer queries -> (mask_embed, pixel_embed, semantic_logits).

    memory [B, y, x, D]; levels of [B, *, *, D], the coarsest is replaced by the memory; queries
    [B, Q', D]; prompt [B, S, D] with prompt_valid [B, S].
    """

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(
        self,
        memory: jax.Array,
        levels: tuple[jax.Array, ...],
        queries: jax.Array,
        prompt: jax.Array,
        prompt_valid: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        b, rows, columns, d = memory.shape
        x = layer_norm(dtype, name="cross_attn_norm")(memory).reshape(b, rows * columns, d)
        attend = MultiHeadAttention(
            c.heads, 0.0, dtype, self.train, self.backend, name="cross_attend_prompt"
        )
        x = (
            attend(x, prompt, prompt, mask=prompt_valid[:, None, None]).reshape(memory.shape)
            + memory
        )
        decoder = remat(PixelDecoder, c.remat, prevent_cse=True)
        pixels = decoder(c, name="pixel_decoder")((*levels[:-1], x))
        embed = Mlp((d, d, d), dtype=dtype, train=self.train, name="mask_embed")(queries)
        pixel_embed = Conv(d, 1, dtype=dtype, name="instance_seg_head")(pixels)
        semantic = Conv(1, 1, dtype=dtype, name="semantic_seg_head")(pixels)[..., 0]
        return embed, pixel_embed, semantic.astype(jnp.float32)
