"""Batches computed ahead of their use, by threads or worker processes of grain."""

from __future__ import annotations

import atexit
import pickle
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import grain
from absl import flags

from sam3jax.data.examples import Arrays
from sam3jax.data.ledger import DataError
from sam3jax.data.workers import start_worker, watched

ENDLESS = 2**40  # batches; nobody trains so long


class Opaque:
    """A function with its arguments, as functools.partial, whose repr is the function's name.

    grain names a transform by its repr: that of a partial writes out the whole data set.
    """

    def __init__(self, function: Callable[..., Arrays], **arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __call__(self, number: int, **more: Any) -> Arrays:
        return self._function(number, **self._arguments, **more)

    def __repr__(self) -> str:
        return self._function.__name__


def local_size(size: int, processes: int, key: str) -> int:
    """This process's part of `size` rows. Raises DataError where they do not divide."""
    if size % processes:
        raise DataError(
            f"{key} {size} does not divide among {processes} processes: use a multiple of {processes}"
        )
    return size // processes


def run_ahead(
    batch_of: Callable[[int], Arrays], start: int, stop: int, workers: int
) -> Iterator[Arrays]:
    """batch_of(start), batch_of(start + 1), ... in order; workers: processes, 0 for threads here.

    batch_of needs a short repr: grain names a transform by it.
    """
    batches = grain.MapDataset.range(start, stop).map(batch_of)
    # Batches hold masks and are large: grain's own default would keep 500 of them.
    ahead = grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=2)
    if not workers:
        return iter(batches.to_iter_dataset(ahead))
    if not flags.FLAGS.is_parsed():  # grain asks absl, which only absl's own main() sets up
        flags.FLAGS.mark_as_parsed()
    # As bytes: grain moves arrays through /dev/shm, which is 64 MB in a container.
    packed = batches.map(pickle.dumps).to_iter_dataset(ahead)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    stream = _unpacked(packed.mp_prefetch(options, worker_init_fn=start_worker))
    _open_streams.add(stream)
    return stream


def _unpacked(packed: grain.IterDataset) -> Generator[Arrays]:
    batches = watched(iter(packed))
    try:
        yield from map(pickle.loads, batches)
    finally:
        batches.close()


_open_streams: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """End worker processes while there is still an interpreter: later they end with tracebacks."""
    for stream in list(_open_streams):
        stream.close()
