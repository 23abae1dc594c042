"""Devices: the mesh, and what lies where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sam3jax.config import Config, ConfigError
from sam3jax.types import AXIS


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices (of all hosts), one axis over which pictures are split."""
    return Mesh(np.array(devices or jax.devices()), (AXIS,))


def local_mesh(mesh: Mesh | None = None) -> Mesh:
    """The devices of this process, of a mesh or of all."""
    devices = jax.devices() if mesh is None else mesh.devices.flat
    own = [d for d in devices if d.process_index == jax.process_index()]
    return Mesh(np.array(own), (AXIS,))


def backend_of(mesh: Mesh) -> str:
    """The platform of a mesh's devices: `cpu`, `gpu` or `tpu`."""
    return mesh.devices.flat[0].platform


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Every leaf on every device; what lies there already stays.

    All leaves get one kind of sharding, that of the step's outputs, even on one device: else the
    second step would be another program.
    """
    return put(tree, jax.tree.map(lambda x: NamedSharding(mesh, P()), tree))


def put(tree: Any, shardings: Any) -> Any:
    """Every leaf where its sharding says, on all hosts; what lies there already stays."""

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        there = x.sharding if isinstance(x, jax.Array) else None
        if isinstance(there, NamedSharding) and there.is_equivalent_to(sharding, x.ndim):
            return x
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        if there is not None and not x.is_fully_addressable:  # the devices send it each other
            return jax.jit(lambda x: x, out_shardings=sharding)(x)
        local = np.asarray(x)
        return jax.make_array_from_callback(local.shape, sharding, lambda index: local[index])

    return jax.tree.map(one, tree, shardings)


def micro_batches(config: Config, mesh: Mesh) -> int:
    """How many micro-batches each device works off in one update. Raises ConfigError for a rest."""
    given = config.micro_batch if isinstance(config.micro_batch, int) else None
    held = given or max(config.batch_size // mesh.size, 1)
    if config.batch_size % (held * mesh.size):
        size = f"micro-batches of {held} on " if given else ""
        raise ConfigError(
            f"batch_size {config.batch_size} does not divide into {size}{mesh.size} device(s): use a multiple of "
            f"{held * mesh.size if given else mesh.size}"
        )
    return config.batch_size // (held * mesh.size)


def micro_spec(spec: Any) -> Any:
    """PartitionSpecs of a batch with micro-batches in front of what is split over devices."""
    return jax.tree.map(lambda s: P(None, *s) if s else s, spec, is_leaf=_is_spec)


def put_batch(batch: Any, spec: Any, mesh: Mesh, micro: int = 1) -> Any:
    """This process's part of a batch, as the global arrays that the step takes.

    spec: the task's. What is split over devices, [I, ...], becomes [micro, I / micro, ...].
    """

    def put(spec: P, part: Any) -> Any:
        sharding = NamedSharding(mesh, P(None, *spec) if spec else spec)

        def one(x: Any) -> jax.Array:
            x = np.asarray(x)
            if spec:
                x = x.reshape(micro, len(x) // micro, *x.shape[1:])
            return jax.make_array_from_process_local_data(sharding, x)

        return jax.tree.map(one, part)

    return jax.tree.map(put, spec, batch, is_leaf=_is_spec)


def take_micro_batch(spec: Any, batch: Any) -> tuple[int, Callable[[jax.Array], Any]]:
    """(number of micro-batches, take(m)): inside the step, `spec` from `micro_spec`."""
    sizes: set[int] = set()

    def note(spec: P, part: Any) -> None:
        if spec:
            sizes.update(x.shape[0] for x in jax.tree.leaves(part))

    jax.tree.map(note, spec, batch, is_leaf=_is_spec)
    (number,) = sizes

    def take(m: jax.Array) -> Any:
        one = lambda spec, part: jax.tree.map(lambda x: x[m], part) if spec else part
        return jax.tree.map(one, spec, batch, is_leaf=_is_spec)

    return number, take


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
