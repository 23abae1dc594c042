"""The decoder: queries, presence token, boxes refined layer by layer (sam3.model.decoder).

Layers are a Python loop, not a scan: the heads that refine boxes between layers are shared, while
the layers' own parameters are not; six small layers cost little to compile.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from sam3jax.boxes import cxcywh_to_xyxy
from sam3jax.config import ModelConfig
from sam3jax.model.attention import MultiHeadAttention, remat
from sam3jax.model.layers import Linear, Mlp, layer_norm
from sam3jax.model.positions import log_deltas, sine_boxes

PRESENCE_CLAMP = 10.0


def inverse_sigmoid(x: jax.Array, eps: float = 1e-3) -> jax.Array:
    """log(x / (1 - x)) with both parts at least `eps`."""
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.log(jnp.maximum(x, eps)) - jnp.log(jnp.maximum(1.0 - x, eps))


@struct.dataclass
class DecoderOutputs:
    """queries [L, B, Q', D] normed; boxes [L, B, Q', 4]; presence_logits [L, B]; Q' = Q or 2 Q."""

    queries: jax.Array
    boxes: jax.Array
    presence_logits: jax.Array


class DecoderLayer(nn.Module):
    """Post-norm: self-attention, text cross-attention, image cross-attention, MLP.

    x [B, 1 + Q', D] starts with the presence token. Self-attention sees the first 1 + Q tokens
    only: one-to-many queries (the second Q in training) skip it (DAC).
    """

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # [B, 1 + Q', D]
        query_pos: jax.Array,  # [B, 1 + Q', D]
        memory: jax.Array,  # [B, N, D]
        memory_pos: jax.Array,  # [N, D]
        bias: jax.Array,  # [B, H, 1 + Q', N]
        prompt: jax.Array,  # [B, S, D]
        prompt_valid: jax.Array,  # [B, S]
    ) -> jax.Array:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)

        def drop(y):
            return nn.Dropout(c.dropout, deterministic=not self.train)(y)

        def attend(name):
            return MultiHeadAttention(
                c.heads, c.dropout, dtype, self.train, self.backend, name=name
            )

        own = x[:, : 1 + c.queries]
        qk = own + query_pos[:, : 1 + c.queries]
        own = own + drop(attend("self_attn")(qk, qk, own))
        x = jnp.concatenate([own, x[:, 1 + c.queries :]], 1)
        x = layer_norm(dtype, name="norm2")(x)

        seen = prompt_valid[:, None, None]
        x = x + drop(attend("ca_text")(x + query_pos, prompt, prompt, mask=seen))
        x = layer_norm(dtype, name="catext_norm")(x)

        keys = memory + memory_pos.astype(dtype)
        x = x + drop(attend("cross_attn")(x + query_pos, keys, memory, bias=bias))
        x = layer_norm(dtype, name="norm1")(x)

        y = drop(nn.relu(Linear(c.ffn, dtype=dtype, train=self.train, name="linear1")(x)))
        x = x + drop(Linear(c.dim, dtype=dtype, train=self.train, name="linear2")(y))
        return layer_norm(dtype, name="norm3")(x)


class Decoder(nn.Module):
    """Memory [B, y, x, D] with positions [y * x, D] and prompt [B, S, D] -> DecoderOutputs."""

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        normal = nn.initializers.normal

        def mlp(*widths, dtype=dtype):
            return Mlp(widths, dtype=dtype, train=self.train)

        self.query_embed = self.param("query_embed", normal(1.0), (c.queries, c.dim))
        self.reference_points = self.param("reference_points", normal(1.0), (c.queries, 4))
        self.presence_token = self.param("presence_token", normal(1.0), (1, c.dim))
        layer = remat(DecoderLayer, c.remat, prevent_cse=True)
        self.layers = [layer(c, self.train, self.backend) for _ in range(c.decoder_layers)]
        self.norm = layer_norm(dtype)
        # What becomes a box or a score is float32 to the end.
        self.bbox_embed = mlp(c.dim, c.dim, 4, dtype=jnp.float32)
        self.ref_point_head = mlp(c.dim, c.dim)
        self.boxRPB_embed_x = mlp(c.dim, c.heads)
        self.boxRPB_embed_y = mlp(c.dim, c.heads)
        self.presence_token_head = mlp(c.dim, c.dim, 1, dtype=jnp.float32)
        self.presence_token_out_norm = layer_norm(jnp.float32)

    def __call__(
        self, memory: jax.Array, position: jax.Array, prompt: jax.Array, prompt_valid: jax.Array
    ) -> DecoderOutputs:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        b, rows, columns, d = memory.shape
        repeats = 2 if self.train else 1  # one-to-many: the same queries once more

        def start(table, repeats):  # [*, D] -> [B, repeats * *, D]
            return jnp.broadcast_to(
                jnp.tile(table, (repeats, 1)), (b, repeats * len(table), table.shape[1])
            )

        x = jnp.concatenate([start(self.presence_token, 1), start(self.query_embed, repeats)], 1)
        x = x.astype(dtype)
        reference = jax.nn.sigmoid(start(self.reference_points, repeats))  # [B, Q', 4]
        flat = memory.reshape(b, rows * columns, d)
        queries, boxes, presence = [], [], []
        anchor = reference
        for layer in self.layers:
            query_pos = self.ref_point_head(sine_boxes(reference, d))  # [B, Q', D]
            query_pos = jnp.pad(query_pos, ((0, 0), (1, 0), (0, 0)))  # none for the presence token
            bias = self._position_bias(reference, rows)
            x = layer(x, query_pos, flat, position, bias, prompt, prompt_valid)

            normed = self.norm(x[:, 1:])
            delta = self.bbox_embed(normed)
            # The box of this layer is counted from the undetached reference of the one before, so
            # its loss also trains that layer's refinement; the refinement itself starts detached.
            boxes.append(jax.nn.sigmoid(inverse_sigmoid(anchor) + delta))
            anchor = jax.nn.sigmoid(inverse_sigmoid(reference) + delta)
            reference = jax.lax.stop_gradient(anchor)
            queries.append(normed)
            logit = self.presence_token_head(self.presence_token_out_norm(x[:, 0]))[:, 0]
            if c.clamp_presence:
                logit = jnp.clip(logit, -PRESENCE_CLAMP, PRESENCE_CLAMP)
            presence.append(logit)
        return DecoderOutputs(jnp.stack(queries), jnp.stack(boxes), jnp.stack(presence))

    def _position_bias(self, reference: jax.Array, cells: int) -> jax.Array:
        """Box-relative position bias [B, H, 1 + Q', y * x]; zero for the presence token."""
        dx, dy = log_deltas(cxcywh_to_xyxy(reference), cells)  # [B, Q', cells, 2]
        dx, dy = self.boxRPB_embed_x(dx), self.boxRPB_embed_y(dy)  # [B, Q', cells, H]
        bias = dy[:, :, :, None] + dx[:, :, None]  # [B, Q', y, x, H]
        bias = bias.reshape(*bias.shape[:2], cells * cells, -1).transpose(0, 3, 1, 2)
        return jnp.pad(bias, ((0, 0), (0, 0), (1, 0), (0, 0)))
