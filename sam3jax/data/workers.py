"""Loader processes that are watched: one that is killed or stopped is an error, not a wait without end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Generator, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sam3jax.data.ledger import DataError

STOPPED_SECONDS = 20.0  # a worker that is halted so long is taken for lost
_POLL = 1.0
_END = object()


def start_worker(number: int, count: int) -> None:
    """In a new worker: signals to the whole group are the trainer's to answer; no trainer, no worker."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(sign, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def watched(items: Iterator[Any]) -> Generator[Any]:
    """The items of an iterator that grain's worker processes fill. Raises DataError for a lost process.

    The iterator is read in a thread of its own: grain may wait for ever for a process that is gone.
    """
    others, own = set(multiprocessing.active_children()), set[BaseProcess]()
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=1)
    asked = threading.Semaphore(0)

    def read() -> None:
        while asked.acquire():
            try:
                ready.put((next(items, _END), None))
            except BaseException as error:
                ready.put((None, error))
                return

    threading.Thread(target=read, daemon=True).start()
    lost = False
    try:
        while True:
            asked.release()
            item, error, halted = None, None, 0.0
            while True:
                try:
                    item, error = ready.get(timeout=_POLL)
                    break
                except queue.Empty:
                    own |= set(multiprocessing.active_children()) - others
                    halted = halted + _POLL if any(map(_is_halted, own)) else 0.0
                    if why := _lost(own, halted):
                        lost = True
                        raise DataError(why) from None
            if error is not None:
                if why := _lost(own, 0.0):
                    lost = True
                    raise DataError(why) from error
                raise error
            if item is _END:
                return
            own |= set(multiprocessing.active_children()) - others
            yield item
    finally:
        if lost:  # closing would wait for the lost one
            for process in own:
                with contextlib.suppress(ValueError, OSError):
                    process.kill()
        else:
            items.close()  # pyright: ignore[reportAttributeAccessIssue]


def _lost(processes: set[BaseProcess], halted: float) -> str:
    """Which process is lost, and what to do; "" for none."""
    again = "Run the same command again, with fewer data.workers if memory is short"
    for process in processes:
        code = process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            memory = ", often because the memory was full" if code == -signal.SIGKILL else ""
            return f"loader process {process.pid} was ended by {name}{memory}. {again}"
        if code:
            return f"loader process {process.pid} ended with status {code}. {again}"
        if halted >= STOPPED_SECONDS and _is_halted(process):
            return f"loader process {process.pid} has been halted for {halted:.0f} seconds (SIGSTOP). {again}"
    return ""


def _is_halted(process: BaseProcess) -> bool:
    try:  # Linux alone tells
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False
