"""Batches computed ahead of their use, by threads or worker processes of grain."""

from __future__ import annotations

import atexit
import pickle
import weakref
from collections.abc import Callable, Generator, Iterator

import grain
from absl import flags

from sam3jax.data.examples import Arrays


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
    stream = _unpacked(packed.mp_prefetch(options))
    _open_streams.add(stream)
    return stream


def _unpacked(packed: grain.IterDataset) -> Generator[Arrays]:
    iterator = iter(packed)
    try:
        yield from map(pickle.loads, iterator)
    finally:
        iterator.close()


_open_streams: weakref.WeakSet[Generator] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """End worker processes while there is still an interpreter: later they end with tracebacks."""
    for stream in list(_open_streams):
        stream.close()
