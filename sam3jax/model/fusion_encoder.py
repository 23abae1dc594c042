"""The fusion encoder: image tokens attend to themselves and to the prompt (sam3.model.encoder)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3jax.config import ModelConfig
from sam3jax.model.attention import MultiHeadAttention, remat
from sam3jax.model.layers import Linear, layer_norm
from sam3jax.model.vit import stack


class EncoderLayer(nn.Module):
    """Pre-norm self-attention, cross-attention and ReLU MLP, each with dropout. Scanned.

    The fusion encoder adds positions to the self-attention's q and k; the geometry encoder adds
    them to the cross-attention's keys (`query_pos`, `memory_pos`).
    """

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # [B, N, D]
        memory: jax.Array,  # [B, S, D]
        query_pos: jax.Array | None,  # [N, D]
        memory_pos: jax.Array | None,  # [S, D]
        query_mask: jax.Array | None,  # [B, N]
        memory_mask: jax.Array | None,  # [B, S]
    ) -> tuple[jax.Array, None]:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)

        def drop(y):
            return nn.Dropout(c.dropout, deterministic=not self.train)(y)

        def attend(name):
            return MultiHeadAttention(
                c.heads, c.dropout, dtype, self.train, self.backend, name=name
            )

        def keys(mask):
            return None if mask is None else mask[:, None, None]

        y = layer_norm(dtype, name="norm1")(x)
        qk = y if query_pos is None else y + query_pos.astype(dtype)
        x = x + drop(attend("self_attn")(qk, qk, y, mask=keys(query_mask)))
        y = layer_norm(dtype, name="norm2")(x)
        k = memory if memory_pos is None else memory + memory_pos.astype(dtype)
        x = x + drop(attend("cross_attn_image")(y, k, memory, mask=keys(memory_mask)))
        y = layer_norm(dtype, name="norm3")(x)
        y = drop(nn.relu(Linear(c.ffn, dtype=dtype, train=self.train, name="linear1")(y)))
        return x + drop(Linear(c.dim, dtype=dtype, train=self.train, name="linear2")(y)), None


def encoder_layers(
    config: ModelConfig, length: int, train: bool, backend: str | None, name: str
) -> nn.Module:
    """`length` stacked, scanned, rematerialised EncoderLayers."""
    block = remat(EncoderLayer, config.remat, prevent_cse=False)
    return stack(block, length, (nn.broadcast,) * 5)(config, train, backend, name=name)


class FusionEncoder(nn.Module):
    """Image tokens [B, N, D] with positions [N, D], prompt [B, S, D] with valid [B, S] -> [B, N, D]."""

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(
        self, image: jax.Array, position: jax.Array, prompt: jax.Array, prompt_valid: jax.Array
    ) -> jax.Array:
        c = self.config
        layers = encoder_layers(c, c.fusion_layers, self.train, self.backend, "layers")
        x, _ = layers(image, prompt, position, None, None, prompt_valid)
        return x
