"""Temporary memory of the mask loss at full size, by how its masks are drawn. Nothing is executed.

    python -m scripts.bench_loss_memory [--prompts 1] [--time]

200 one-to-one and 200 one-to-many queries, 32 padded targets, so 32 + 4 * 32 pairs per prompt; masks of
288 x 288 compared at 1008 x 1008, float32; the compiler's own account of value and gradient with
respect to mask embeddings and pixel features (`memory_analysis`). The gradients themselves (85 MB a
prompt) are outputs and the same for all. `--time` also runs the packed variants with 3 + 12 real pairs.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from sam3jax.config import LossConfig
from sam3jax.losses.elementwise import dice, focal
from sam3jax.losses.masks import MaskPairs, mask_sums
from sam3jax.losses.resample import resize_bilinear

QUERIES, TARGETS, TOPK, DIM, LOW, HIGH = 400, 32, 4, 256, 288, 1008


def pairwise(logits: jax.Array, masks: jax.Array, pairs: MaskPairs) -> jax.Array:
    """Focal and dice of drawn masks [B, N, Y', X'], all at once."""
    b, n = pairs.query.shape
    logits = resize_bilinear(logits.reshape(b * n, LOW, LOW), (HIGH, HIGH))
    bits = jnp.take_along_axis(
        masks, pairs.instance.reshape(len(masks), -1)[..., None, None], axis=1
    )
    targets = jnp.unpackbits(bits.reshape(b * n, HIGH, -1), axis=-1).astype(jnp.float32)
    pixelwise = focal(logits, targets, alpha=0.25, gamma=2.0).mean((1, 2))
    both = jnp.stack([pixelwise, dice(logits, targets)])
    return jnp.where(pairs.keep.reshape(-1), both, 0.0).sum()


def all_masks(embed, pixels, masks, pairs):
    """As torch: every query's mask is drawn, then the matched ones are taken."""
    drawn = jnp.einsum("bqd,byxd->bqyx", embed, pixels)
    return pairwise(jnp.take_along_axis(drawn, pairs.query[..., None, None], axis=1), masks, pairs)


def padded_pairs(embed, pixels, masks, pairs):
    """Masks of matched queries only, every padded pair at once."""
    chosen = jnp.take_along_axis(embed, pairs.query[..., None], axis=1)
    return pairwise(jnp.einsum("bnd,byxd->bnyx", chosen, pixels), masks, pairs)


def packed(**options):
    config = LossConfig(**options)
    return lambda embed, pixels, masks, pairs: mask_sums(embed, pixels, masks, pairs, config).sum()


def shapes(prompts: int):
    n = TARGETS * (1 + TOPK)
    s = jax.ShapeDtypeStruct
    pairs = MaskPairs(*(s((prompts, n), jnp.int32) for _ in range(3)), s((prompts, n), bool), None)
    return (
        s((prompts, QUERIES, DIM), jnp.float32), s((prompts, LOW, LOW, DIM), jnp.float32),
        s((1, TARGETS, HIGH, HIGH // 8), jnp.uint8), pairs,
    )  # fmt: skip


def real_inputs(prompts: int, rng=None):
    rng = rng or np.random.default_rng(0)
    embed, pixels, masks, pairs = shapes(prompts)
    rank = np.tile(np.arange(TARGETS)[:, None], 1 + TOPK)
    keep = np.broadcast_to((rank < 3).reshape(-1), pairs.keep.shape)
    group = np.broadcast_to(
        (np.arange(1 + TOPK) > 0)[None].repeat(TARGETS, 0).reshape(-1), keep.shape
    )
    return (
        jnp.asarray(rng.normal(size=embed.shape), jnp.float32), jnp.asarray(rng.normal(size=pixels.shape), jnp.float32),
        jnp.asarray(rng.integers(0, 256, masks.shape), jnp.uint8),
        MaskPairs(
            jnp.asarray(rng.integers(0, QUERIES, keep.shape), jnp.int32), jnp.asarray(rng.integers(0, TARGETS, keep.shape), jnp.int32),
            jnp.asarray(group, jnp.int32), jnp.asarray(keep), None,
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--time", action="store_true", help="run the packed variants too")
    args = parser.parse_args()
    variants = {"all masks": all_masks, "padded pairs": padded_pairs}
    variants |= {f"packed, chunks of {c}": packed(mask_chunk=c) for c in (1, 4, 8, 16)}
    variants |= {"packed, 8, prediction's size": packed(mask_resolution="prediction")}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, prompts: {args.prompts}")
    print("| masks | temporaries, MB |" + (" 15 real pairs a prompt, ms |" if args.time else ""))
    print("|---|---|" + ("---|" if args.time else ""))
    for name, function in variants.items():
        program = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
        compiled = program.lower(*shapes(args.prompts)).compile()
        line = f"| {name} | {compiled.memory_analysis().temp_size_in_bytes / 1e6:,.0f} |"
        if args.time and name.startswith("packed"):
            inputs = real_inputs(args.prompts)
            jax.block_until_ready(compiled(*inputs))
            times = []
            for _ in range(5):
                start = time.perf_counter()
                jax.block_until_ready(compiled(*inputs))
                times.append(time.perf_counter() - start)
            line += f" {1e3 * min(times):,.0f} |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
