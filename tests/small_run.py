"""A run in memory whose model is small enough to compile in seconds; weights are random."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from sam3jax.config import Config
from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer
from sam3jax.model import Sam3
from sam3jax.types import Prompts
from sam3jax.weights.run_folder import Run

SIZES = dict(
    preset="tiny", image_size=42, pretrain_image_size=42, window_size=3, patch_size=14, vit_dim=32,
    vit_stages=1, vit_stage_blocks=2, vit_heads=2, text_dim=32, text_layers=1, text_heads=2, dim=32,
    ffn=32, heads=4, fusion_layers=1, decoder_layers=1, geometry_layers=1, queries=7,
)  # fmt: skip


def small_run(path: Path, seed: int = 0, **sections) -> Run:
    config = Config(model=SIZES, **sections)
    model = Sam3(config.model)
    prompts = Prompts(
        text_id=np.zeros((1, 1), np.int32),
        valid=np.ones((1, 1), bool),
        boxes=np.zeros((1, 1, 1, 4), np.float32),
        box_labels=np.zeros((1, 1, 1), np.int32),
        box_valid=np.zeros((1, 1, 1), bool),
    )
    size, length = config.model.image_size, config.model.text_length
    inputs = np.zeros((1, size, size, 3), np.uint8), np.zeros((1, length), np.int32), prompts
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)

    def filled(seed: int):
        # Drawn leaf by leaf: nothing at a neutral start, and nothing to compile.
        rng = np.random.default_rng(seed)
        draw = lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype)
        return jax.tree.map(draw, shapes)

    tokenizer = Tokenizer(build_byte_tokenizer(config.model.vocab_size), length)
    tuned, base = filled(seed), filled(seed + 1)
    return Run(path, config, model, tuned, base, tokenizer, 3, {}, tuned["params"], "noise")
