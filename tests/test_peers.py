"""Processes of a run that watch each other: a death is told to all, an end in good order to nobody."""

from __future__ import annotations

import queue
import socket
import threading
import time

import pytest

from sam3jax.training import peers
from sam3jax.training.peers import LOST, Peers


@pytest.fixture
def three():
    """Three processes as three objects, and the queue of those that ended: (index, status)."""
    ends: queue.Queue = queue.Queue()
    first: list = []

    def share(own):
        first.append(own)
        return first[0]

    made = [
        Peers(k, 3, "localhost", share, end=lambda status, k=k: ends.put((k, status)))
        for k in range(3)
    ]
    deadline = time.monotonic() + 10
    while len(made[0]._others) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return made, ends


def close(peer):
    """As the system does for a process that was killed."""
    peer._over.set()
    for other in peer._others.values():
        other.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_death_is_told_to_all_others_by_its_number(dead, three, capsys):
    made, ends = three
    close(made[dead])
    assert sorted(ends.get(timeout=5) for _ in range(2)) == [(k, LOST) for k in range(3) if k != dead]  # fmt: skip
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith(f"error: process {dead} of this run has ended") for line in said)


@pytest.mark.parametrize("first", [0, 2])
def test_an_end_in_good_order_ends_nobody_else(first, three, capsys):
    made, ends = three
    made[first].part()
    time.sleep(0.3)
    assert ends.empty()
    assert capsys.readouterr().err == ""
    for peer in made:
        peer.part()


def test_an_error_of_all_is_said_by_each_and_an_error_of_one_by_the_others_after_a_while(
    three, capsys, monkeypatch
):
    monkeypatch.setattr(peers, "_GRACE", 1.0)
    made, ends = three
    failing = [threading.Thread(target=peer.fail) for peer in made[1:]]
    for thread in failing:
        thread.start()
    assert ends.get(timeout=5) == (0, LOST)  # it alone had no error
    assert ends.empty()
    assert capsys.readouterr().err.count("has ended") == 1
    close(made[0])
    for thread in failing:
        thread.join()


def test_a_stranger_at_the_port_is_none_of_the_run(capsys):
    port = []
    first = Peers(0, 2, "localhost", lambda numbers: port.append(numbers) or numbers, end=port.append)  # fmt: skip
    with socket.create_connection(("localhost", port[0][0])) as stranger:
        stranger.sendall(b"GET / HT")
        assert stranger.recv(1) == b""
    second = Peers(1, 2, "localhost", lambda _: port[0], end=port.append)
    while not first._others:
        time.sleep(0.01)
    second.part()
    first.part()
    assert len(port) == 1


def test_a_first_process_that_cannot_be_reached_is_said_and_stops_nothing(capsys):
    Peers(1, 2, "localhost", lambda _: (1, 0)).part()
    assert "process 0 cannot be reached at localhost:1" in capsys.readouterr().err
