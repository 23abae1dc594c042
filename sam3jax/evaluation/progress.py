"""How far an evaluation is: told per batch, shown as a bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Advance = Callable[[int, int], None]  # called with the number of batches that are done, and of all


def untold(done: int, total: int) -> None:
    """The `Advance` that tells nobody."""


def length(loader: Any, batches: int | None) -> int:
    """Batches that are looked at: `len(loader)`, and no more than `batches`."""
    return len(loader) if batches is None else min(len(loader), batches)


class progress:
    """A progress bar on stderr that stays away from logs: `with progress(title) as advance`."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(title, total=None)

    def __enter__(self) -> Advance:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
