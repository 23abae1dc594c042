"""Random batches and small models for tests that need no torch."""

from __future__ import annotations

import functools

import jax
import numpy as np

from sam3jax.config import Config, ModelConfig, parse_config
from sam3jax.model.init import init_params
from sam3jax.types import Batch, Prompts, Targets
from sam3jax.weights.lora import init_lora
from sam3jax.weights.names import DEFAULT_PARTS
from sam3jax.weights.trainable import split

SMALL_MODEL = dict(
    preset="tiny", image_size=84, pretrain_image_size=42, window_size=3, vit_dim=32, vit_stages=2,
    vit_stage_blocks=2, vit_heads=2, text_dim=16, text_layers=1, text_heads=2, vocab_size=600,
    text_length=16, dim=32, ffn=48, heads=4, fusion_layers=1, decoder_layers=2, geometry_layers=1,
    queries=9, remat=False,
)  # fmt: skip


DECODER = ("transformer.decoder.layers.*",)


def small_config(**changes) -> Config:
    """A run on a model that compiles in seconds; sections may be given as dicts."""
    model = {**SMALL_MODEL, **changes.pop("model", {})}
    # Adapters on the decoder alone: the backward pass of the rest need not be compiled.
    lora = {"rank": 3, "alpha": 6.0, "targets": DECODER, **changes.pop("lora", {})}
    return parse_config({"model": model, "lora": lora, "batch_size": 8, **changes})


def random_batch(config: Config, seed: int, counts: np.ndarray, exemplars: int = 1) -> Batch:
    """counts [I, P]: targets of each prompt; boxes and rectangular masks drawn from the seed."""
    rng = np.random.default_rng(seed)
    c = config.model
    i, p = counts.shape
    t = max(int(counts.max()), 1)
    m = int(counts.sum(1).max()) + 1
    boxes = np.zeros((i, m, 4), np.float32)
    boxes[:, :-1] = np.concatenate(
        [rng.uniform(0.3, 0.7, (i, m - 1, 2)), rng.uniform(0.1, 0.5, (i, m - 1, 2))], -1
    )
    grid = (np.arange(c.image_size) + 0.5) / c.image_size
    y = np.abs(grid - boxes[..., 1:2]) <= boxes[..., 3:4] / 2
    x = np.abs(grid - boxes[..., 0:1]) <= boxes[..., 2:3] / 2
    index = np.full((i, p, t), m, np.int32)
    for row in range(i):
        start = 0
        for column in range(p):
            n = counts[row, column]
            index[row, column, :n] = np.arange(start, start + n)
            start += n
    v = 5
    tokens = np.zeros((v, c.text_length), np.int32)
    tokens[:, :4] = rng.integers(1, c.vocab_size, (v, 4))
    g = exemplars
    return Batch(
        images=rng.integers(0, 256, (i, c.image_size, c.image_size, 3), np.uint8),
        tokens=tokens,
        prompts=Prompts(
            text_id=rng.integers(0, v, (i, p)).astype(np.int32),
            valid=np.ones((i, p), bool),
            boxes=rng.uniform(0.3, 0.6, (i, p, g, 4)).astype(np.float32),
            box_labels=rng.integers(0, 2, (i, p, g)).astype(np.int32),
            box_valid=rng.integers(0, 2, (i, p, g)).astype(bool),
        ),
        targets=Targets(
            boxes=boxes,
            masks=np.packbits(y[..., :, None] & x[..., None, :], -1),
            mask_valid=boxes[..., 2] > 0,
            index=index,
            num_targets=counts.astype(np.int32),
            is_exhaustive=np.ones((i, p), bool),
        ),
        image_valid=np.ones(i, bool),
        image_id=np.arange(i, dtype=np.int32),
    )


@functools.cache
def small_params(model: ModelConfig, seed: int = 0, parts=DEFAULT_PARTS):
    """Parameters of a model with nothing left at zero. parts: of the table of names."""
    rng = np.random.default_rng(seed)
    noise = lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32)
    return jax.tree.map(noise, init_params(model, seed, parts))


def small_split(config: Config):
    """(trainable, frozen) of the run, adapters moved off zero."""
    lora, scale = {}, {}
    if config.lora.enabled and config.train == "lora":
        key = jax.random.key(5)
        lora, scale = init_lora(key, small_params(config.model), config.model, config.lora)
        lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape), lora)
    return split(small_params(config.model), lora, scale, config)
