"""The SAM 3 image detector: pictures and prompts in, scores, boxes and masks out (sam3.model.sam3_image)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3jax.config import ModelConfig
from sam3jax.model.decoder import Decoder
from sam3jax.model.fusion_encoder import FusionEncoder
from sam3jax.model.geometry_encoder import GeometryEncoder
from sam3jax.model.layers import Linear, Mlp
from sam3jax.model.neck import Neck
from sam3jax.model.positions import sine_grid
from sam3jax.model.segmentation_head import SegmentationHead
from sam3jax.model.text_encoder import TextEncoder
from sam3jax.model.vit import ViT
from sam3jax.types import Array, Detections, ImageFeatures, Outputs, Prompts, TextFeatures

PIXEL_MEAN, PIXEL_STD = 0.5, 0.5
LOGIT_CLAMP = 12.0


def normalised(images: jax.Array) -> jax.Array:
    """uint8 pictures as the trunk wants them, -1..1; float ones are so already."""
    if images.dtype == jnp.uint8:
        return (images.astype(jnp.float32) / 255.0 - PIXEL_MEAN) / PIXEL_STD
    return images


def reader_of(images: Array) -> str:
    """The method that reads them: what the trunk made of pictures (`cache_trunk`) has more channels than three."""
    return "encode_image" if images.shape[-1] == 3 else "from_trunk"


class DotProductScoring(nn.Module):
    """Class logit of a query: its dot product with the mean-pooled prompt, clamped to +-12.

    queries [L, B, Q', D]; prompt [B, S, D] with prompt_valid [B, S] -> [L, B, Q'] float32.
    """

    config: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(self, queries: jax.Array, prompt: jax.Array, prompt_valid: jax.Array) -> jax.Array:
        c = self.config
        widths = (c.ffn, c.dim)
        prompt = Mlp(widths, True, True, c.dropout, train=self.train, name="prompt_mlp")(prompt)
        valid = prompt_valid[..., None].astype(jnp.float32)
        pooled = (prompt * valid).sum(1) / jnp.maximum(valid.sum(1), 1.0)
        pooled = Linear(c.dim, train=self.train, name="prompt_proj")(pooled)  # [B, D]
        queries = Linear(c.dim, train=self.train, name="hs_proj")(queries)
        scores = jnp.einsum("lbqd,bd->lbq", queries, pooled) * c.dim**-0.5
        return jnp.clip(scores, -LOGIT_CLAMP, LOGIT_CLAMP)


class Sam3(nn.Module):
    """The detector. Use through `init` and `apply`; `train` adds one-to-many queries and dropout.

    backend: the platform it is compiled for (`cpu`, `gpu`, `tpu`), which decides how attention is
    computed; None: jax's default backend.

    >>> model = Sam3(ModelConfig(preset="tiny"))                              # doctest: +SKIP
    >>> variables = model.init(key, images, tokens, prompts)                  # doctest: +SKIP
    >>> outputs = model.apply(variables, images, tokens, prompts)             # doctest: +SKIP

    Parts may be run alone, so that a picture is encoded once for many phrases and a phrase once for
    many pictures: `apply(variables, images, method="encode_image")` and so on.
    """

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    def setup(self) -> None:
        c, train, backend = self.config, self.train, self.backend
        self.vit = ViT(c, train, backend)
        self.neck = Neck(c)
        self.text_encoder = TextEncoder(c, train, backend)
        self.geometry_encoder = GeometryEncoder(c, train, backend)
        self.fusion_encoder = FusionEncoder(c, train, backend)
        self.decoder = Decoder(c, train, backend)
        self.scoring = DotProductScoring(c, train)
        self.segmentation_head = SegmentationHead(c, train, backend)

    def __call__(self, images: jax.Array, tokens: jax.Array, prompts: Prompts) -> Outputs:
        """images [I, Y, X, 3] uint8 (or float, already normalised); tokens [V, N] -> Outputs."""
        return self.detect(self.encode_image(images), self.encode_text(tokens), prompts)

    def encode_image(self, images: jax.Array) -> ImageFeatures:
        """images [I, Y, X, 3] uint8 (or float, already normalised to mean 0) -> ImageFeatures."""
        return self.from_trunk(self.encode_trunk(images))

    def encode_trunk(self, images: jax.Array) -> jax.Array:
        """images as for `encode_image` -> the trunk's features [I, y, x, D]."""
        return self.vit(normalised(images))

    def from_trunk(self, features: jax.Array) -> ImageFeatures:
        """Features [I, y, x, D] of `encode_trunk` -> ImageFeatures."""
        return ImageFeatures(self.neck(features))

    def encode_text(self, tokens: jax.Array) -> TextFeatures:
        """tokens [V, N] int32 -> TextFeatures [V, N, D]."""
        return self.text_encoder(tokens)

    def detect(self, image: ImageFeatures, text: TextFeatures, prompts: Prompts) -> Outputs:
        """Ask every prompt of every picture. B = I * P pairs, pair b = picture b // P."""
        c = self.config
        i, p = prompts.text_id.shape
        levels = tuple(jnp.repeat(level, p, 0) for level in image.levels)  # [B, *, *, D]
        finest = levels[-1]
        b, rows, columns, d = finest.shape
        position = sine_grid(rows, columns, d).reshape(rows * columns, d)

        text_id = prompts.text_id.reshape(i * p)
        boxes, labels, box_valid = (
            jnp.asarray(x).reshape(i * p, *x.shape[2:])
            for x in (prompts.boxes, prompts.box_labels, prompts.box_valid)
        )
        geometry, geometry_valid = self.geometry_encoder(boxes, labels, box_valid, finest, position)
        prompt = jnp.concatenate([text.features[text_id], geometry], 1)  # [B, S, D]
        valid = jnp.concatenate([text.valid[text_id], geometry_valid], 1)

        memory = self.fusion_encoder(finest.reshape(b, rows * columns, d), position, prompt, valid)
        memory = memory.reshape(finest.shape)
        decoded = self.decoder(memory, position, prompt, valid)
        logits = self.scoring(decoded.queries, prompt, valid)
        embed, pixels, semantic = self.segmentation_head(
            memory, levels, decoded.queries[-1], prompt, valid
        )

        def group(part: slice) -> Detections:
            return Detections(logits[:, :, part], decoded.boxes[:, :, part], embed[:, part])

        return Outputs(
            o2o=group(slice(0, c.queries)),
            o2m=group(slice(c.queries, None)) if self.train else None,
            presence_logits=decoded.presence_logits,
            pixel_embed=pixels,
            semantic_logits=semantic,
        )
