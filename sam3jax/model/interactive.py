"""SAM 3's interactive path on still pictures: trunk, second neck, prompt encoder, mask decoder.

Answers to sam3.model.sam1_task_predictor and the heads of sam3.model.sam3_tracker_base. The trunk
is the detector's: both modules read `params["vit"]` of one tree.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3jax.config import ModelConfig
from sam3jax.model.mask_decoder import MaskDecoder
from sam3jax.model.prompt_encoder import PADDING, PromptEncoder
from sam3jax.model.sam3 import normalised
from sam3jax.model.tracker_neck import TrackerNeck
from sam3jax.model.vit import ViT
from sam3jax.types import ClickFeatures, PromptedMasks

# Parts of the table of names (sam3jax.weights.names) -> roots of the parameter tree.
ROOTS = {
    "second_neck": ("tracker_neck",),
    "interactive": ("mask_decoder", "no_mem_embed", "prompt_encoder"),
}


class Interactive(nn.Module):
    """Masks from clicks, boxes and masks. Any number of objects on any number of pictures.

    >>> model = Interactive(ModelConfig(preset="tiny"))                       # doctest: +SKIP
    >>> features = model.apply(variables, images, method="encode_image")      # doctest: +SKIP
    >>> answer = model.apply(variables, features, picture, points, labels, method="decode")  # doctest: +SKIP
    """

    config: ModelConfig
    train: bool = False
    backend: str | None = None

    def setup(self) -> None:
        c, train = self.config, self.train
        if c.dim % (2 * c.mask_decoder_heads):
            raise ValueError(
                f"half of dim {c.dim} does not divide among mask_decoder_heads "
                f"{c.mask_decoder_heads}: the mask decoder attends to pictures at half width"
            )
        self.vit = ViT(c, train, self.backend)
        self.tracker_neck = TrackerNeck(c)
        self.prompt_encoder = PromptEncoder(c)
        self.mask_decoder = MaskDecoder(c, train, self.backend)
        self.no_mem_embed = self.param("no_mem_embed", nn.initializers.normal(0.02), (1, 1, c.dim))

    def __call__(
        self, images: jax.Array, picture: jax.Array, points: jax.Array, labels: jax.Array, masks: jax.Array | None = None,
        has_mask: jax.Array | None = None,
    ) -> PromptedMasks:  # fmt: skip
        """images [I, Y, X, 3] and the prompts of `decode` -> PromptedMasks."""
        return self.decode(self.encode_image(images), picture, points, labels, masks, has_mask)

    def encode_image(self, images: jax.Array) -> ClickFeatures:
        """images [I, Y, X, 3] uint8 (or float, already normalised) -> ClickFeatures, once per picture."""
        return self.from_trunk(self.vit(normalised(images)))

    def from_trunk(self, trunk: jax.Array) -> ClickFeatures:
        """Features [I, g, g, D] of `Sam3.encode_trunk` -> ClickFeatures."""
        found = self.mask_decoder.project(self.tracker_neck(trunk))
        # A still picture has no memory: instead of attending to one, this vector is added.
        empty = self.no_mem_embed.reshape(-1).astype(found.coarse.dtype)
        return found.replace(coarse=found.coarse + empty)

    def decode(
        self,
        features: ClickFeatures,
        picture: jax.Array,  # [B]
        points: jax.Array,  # [B, A, 2]
        labels: jax.Array,  # [B, A]
        masks: jax.Array | None = None,  # [B, 4g, 4g]
        has_mask: jax.Array | None = None,  # [B]
    ) -> PromptedMasks:
        """One row an object: its picture, its points (see PromptEncoder), a mask's logits or none.

        Rows do not see each other: an answer is the same alone and in any batch.
        """
        tokens, valid, dense = self.prompt_encoder(points, labels, masks, has_mask)
        positions = self.prompt_encoder.grid_positions()
        return self.mask_decoder(features, picture, tokens, valid, dense, positions)


def with_padding_token(points: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Points and labels with one published padding token behind: sam3's predictors add it always."""
    points = jnp.pad(points, ((0, 0), (0, 1), (0, 0)))
    return points, jnp.pad(labels, ((0, 0), (0, 1)), constant_values=PADDING)
