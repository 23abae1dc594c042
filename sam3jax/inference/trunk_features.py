"""Fills a store of trunk features on the devices of a mesh."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sam3jax.data.features import FeatureStore
from sam3jax.model import Sam3
from sam3jax.types import AXIS
from sam3jax.weights.tree import Tree


def fill(
    store: FeatureStore,
    stamps: list[int],
    picture: Callable[[int, int], np.ndarray],
    model: Sam3,
    variables: Tree,
    mesh: Mesh,
    *,
    at_once: int,
    advance: Callable[[int, int], None],
) -> None:
    """Compute every entry that is missing. picture(row, view) -> pixels [Y, X, 3] uint8, of a clip [F, Y, X, 3].

    at_once: entries of a device; the next ones are read while these are computed. advance: called with the batches done and all.
    """
    missing, size = store.missing(stamps), at_once * mesh.size
    groups = [missing[k : k + size] for k in range(0, len(missing), size)]
    split = NamedSharding(mesh, P(AXIS))

    def read(entries: list[int]) -> np.ndarray:
        rows = [picture(*divmod(e, store.views)) for e in entries]
        return np.stack([*rows, *[rows[-1]] * (size - len(rows))])

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, groups[0]) if groups else None
        for k, entries in enumerate(groups):
            assert coming is not None
            images = jax.device_put(coming.result(), split)
            features = _encode(model, mesh, variables, images)
            coming = pool.submit(read, groups[k + 1]) if k + 1 < len(groups) else None
            found = np.asarray(jax.device_get(features))[: len(entries)]
            store.write(entries, found, [stamps[e // store.views] for e in entries])
            advance(k + 1, len(groups))


@partial(jax.jit, static_argnums=(0, 1))
def _encode(model: Sam3, mesh: Mesh, variables: Tree, images: jax.Array) -> jax.Array:
    def encode(variables: Tree, images: jax.Array) -> Any:
        each = images.reshape(-1, *images.shape[-3:])
        found: Any = model.apply(variables, each, method="encode_trunk")
        return found.reshape(*images.shape[:-3], *found.shape[1:])

    split = jax.shard_map(encode, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
    return split(variables, images)


def checksum(tree: Tree) -> int:
    """CRC of all arrays of a tree, in their order."""
    found = 0
    for x in jax.tree.leaves(tree):
        found = zlib.crc32(np.asarray(jax.device_get(x)).tobytes(), found)
    return found
