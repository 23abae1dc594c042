"""The text tower: a causal transformer over CLIP tokens (sam3.model.text_encoder_ve)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3jax.config import ModelConfig
from sam3jax.model.attention import MultiHeadAttention, remat
from sam3jax.model.layers import Linear, gelu, layer_norm
from sam3jax.model.vit import stack
from sam3jax.types import TextFeatures


class TextBlock(nn.Module):
    """Pre-norm causal attention and MLP. Scanned: returns (x, None)."""

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:  # [V, N, D]
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        y = layer_norm(dtype, name="ln_1")(x)
        attend = MultiHeadAttention(c.text_heads, 0.0, dtype, self.train, self.backend, name="attn")
        x = x + attend(y, y, y, mask=causal)
        y = layer_norm(dtype, name="ln_2")(x)
        y = gelu(Linear(4 * c.text_dim, dtype=dtype, train=self.train, name="c_fc")(y))
        return x + Linear(c.text_dim, dtype=dtype, train=self.train, name="c_proj")(y), None


class TextEncoder(nn.Module):
    """Tokens [V, N] (0 is padding) -> TextFeatures [V, N, d].

    Every position is encoded; which ones are padding is said by `valid`.
    """

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> TextFeatures:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        normal = nn.initializers.normal
        table = self.param("token_embedding", normal(0.02), (c.vocab_size, c.text_dim))
        places = self.param("positional_embedding", normal(0.01), (c.text_length, c.text_dim))
        x = (table[tokens] + places[: tokens.shape[1]]).astype(dtype)
        blocks = stack(remat(TextBlock, c.remat, prevent_cse=False), c.text_layers)
        x, _ = blocks(c, self.train, self.backend, name="resblocks")(x)
        x = layer_norm(dtype, name="ln_final")(x)
        x = Linear(c.dim, dtype=dtype, train=self.train, name="resizer")(x)
        return TextFeatures(features=x, valid=tokens != 0)
