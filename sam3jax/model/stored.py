"""Parameters that lie otherwise than a layer reads them: split over devices, or in eight bits.

Where a layer asks for a parameter, Linen unboxes it. So whatever is stored in a box becomes whole inside
the loop over layers and inside the rematerialised block, one layer at a time, and no layer knows of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from sam3jax.types import AXIS


class _Box(struct.PyTreeNode, meta.AxisMetadata):
    """A leaf of a parameter tree. Layers of a stack are taken from its arrays as from any."""

    def unbox(self) -> jax.Array:
        raise NotImplementedError

    def replace_boxed(self, val: Any) -> Any:
        raise TypeError("a stored parameter is read, not replaced")

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return self


class Split(_Box):
    """A device's own part of a parameter, inside shard_map. The gradient comes back summed, in parts.

    axis: the one that is split, counted from the end, so that stack axes in front may go.
    """

    part: jax.Array
    axis: int = struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        return jax.lax.all_gather(self.part, AXIS, axis=self.part.ndim + self.axis, tiled=True)


class Int8(_Box):
    """A frozen kernel as whole numbers from -127 to 127, times a scale of its output channel.

    values [..., E] int8; scale float32, 1 along every axis that is summed over. Either may be split.
    """

    values: Any
    scale: Any

    def unbox(self) -> jax.Array:
        values, scale = meta.unbox((self.values, self.scale))
        return values.astype(jnp.float32) * scale
