"""The image trunk: a plain ViT of windowed and global blocks (sam3.model.vitdet).

Blocks come in stages of windowed blocks followed by one global block. Parameters are stacked:
`stages/windows/...` [stages, blocks - 1, ...] and `stages/last/...` [stages, ...]; both levels are
scanned and each block is rematerialised.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3jax.config import ModelConfig
from sam3jax.model.attention import attention, remat
from sam3jax.model.layers import Linear, drop_path, gelu, layer_norm
from sam3jax.model.positions import apply_rope, rope_table

STACKED: dict[Any, Any] = {"params": 0, "lora": 0, "lora_scale": 0, "intermediates": 0}


def stack(block: Any, length: int, in_axes: Any = 0) -> Any:
    """`length` blocks one after the other, in one loop over parameters that lie in one array."""
    return nn.scan(
        block,
        STACKED,
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        # It would trace the block once more, with types that forget what varies over devices.
        check_constancy_invariants=False,
    )


class RopeAttention(nn.Module):
    """Self-attention over a square grid of tokens with rotary positions and one fused qkv."""

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, y, x, D]
        c = self.config
        b, rows, columns, width = x.shape
        dtype = jnp.dtype(c.compute_dtype)
        qkv = Linear(3 * width, dtype=dtype, train=self.train, name="qkv")(x)
        qkv = qkv.reshape(b, rows * columns, 3, c.vit_heads, width // c.vit_heads)
        q, k, v = (qkv[:, :, i] for i in range(3))  # [B, N, H, K]
        cos, sin = rope_table(rows, width // c.vit_heads, c.window_size / rows)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        y = attention(q, k, v, backend=self.backend, fused=c.fused_attention)
        y = y.reshape(b, rows, columns, width)
        return Linear(width, dtype=dtype, train=self.train, name="proj")(y)


class ViTMlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    hidden: int
    config: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        y = gelu(Linear(self.hidden, dtype=dtype, train=self.train, name="fc1")(x))
        return Linear(x.shape[-1], dtype=dtype, train=self.train, name="fc2")(y)


class Block(nn.Module):
    """Pre-norm attention and MLP; windowed where `window` > 0. Scanned: returns (x, None)."""

    config: ModelConfig
    window: int
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)

        def drop(y):
            random = self.train and c.drop_path > 0
            return drop_path(y, drop_rate, self.make_rng("dropout") if random else None)

        y = layer_norm(dtype, c.vit_norm_eps, name="norm1")(x)
        attend = RopeAttention(c, self.train, self.backend, name="attn")
        if self.window:
            y = _from_windows(attend(_to_windows(y, self.window)), x.shape)
        else:
            y = attend(y)
        x = x + drop(y)
        y = layer_norm(dtype, c.vit_norm_eps, name="norm2")(x)
        y = ViTMlp(int(c.vit_dim * c.vit_mlp_ratio), c, self.train, name="mlp")(y)
        return x + drop(y), None


class Stage(nn.Module):
    """Windowed blocks, then one global block."""

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, drop_rates: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        block = remat(Block, c.remat, prevent_cse=False)
        if c.vit_stage_blocks > 1:
            windows = stack(block, c.vit_stage_blocks - 1)
            windows = windows(c, c.window_size, self.train, self.backend, name="windows")
            x, _ = windows(x, drop_rates[:-1])
        return block(c, 0, self.train, self.backend, name="last")(x, drop_rates[-1])


class ViT(nn.Module):
    """Normalised pictures [I, Y, X, 3] -> patch features [I, Y/patch, X/patch, D]."""

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        i, rows, columns, _ = images.shape
        p = c.patch_size
        patches = images.reshape(i, rows // p, p, columns // p, p, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(i, rows // p, columns // p, p * p * 3)
        x = Linear(c.vit_dim, use_bias=False, dtype=dtype, name="patch_embed")(patches)

        # Absolute positions of the pretraining grid, tiled; position 0 is the class token's, unused.
        edge = c.pretrain_image_size // p
        table = self.param(
            "pos_embed", nn.initializers.truncated_normal(0.02), (1, edge * edge + 1, c.vit_dim)
        )
        table = table[0, 1:].reshape(edge, edge, c.vit_dim)
        tiles = -(-x.shape[1] // edge), -(-x.shape[2] // edge), 1
        x = x + jnp.tile(table, tiles)[: x.shape[1], : x.shape[2]].astype(dtype)
        x = layer_norm(dtype, c.vit_norm_eps, name="ln_pre")(x)

        depth = c.vit_stages * c.vit_stage_blocks
        rates = jnp.linspace(0.0, c.drop_path, depth).reshape(c.vit_stages, c.vit_stage_blocks)
        stages = stack(Stage, c.vit_stages)(c, self.train, self.backend, name="stages")
        x, _ = stages(x, rates)
        return x


def _to_windows(x: jax.Array, window: int) -> jax.Array:
    """[I, y, x, D] -> [I * windows, window, window, D]."""
    i, rows, columns, d = x.shape
    x = x.reshape(i, rows // window, window, columns // window, window, d)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window, window, d)


def _from_windows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `_to_windows`; `shape` is [I, y, x, D]."""
    i, rows, columns, d = shape
    window = x.shape[1]
    x = x.reshape(i, rows // window, columns // window, window, window, d)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(shape)
