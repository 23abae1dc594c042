"""Small layers with torch's conventions: linear with LoRA, norms, MLP, convolutions, stochastic depth.

Parameters are float32; each layer casts them to `dtype` for the product and accumulates in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"  # what linear layers and convolutions return, for `remat`
TORCH_EPS = 1e-5  # torch's LayerNorm and GroupNorm; Linen's own default is 1e-6


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """torch's F.gelu, exact: x Phi(x), in float32.

    Not jax.nn.gelu(approximate=False): its erfc has no derivative under shard_map in jax 0.12.0.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    cdf = _normal_cdf(wide)
    slope = cdf + wide * jnp.exp(-0.5 * wide**2) * (2 * math.pi) ** -0.5
    return (wide * cdf).astype(x.dtype), slope.astype(x.dtype) * tangent


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] @ kernel [D, E] -> [..., E] in x's dtype, accumulated in float32."""
    y = jax.lax.dot_general(
        x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return y.astype(x.dtype)


class Linear(nn.Module):
    """y = x W + b, plus an adapter scale * drop(x) A B where the `lora` collection holds one here.

    Collections: `params` {kernel [D, E], bias [E]}; `lora` {a [D, R], b [R, E]}, see sam3jax.weights.lora;
    `lora_scale` {scale []}, alpha / rank, or 0 where a stacked layer is not adapted, and
    {dropout []} where the adapter's input is dropped out in training.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features)
        )
        x = x.astype(self.dtype)
        y = dot(x, kernel.astype(self.dtype))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        if self.has_variable("lora", "a"):
            y = y + self._adapter(x)
        return checkpoint_name(y, PRODUCT)

    def _adapter(self, x: jax.Array) -> jax.Array:
        a, b = (meta.unbox(self.get_variable("lora", name)) for name in ("a", "b"))
        if self.train and self.has_variable("lora_scale", "dropout"):
            # In float32: bfloat16 holds probabilities to 8 bits only, and 1 - .003 as 1.
            keep = 1.0 - self.get_variable("lora_scale", "dropout").astype(jnp.float32)
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
            x = jnp.where(kept, x.astype(jnp.float32) / keep, 0.0).astype(x.dtype)
        scale = self.get_variable("lora_scale", "scale").astype(self.dtype)
        return scale * dot(dot(x, a.astype(self.dtype)), b.astype(self.dtype))


def layer_norm(dtype: Any = jnp.float32, eps: float = TORCH_EPS, **kwargs: Any) -> nn.LayerNorm:
    """Torch's LayerNorm: eps 1e-5, two-pass variance in float32, result in `dtype`."""
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, dtype=dtype, **kwargs)


def group_norm(groups: int, dtype: Any = jnp.float32, **kwargs: Any) -> nn.GroupNorm:
    """Torch's GroupNorm: eps 1e-5, two-pass variance in float32, result in `dtype`."""
    return nn.GroupNorm(
        num_groups=groups, epsilon=TORCH_EPS, use_fast_variance=False, dtype=dtype, **kwargs
    )


class Mlp(nn.Module):
    """Linear layers with ReLU (and dropout) between; optional residual and output norm.

    Answers to sam3.model.model_misc.MLP.
    """

    widths: tuple[int, ...]
    residual: bool = False
    out_norm: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = x
        for i, width in enumerate(self.widths):
            x = Linear(width, dtype=self.dtype, train=self.train, name=f"layers_{i}")(x)
            if i + 1 < len(self.widths):
                x = nn.Dropout(self.dropout, deterministic=not self.train)(nn.relu(x))
        if self.residual:
            x = x + start.astype(x.dtype)
        return layer_norm(self.dtype, name="out_norm")(x) if self.out_norm else x


class Conv(nn.Module):
    """Convolution with stride 1 on [B, Y, X, D]; `padding` rows and columns of zeros all round."""

    features: int
    size: int
    padding: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = x.astype(self.dtype)
        if self.size == 1:
            y = dot(x, kernel[0, 0])
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), [(self.padding, self.padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )  # fmt: skip
        return checkpoint_name(y + bias.astype(self.dtype), PRODUCT)


class Upsample2x(nn.Module):
    """Transposed convolution, kernel 2, stride 2: [B, Y, X, D] -> [B, 2Y, 2X, E].

    Kernel windows do not overlap, so it is one matrix product and a reshape.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, y, xx, d = x.shape
        shape = (d, 2, 2, self.features)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=0)
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        out = dot(x.astype(self.dtype), kernel.reshape(d, -1))  # [B, Y, X, 4E]
        out = out.reshape(b, y, xx, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
        return out.reshape(b, 2 * y, 2 * xx, self.features) + bias.astype(self.dtype)


class Downsample2x(nn.Module):
    """Convolution, kernel 2, stride 2: [B, 2Y, 2X, D] -> [B, Y, X, E]; a reshape and one product."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, y, xx, d = x.shape
        shape = (2, 2, d, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = x.astype(self.dtype).reshape(b, y // 2, 2, xx // 2, 2, d).transpose(0, 1, 3, 2, 4, 5)
        x = dot(x.reshape(b, y // 2, xx // 2, 4 * d), kernel.reshape(4 * d, self.features))
        return x + bias.astype(self.dtype)


def drop_path(x: jax.Array, rate: jax.Array, key: jax.Array | None) -> jax.Array:
    """Drop the whole residual branch of a sample with probability `rate` (traced), else rescale it.

    x [B, ...]; key None: x unchanged. Stochastic depth, https://arxiv.org/abs/1603.09382.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x.astype(jnp.float32) / (1.0 - rate), 0.0).astype(x.dtype)


def zero_like(*arrays: jax.Array) -> jax.Array:
    """A float32 0 that varies over the mesh of shard_map as all of these do together."""
    zeros = (jnp.zeros_like(a.ravel()[0]).astype(jnp.float32) for a in arrays)
    return functools.reduce(jnp.add, zeros)
