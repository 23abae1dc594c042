"""What rounds of clicks cost at full size, in operations: nothing is compiled, nothing is run.

    python -m scripts.cost_clicks --objects 8 --rounds 8

One picture of 1008 px on the published sizes. Counted are matrix products and convolutions, forward and
backward, recomputation included: of the trunk with a gradient for its weights, and of one step of
`task: clicks` less that trunk.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from sam3jax.config import ClicksConfig, ModelConfig
from sam3jax.model import Interactive
from sam3jax.tasks.click_training import training_rounds
from sam3jax.training.plan import flops
from sam3jax.types import ClickBatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument(
        "--rounds", type=int, default=8, help="of an object, the first one included"
    )
    parser.add_argument("--preset", default=None, choices=("tiny",), help="default: as published")
    options = parser.parse_args()
    quiet = {"dropout": 0.0, "drop_path": 0.0}
    config = ModelConfig(preset=options.preset, **quiet) if options.preset else ModelConfig(**quiet)
    model = Interactive(config, train=True, backend="cpu")
    batch = batch_of(config.image_size, options.objects)
    shapes = jax.eval_shape(lambda: _variables(model, config))
    trunk = lambda v: model.apply(v, batch.images, method="encode_image").coarse.sum()
    whole = _flops(jax.value_and_grad(trunk), shapes)
    print(f"trunk and neck, forward and backward   {whole / 1e12:7.3f} TFLOP")
    for resolution in ("target", "prediction"):
        clicks = ClicksConfig(
            objects=options.objects, rounds=options.rounds - 2, mask_only_round=True, mask_resolution=resolution
        )  # fmt: skip

        def loss(v: Any, clicks: ClicksConfig = clicks) -> jax.Array:
            return (
                training_rounds(model, v, batch, jax.random.key(0), clicks)[0].total(clicks).sum()
            )

        step = _flops(jax.value_and_grad(loss), shapes)
        more = step - whole
        print(
            f"rounds, masks compared at {resolution:<12} {more / 1e12:7.3f} TFLOP   {more / whole:6.1%}"
        )


def batch_of(size: int, objects: int) -> ClickBatch:
    """One picture's batch, empty."""
    return ClickBatch(
        images=jnp.zeros((1, size, size, 3), jnp.uint8),
        masks=jnp.zeros((1, objects, size, -(-size // 8)), jnp.uint8),
        valid=jnp.ones((1, objects), bool),
        points=jnp.zeros((1, objects, 0, 2)),
        labels=jnp.zeros((1, objects, 0), jnp.int32),
        image_valid=jnp.ones(1, bool),
        image_id=jnp.zeros(1, jnp.int32),
        luck=jnp.zeros(1, jnp.uint32),
    )


def _variables(model: Interactive, config: ModelConfig) -> Any:
    image = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.uint8)
    points, labels = jnp.zeros((1, 1, 2)), jnp.ones((1, 1), jnp.int32)
    edge = 4 * config.grid
    mask, has = jnp.zeros((1, edge, edge)), jnp.ones(1, bool)
    return model.init(jax.random.key(0), image, jnp.zeros(1, jnp.int32), points, labels, mask, has)


def _flops(function: Any, *arguments: Any) -> float:
    return flops(jax.make_jaxpr(function)(*arguments).jaxpr)


if __name__ == "__main__":
    main()
