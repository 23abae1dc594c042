"""What rounds of clicks cost at full size: in operations, which are counted, or in time.

    python -m scripts.cost_clicks --objects 8 --rounds 8             nothing is compiled, nothing is run
    python -m scripts.cost_clicks --objects 8 --rounds 8 --time 3    so many times each, one after the other

One picture of 1008 px on the published sizes. Counted are matrix products and convolutions, forward and
backward, recomputation included: of the trunk with a gradient for its weights, and of one step of
`task: clicks` less that trunk.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3jax.config import ClicksConfig, ModelConfig
from sam3jax.model import Interactive
from sam3jax.model.init import init_params
from sam3jax.tasks.click_training import training_rounds
from sam3jax.training.plan import flops
from sam3jax.types import ClickBatch
from sam3jax.weights.scope import CLICKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument(
        "--rounds", type=int, default=8, help="of an object, the first one included"
    )
    parser.add_argument("--preset", default=None, choices=("tiny",), help="default: as published")
    parser.add_argument("--time", type=int, default=0, metavar="N", help="run each so often")
    options = parser.parse_args()
    quiet = {"dropout": 0.0, "drop_path": 0.0}
    config = ModelConfig(preset=options.preset, **quiet) if options.preset else ModelConfig(**quiet)
    model = Interactive(config, train=True, backend="cpu")
    batch = batch_of(config.image_size, options.objects)
    shapes = jax.eval_shape(lambda: _variables(model, config))

    def trunk(v: Any) -> jax.Array:
        features = model.apply(v, batch.images, method="encode_image")
        return sum(x.sum() for x in jax.tree.leaves(features))

    contestants = {"trunk and neck, forward and backward": trunk}
    for resolution in ("target", "prediction"):
        clicks = ClicksConfig(
            objects=options.objects, rounds=options.rounds - 2, mask_only_round=True, mask_resolution=resolution
        )  # fmt: skip

        def loss(v: Any, clicks: ClicksConfig = clicks) -> jax.Array:
            return (
                training_rounds(model, v, batch, jax.random.key(0), clicks)[0].total(clicks).sum()
            )

        contestants[f"rounds, masks compared at {resolution}"] = loss
    if options.time:
        costs, unit = _seconds(contestants, config, options.time), "s"
    else:
        counted = {name: _flops(jax.value_and_grad(f), shapes) for name, f in contestants.items()}
        costs, unit = {name: n / 1e12 for name, n in counted.items()}, "TFLOP"
    (first, whole), *rest = costs.items()
    print(f"{first:<40} {whole:8.3f} {unit}")
    for name, cost in rest:
        print(f"{name:<40} {cost - whole:8.3f} {unit} more   {(cost - whole) / whole:6.1%}")


def batch_of(size: int, objects: int) -> ClickBatch:
    """One picture's batch: discs on noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    centre = rng.uniform(0.2 * size, 0.8 * size, (2, objects, 1, 1))
    discs = np.hypot(x - centre[0], y - centre[1]) < size / 10
    return ClickBatch(
        images=jnp.asarray(rng.integers(0, 256, (1, size, size, 3), np.uint8)),
        masks=jnp.asarray(np.packbits(discs, -1)[None]),
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


def _seconds(contestants: Any, config: ModelConfig, repeats: int) -> dict[str, float]:
    """The shortest time of each, which take turns. Drawn weights, a gradient for all that is read."""
    params = jax.device_put(init_params(config, 0, CLICKS.parts))
    read = {
        "params": {k: v for k, v in params.items() if CLICKS.reads is None or k in CLICKS.reads}
    }
    del params
    steps = {
        name: jax.jit(jax.value_and_grad(f)).lower(read).compile()
        for name, f in contestants.items()
    }
    for name, step in steps.items():
        print(f"  {step.memory_analysis().temp_size_in_bytes / 1e9:8.2f} GB of temporaries  {name}")
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            begun = time.perf_counter()
            jax.block_until_ready(step(read))
            found[name].append(time.perf_counter() - begun)
            print(f"  {found[name][-1]:8.2f} s  {name}", flush=True)
    return {name: min(times) for name, times in found.items()}


def _flops(function: Any, *arguments: Any) -> float:
    return flops(jax.make_jaxpr(function)(*arguments).jaxpr)


if __name__ == "__main__":
    main()
