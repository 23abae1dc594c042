"""Masks of prompted objects: a transformer between tokens and picture, and its heads.

Answers to sam3.sam.mask_decoder and sam3.sam.transformer.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3jax.config import ModelConfig
from sam3jax.model.attention import MultiHeadAttention
from sam3jax.model.layers import Conv, Linear, Mlp, Upsample2x, gelu, layer_norm
from sam3jax.model.prompt_encoder import LAYER_NORM_2D_EPS
from sam3jax.types import ClickFeatures, PromptedMasks

DEPTH = 2
MASKS = 4  # mask 0 answers a clear prompt; masks 1 to 3 answer one that may mean several things
# A single mask is trusted in evaluation where moving its threshold by this much changes little.
STABILITY_DELTA, STABILITY_THRESHOLD = 0.05, 0.98


class MaskDecoder(nn.Module):
    """Prompt tokens and features of their pictures -> four masks a row with IoU and object score."""

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    def setup(self) -> None:
        c, d, train = self.config, self.config.dim, self.train
        dtype = jnp.dtype(c.compute_dtype)
        wide = nn.initializers.normal(1.0)
        self.obj_score_token = self.param("obj_score_token", wide, (1, d))
        self.iou_token = self.param("iou_token", wide, (1, d))
        self.mask_tokens = self.param("mask_tokens", wide, (MASKS, d))
        self.conv_s0 = Conv(d // 8, 1, dtype=dtype)
        self.conv_s1 = Conv(d // 4, 1, dtype=dtype)
        self.transformer = TwoWayTransformer(c, train, self.backend)
        self.output_upscaling_0 = Upsample2x(d // 4, dtype)
        self.output_upscaling_1 = layer_norm(dtype, LAYER_NORM_2D_EPS)
        self.output_upscaling_3 = Upsample2x(d // 8, dtype)
        # The four networks lie in one array each, as layers of a stack do.
        one_per_mask = nn.vmap(
            Mlp,
            in_axes=1,
            out_axes=1,
            axis_size=MASKS,
            variable_axes={"params": 0, "lora": 0, "lora_scale": 0},
            split_rngs={"params": True, "dropout": True},
        )
        self.output_hypernetworks_mlps = one_per_mask((d, d, d // 8), train=train)
        hidden = c.mask_decoder_iou_hidden
        self.iou_prediction_head = Mlp((hidden, hidden, MASKS), train=train)
        self.pred_obj_score_head = Mlp((d, d, 1), train=train)

    def project(self, levels: tuple[jax.Array, ...]) -> ClickFeatures:
        """The pyramid of the second neck as this decoder reads it; once per picture."""
        fine, middle, coarse = levels
        return ClickFeatures(self.conv_s0(fine), self.conv_s1(middle), coarse)

    def __call__(
        self,
        features: ClickFeatures,
        picture: jax.Array,  # [B]
        tokens: jax.Array,  # [B, A, D]
        valid: jax.Array,  # [B, A]
        dense: jax.Array,  # [B or 1, g or 1, g or 1, D]
        positions: jax.Array,  # [g, g, D]
    ) -> PromptedMasks:
        """Row b is an object of picture `picture[b]`; tokens that are not `valid` change nothing."""
        dtype = jnp.dtype(self.config.compute_dtype)
        b = len(picture)
        own = jnp.concatenate([self.obj_score_token, self.iou_token, self.mask_tokens])
        tokens = jnp.concatenate([jnp.broadcast_to(own, (b, *own.shape)), tokens], 1)
        valid = jnp.concatenate([jnp.ones((b, len(own)), bool), valid], 1)

        coarse = features.coarse[picture] + dense.astype(features.coarse.dtype)  # [B, g, g, D]
        _, rows, columns, d = coarse.shape
        tokens, image = self.transformer(
            tokens, valid, coarse.reshape(b, rows * columns, d), positions.reshape(-1, d)
        )
        pixels = self.output_upscaling_0(image.reshape(coarse.shape)) + features.middle[picture]
        pixels = gelu(self.output_upscaling_1(pixels))
        pixels = gelu(self.output_upscaling_3(pixels) + features.fine[picture])  # [B, 4g, 4g, D/8]

        mask_tokens = tokens[:, 2 : 2 + MASKS].astype(jnp.float32)
        weights = self.output_hypernetworks_mlps(mask_tokens)  # [B, 4, D/8]
        # The few masks are transposed, not the many channels of the pixels.
        masks = jnp.einsum(
            "byxd,bmd->byxm", pixels, weights.astype(dtype), preferred_element_type=jnp.float32
        ).transpose(0, 3, 1, 2)
        ious = jax.nn.sigmoid(self.iou_prediction_head(tokens[:, 1].astype(jnp.float32)))
        score = self.pred_obj_score_head(tokens[:, 0].astype(jnp.float32))[:, 0]
        return PromptedMasks(masks, ious, mask_tokens, score)


class TwoWayTransformer(nn.Module):
    """Tokens and picture read each other, `DEPTH` times.

    tokens [B, N, D] with valid [B, N]; image [B, S, D] with positions [S, D] -> both, changed.
    The tokens' first values are also their positions.
    """

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(
        self, tokens: jax.Array, valid: jax.Array, image: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        tokens, image, positions = (x.astype(dtype) for x in (tokens, image, positions))
        start, mask = tokens, valid[:, None, None]
        for i in range(DEPTH):
            block = TwoWayBlock(
                c, first=i == 0, train=self.train, backend=self.backend, name=f"layers_{i}"
            )
            tokens, image = block(tokens, start, mask, image, positions)
        attend = MultiHeadAttention(
            c.mask_decoder_heads, dtype=dtype, train=self.train, inner=c.dim // 2,
            backend=self.backend, name="final_attn_token_to_image",
        )  # fmt: skip
        tokens = tokens + attend(tokens + start, image + positions, image)
        return layer_norm(dtype, name="norm_final_attn")(tokens), image


class TwoWayBlock(nn.Module):
    """Among tokens, tokens from picture, a small network, picture from tokens; norms behind each.

    The `first` block's self attention replaces the tokens: no positions and no residual.
    """

    config: ModelConfig
    first: bool
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,  # [B, N, D]
        start: jax.Array,  # [B, N, D]
        mask: jax.Array,  # [B, 1, 1, N]
        image: jax.Array,  # [B, S, D]
        positions: jax.Array,  # [S, D]
    ) -> tuple[jax.Array, jax.Array]:
        c, train = self.config, self.train
        dtype = jnp.dtype(c.compute_dtype)

        def attention(name: str, inner: int) -> MultiHeadAttention:
            return MultiHeadAttention(
                c.mask_decoder_heads,
                dtype=dtype,
                train=train,
                inner=inner,
                backend=self.backend,
                name=name,
            )

        attend = attention("self_attn", c.dim)
        if self.first:
            tokens = attend(tokens, tokens, tokens, mask=mask)
        else:
            at = tokens + start
            tokens = tokens + attend(at, at, tokens, mask=mask)
        tokens = layer_norm(dtype, name="norm1")(tokens)

        attend = attention("cross_attn_token_to_image", c.dim // 2)
        tokens = tokens + attend(tokens + start, image + positions, image)
        tokens = layer_norm(dtype, name="norm2")(tokens)

        x = Linear(c.mask_decoder_ffn, dtype=dtype, train=train, name="lin1")(tokens)
        tokens = tokens + Linear(c.dim, dtype=dtype, train=train, name="lin2")(nn.relu(x))
        tokens = layer_norm(dtype, name="norm3")(tokens)

        attend = attention("cross_attn_image_to_token", c.dim // 2)
        image = image + attend(image + positions, tokens + start, tokens, mask=mask)
        return tokens, layer_norm(dtype, name="norm4")(image)


def choose(answer: PromptedMasks, multimask: bool, *, train: bool) -> tuple[jax.Array, jax.Array]:
    """The masks [B, M, Y', X'] and IoUs [B, M] to return: three of an unclear prompt, else one.

    The one mask is mask 0. In evaluation, where it is not stable, it is the one of masks 1 to 3 with
    the highest predicted IoU; its token, which tracking keeps, stays token 0.
    """
    if multimask:
        return answer.masks[:, 1:], answer.ious[:, 1:]
    single = answer.masks[:, :1], answer.ious[:, :1]
    if train:
        return single
    best = 1 + jnp.argmax(answer.ious[:, 1:], 1)
    others = [jnp.take_along_axis(x, best.reshape(-1, *[1] * (x.ndim - 1)), 1)
              for x in (answer.masks, answer.ious)]  # fmt: skip
    stable = stability(single[0], STABILITY_DELTA) >= STABILITY_THRESHOLD  # [B, 1]
    masks = jnp.where(stable[..., None, None], single[0], others[0])
    return masks, jnp.where(stable, single[1], others[1])


def stability(masks: jax.Array, delta: float) -> jax.Array:
    """IoU of a mask with itself at thresholds +-delta; 1 where both are empty. [..., Y, X] -> [...]."""
    inner, outer = ((masks > t).sum((-2, -1)) for t in (delta, -delta))
    return jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0)
