"""Compile a training step of clips and say what it needs, here or for an accelerator that is elsewhere.

    python -m scripts.clip_memory                                   # full size, 4 frames, this machine's CPU
    python -m scripts.clip_memory --target v5e:2x4 --frames 8       # needs `pip install libtpu`
    python -m scripts.clip_memory --target h100 --config card.txt   # needs the CUDA plugin; see below
    python -m scripts.clip_memory model.preset=tiny --frames 2

Nothing is trained and no weights are made: only shapes go through the compiler. For a GPU `--config` names
a GpuTargetConfig in text form (openxla/xla, xla/backends/gpu/target_config/specs). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sam3jax.config import load_config
from sam3jax.model.init import parameter_shapes
from sam3jax.tasks.clips import Clips
from sam3jax.training.mesh import make_mesh, micro_spec
from sam3jax.training.optim import build_optimizer
from sam3jax.training.rates import count, multipliers
from sam3jax.training.state import init_state
from sam3jax.training.step import make_train_step
from sam3jax.types import ClipBatch, Prompts, Targets, TextFeatures
from sam3jax.weights.trainable import compact, start, touches, without_text_tower


def devices_of(target: str, file: str | None) -> tuple[list[Any], str]:
    """(devices, platform) of `cpu`, of a TPU topology such as v5e:2x4, or of a card in `file`."""
    if target == "cpu":
        return jax.devices("cpu")[:1], "cpu"
    if file is not None:
        with open(file) as stream:
            found = topologies.get_topology_desc(
                platform="cuda", target_config=stream.read(), topology="1x1x1"
            )
        return list(found.devices), "gpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    found = topologies.get_topology_desc(platform="tpu", topology_name=target)
    return list(found.devices), "tpu"


def batch_shapes(config: Any, prompts: int, targets: int) -> ClipBatch:
    """Shapes of the batch of one update."""
    shape, model, i = jax.ShapeDtypeStruct, config.model, config.batch_size
    edge, m, number = model.image_size, targets * prompts, shape((i,), np.int32)
    return ClipBatch(
        images=shape((i, edge, edge, 3), np.uint8),
        tokens=shape((prompts, model.text_length), np.int32),
        prompts=Prompts(
            text_id=shape((i, prompts), np.int32), valid=shape((i, prompts), bool),
            boxes=shape((i, prompts, 0, 4), np.float32),
            box_labels=shape((i, prompts, 0), np.int32), box_valid=shape((i, prompts, 0), bool),
        ),
        targets=Targets(
            boxes=shape((i, m, 4), np.float32), masks=shape((i, m, edge, -(-edge // 8)), np.uint8),
            mask_valid=shape((i, m), bool), index=shape((i, prompts, targets), np.int32),
            num_targets=shape((i, prompts), np.int32), is_exhaustive=shape((i, prompts), bool),
        ),
        image_valid=shape((i,), bool), image_id=number, clip=number, frame=number, stage=number,
        object_id=shape((i, m), np.int32),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--config", help="GpuTargetConfig of the card, as text")
    parser.add_argument("--frames", type=int, default=4, help="of a clip; one clip a device")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--targets", type=int, default=3, help="of a prompt")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    devices, platform = devices_of(options.target, options.config)
    frames = options.frames * len(devices)
    config = load_config(
        None, ["task=clips", f"clips.frames={options.frames}", f"batch_size={frames}", *options.overrides]
    )  # fmt: skip
    mesh, model = make_mesh(devices), config.model
    trainable, frozen = start(parameter_shapes(model), config)  # adapters are made, they are small
    optimizer = build_optimizer(config, trainable, multipliers(trainable, frozen, config))
    batch, text = batch_shapes(config, options.prompts, options.targets), None
    if not touches(trainable, "text_encoder"):
        frozen = without_text_tower(frozen)
        words = (options.prompts, model.text_length)
        features = jax.ShapeDtypeStruct((*words, model.dim), model.compute_dtype)
        text = TextFeatures(features, jax.ShapeDtypeStruct(words, bool))
    frozen = jax.eval_shape(lambda tree: compact(tree, model, platform), frozen)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer, False), trainable)
    task = Clips(config, platform)
    spec = micro_spec(task.batch_spec)

    def placed(tree: Any, spec: P) -> Any:
        sharding = NamedSharding(mesh, spec)
        one = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(one, tree)

    def micro(spec: P, part: Any) -> Any:
        front = lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
        return placed(jax.tree.map(front, part) if spec else part, spec)

    parts = jax.tree.map(micro, spec, batch, is_leaf=lambda x: isinstance(x, P))
    step = make_train_step(task, optimizer, mesh, seed=0)
    begin = time.time()
    lowered = step.lower(placed(state, P()), placed(frozen, P()), placed(text, P()), parts)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    kinds = ("argument", "output", "alias", "temp")
    print(json.dumps({
        "target": options.target, "devices": len(devices), "frames": options.frames,
        "settings": options.overrides, "seconds": round(time.time() - begin, 1),
        "trained": count(trainable, multipliers(trainable, frozen, config)),
        **{f"{kind}_gb": getattr(memory, f"{kind}_size_in_bytes") / 1e9 for kind in kinds},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
