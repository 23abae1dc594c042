"""The processes of a run on many hosts: they join, watch each other, and leave.

Where one dies, the others say so and end, instead of waiting for it. jax finds out too, after a minute or
more, and then ends the process with a trace of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam3jax.config import ConfigError
from sam3jax.errors import USER_ERROR, Stopped, UserError, exit_status

LOST = 1  # exit status
# In good order; by its own error; another is gone, whose number follows.
_ENDED, _FAILED, _GONE = b"e", b"f", b"g"
# A machine without power closes no connection: it is asked after so many seconds of silence, so often, three times.
_SILENCE, _PAUSE, _TIMES = 20, 5, 3
_GRACE = 5.0  # seconds in which a process may say its own error before it ends for another's
_NUMBERS = struct.Struct("!II")  # process, secret of the run

Numbers = Sequence[int]


def joined_as(options: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """`joined` as a command's options say; alone where they name no other process."""
    others = options.coordinator, options.num_processes, options.process_id
    if options.distributed or others != (None, None, None):
        return joined(*others, options.wait)
    return contextlib.nullcontext()


@contextlib.contextmanager
def joined(
    coordinator: str | None, processes: int | None, process: int | None, seconds: float
) -> Iterator[None]:
    """Join the other processes of a run, before jax is used, and watch them until the block ends.

    seconds: how long to wait for them. Raises ConfigError. An error in the block is said, the others are told,
    and the process ends.
    """
    _join(coordinator, processes, process, seconds)
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        yield
        return
    host = coordinator.rpartition(":")[0] if coordinator else _name_of_first()
    peers = Peers(index, count, host, _from_first)
    try:
        yield
    except Stopped:  # all agreed on it
        peers.part()
        raise
    except BaseException as error:
        if not isinstance(error, UserError):
            time.sleep(1)  # it may follow from another's death, which the watch then says
        status = _say(error)
        peers.fail()
        os._exit(status)  # jax would wait for the others, for minutes
    peers.part()


class Peers:
    """Connections between process 0 and all others.

    index of count processes; host: where process 0 can be reached; share(numbers): those of process 0, told
    to all. Where they cannot reach each other nobody watches; that is said and stops nothing.
    """

    def __init__(
        self,
        index: int,
        count: int,
        host: str,
        share: Callable[[Numbers], Numbers],
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._index, self._end = index, end
        self._over = threading.Event()
        self._others: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        if index == 0:
            server = socket.create_server(("", 0), backlog=count)
            # A stranger who finds the port is to be none of us.
            _, secret = share((server.getsockname()[1], secrets.randbits(31)))
            self._start(self._accept, server, count - 1, secret)
            return
        port, secret = share((0, 0))
        try:
            first = socket.create_connection((host, port), timeout=10)
            first.sendall(_NUMBERS.pack(index, secret))
            self._watch(0, first)
        except OSError as error:
            print(
                f"process 0 cannot be reached at {host}:{port} ({error}): a process that dies is told by jax alone",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def part(self) -> None:
        """Leave in good order: the others go on."""
        self._leave(_ENDED)

    def fail(self) -> None:
        """Leave for an error that was said. Returns when the others are gone, or had time enough."""
        self._leave(_FAILED)
        deadline = time.monotonic() + 2 * _GRACE
        for other in list(self._others.values()):
            with contextlib.suppress(OSError):
                other.settimeout(max(deadline - time.monotonic(), 0.01))
                while other.recv(64):
                    pass

    def _leave(self, how: bytes) -> None:
        with self._lock:
            self._over.set()
            for other in self._others.values():
                with contextlib.suppress(OSError):
                    other.sendall(how)
                    other.shutdown(socket.SHUT_WR)

    def _start(self, function: Callable[..., None], *given: object) -> None:
        threading.Thread(target=function, args=given, daemon=True).start()

    def _accept(self, server: socket.socket, number: int, secret: int) -> None:
        with server:
            while len(self._others) < number:
                with contextlib.suppress(OSError, struct.error):
                    other, _ = server.accept()
                    other.settimeout(10)
                    index, given = _NUMBERS.unpack(other.recv(_NUMBERS.size, socket.MSG_WAITALL))
                    if given == secret:
                        self._watch(index, other)
                    else:
                        other.close()

    def _watch(self, index: int, other: socket.socket) -> None:
        other.settimeout(None)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        values = {"TCP_KEEPIDLE": _SILENCE, "TCP_KEEPINTVL": _PAUSE, "TCP_KEEPCNT": _TIMES}
        for name, value in values.items():
            if hasattr(socket, name):
                other.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        with self._lock:
            self._others[index] = other
        self._start(self._read, index, other)

    def _read(self, index: int, other: socket.socket) -> None:
        try:
            said = other.recv(1)
            if said == _GONE:
                index = struct.unpack("!I", other.recv(4, socket.MSG_WAITALL))[0]
        except (OSError, struct.error):
            said = b""
        # Errors such as a missing data folder are the same everywhere: each process says its own.
        if said == _ENDED or self._over.wait(_GRACE if said == _FAILED else 0):
            return
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
            print(
                f"error: process {index} of this run has ended: the others cannot go on without it. Start the same "
                "command on all hosts again; it continues at the newest checkpoint",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            for number, peer in self._others.items():
                if number != index:
                    with contextlib.suppress(OSError):
                        peer.sendall(_GONE + struct.pack("!I", index))
        self._end(LOST)


def _join(
    coordinator: str | None, processes: int | None, process: int | None, seconds: float
) -> None:
    if processes is not None:
        where = f"{processes} at {coordinator}"
        print(f"process {process} of {where}: waiting for the others, up to {seconds:.0f} s", flush=True)  # fmt: skip

    def give_up() -> None:
        print(
            f"error: the other processes did not come within {seconds:.0f} s: start the same command on all hosts, "
            "with --coordinator of the first one, whose port the others must reach; --wait SECONDS waits longer",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(USER_ERROR)

    # jax itself ends a process that waits in vain, later and with a trace from C++.
    patience = threading.Timer(seconds, give_up)
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=int(seconds) + 60
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot join other processes ({error}): give --coordinator HOST:PORT, --num-processes and "
            f"--process-id, or start under a cluster that jax knows"
        ) from error
    finally:
        patience.cancel()


def _say(error: BaseException) -> int:
    """Say an error as the command line does; returns the exit status."""

    def fail() -> None:
        raise error

    try:
        return exit_status(fail)
    except BaseException:
        traceback.print_exc()
        return LOST
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _from_first(numbers: Numbers) -> Numbers:
    return np.asarray(multihost_utils.broadcast_one_to_all(np.array(numbers, np.int32))).tolist()


def _name_of_first() -> str:
    """The name of the host of process 0, where the cluster alone knows the coordinator."""
    name = np.zeros(256, np.uint8)
    own = socket.getfqdn().encode()[: len(name)]
    name[: len(own)] = np.frombuffer(own, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(name))
    return told.astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="replace")
