"""The processes of a run watch each other: where one dies, the others say so and end, instead of waiting for it.

jax finds out too, after minutes, and then ends the process with a trace of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable

LOST = 1  # exit status
_ENDED, _GONE = b"e", b"g"  # in good order; somebody else died, whose number follows
# A machine without power closes no connection: it is asked after so many seconds of silence, so often, three times.
_SILENCE, _PAUSE, _TIMES = 20, 5, 3


class Peers:
    """Connections between process 0 and all others. Used as a context around a run.

    index of count processes; host: where process 0 can be reached; share(port): the port of process 0, told
    to all. Where they cannot reach each other nobody watches; that is said and stops nothing.
    """

    def __init__(
        self,
        index: int,
        count: int,
        host: str,
        share: Callable[[int], int],
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._index, self._end, self._ended = index, end, False
        self._others: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        if index == 0:
            server = socket.create_server(("", 0), backlog=count)
            share(server.getsockname()[1])
            threading.Thread(target=self._accept, args=(server, count - 1), daemon=True).start()
            return
        port = share(0)
        try:
            chief = socket.create_connection((host, port), timeout=10)
            chief.sendall(struct.pack("!I", index))
            self._watch(0, chief)
        except OSError as error:
            print(
                f"process 0 cannot be reached at {host}:{port} ({error}): a process that dies is told by jax alone",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Part in good order; after an error the others are to see that this process is gone."""
        self._ended = True
        with self._lock:
            for other in self._others.values():
                with contextlib.suppress(OSError):
                    if kind is None:
                        other.sendall(_ENDED)
                    other.shutdown(socket.SHUT_RDWR)
                other.close()

    def _accept(self, server: socket.socket, number: int) -> None:
        with server:
            for _ in range(number):
                with contextlib.suppress(OSError, struct.error):
                    other, _address = server.accept()
                    self._watch(struct.unpack("!I", other.recv(4, socket.MSG_WAITALL))[0], other)

    def _watch(self, index: int, other: socket.socket) -> None:
        other.settimeout(None)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", _SILENCE),
            ("TCP_KEEPINTVL", _PAUSE),
            ("TCP_KEEPCNT", _TIMES),
        ):
            if hasattr(socket, name):
                other.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        with self._lock:
            self._others[index] = other
        threading.Thread(target=self._read, args=(index, other), daemon=True).start()

    def _read(self, index: int, other: socket.socket) -> None:
        try:
            said = other.recv(1)
            if said == _GONE:
                index = struct.unpack("!I", other.recv(4, socket.MSG_WAITALL))[0]
        except (OSError, struct.error):
            said = b""
        if said == _ENDED or self._ended:
            return
        with self._lock:
            if self._ended:
                return
            self._ended = True
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
