"""What is not trained, in fewer bytes: the compute dtype, or eight bits (`base_dtype: int8`).

Weights only: products are computed as ever. A kernel of eight bits becomes a float where its layer reads
it (`model.stored`), so that no stack of floats ever exists.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sam3jax.config import Config
from sam3jax.model.stored import Int8
from sam3jax.weights.scope import live_entries
from sam3jax.weights.trainable import trained_entries
from sam3jax.weights.tree import Path, Tree, flatten, unflatten

# Layers that compute in float32 whatever the rest does.
_IN_FLOAT32 = {
    "scoring", "bbox_embed", "presence_token_head",
    "output_hypernetworks_mlps", "iou_prediction_head", "pred_obj_score_head",
}  # fmt: skip
_STEPS = 127


def compact(frozen: Tree, config: Config, backend: str) -> Tree:
    """Frozen kernels in eight bits, where the run has them so; else in the compute dtype: the values each
    layer would cast them to, half the bytes.

    backend: the platform of the devices that they go to.

    No compute dtype on a CPU: XLA widens a whole stack of bfloat16 again before it takes a layer of it,
    and keeps both (measured at full size: 6.0 GB of arguments and temporaries, 5.2 GB as they are).
    """
    dtype, params = config.model.compute_dtype, frozen["params"]
    if config.base_dtype == "int8":
        params = in_eight_bits(params, config)
    elif backend != "cpu":
        narrow = lambda path, x: x.astype(dtype) if _may_narrow(path) and x.dtype != dtype else x
        params = unflatten({path: narrow(path, x) for path, x in flatten(params).items()})
    return {**frozen, "params": params}


def in_eight_bits(params: Tree, config: Config) -> Tree:
    """The parameters with every kernel that the run does not train as `Int8`; what computes in float32 stays.

    params: all parameters of a run, or its frozen ones.
    """
    trained = {entry.path for entry in trained_entries(config)}
    stacks = {entry.path: len(entry.slot) for entry in live_entries(config)}

    def one(path: Path, x: jax.Array) -> jax.Array | Int8:
        freely = _may_narrow(path) and path in stacks and path not in trained
        return quantised(x, stacks[path]) if freely else x

    return unflatten({path: one(path, x) for path, x in flatten(params).items()})


def quantised(kernel: jax.Array, stack: int = 0) -> Int8:
    """kernel [stack axes, ..., E] -> the nearest of 255 steps up to the largest weight of a channel."""
    on = np if isinstance(kernel, np.ndarray) else jnp  # weights of a host stay there
    summed = tuple(range(stack, kernel.ndim - 1))
    largest = on.abs(kernel).max(summed, keepdims=True)
    scale = on.where(largest > 0, largest, 1.0).astype(np.float32) / np.float32(_STEPS)
    return Int8(on.round(kernel / scale).astype(np.int8), scale)


def _may_narrow(path: Path) -> bool:
    return path[-1] == "kernel" and not _IN_FLOAT32 & set(path)
