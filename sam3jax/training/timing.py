"""Seconds per step, and peak memory."""

from __future__ import annotations

import resource
import time

import jax
import numpy as np


class Timer:
    """Seconds per step, from the end of one to the end of the next; compiling and pauses left out."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._last: float | None = None

    def step_done(self) -> None:
        """The device has finished a step."""
        now = time.perf_counter()
        if self._last is not None:
            self._times.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """What follows (validation, saving) is no part of a step."""
        self._last = None

    def median(self, recent: int | None = None) -> float | None:
        """Median seconds of all steps, or of the `recent` last ones; None before the second."""
        times = self._times[-recent:] if recent else self._times
        return float(np.median(times)) if times else None


def peak_memory() -> float:
    """Gigabytes: of the accelerator where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9  # fmt: skip
