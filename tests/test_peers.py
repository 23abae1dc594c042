"""Processes of a run that watch each other: a death is told to all, an end in good order to nobody."""

from __future__ import annotations

import queue
import time

import pytest

from sam3jax.training.peers import LOST, Peers


@pytest.fixture
def three():
    """Three processes as three objects, and the queue of those that ended: (index, status)."""
    ends: queue.Queue = queue.Queue()
    port: list[int] = []

    def share(own: int) -> int:
        port.append(own)
        return port[0]

    made = [
        Peers(k, 3, "localhost", share, end=lambda status, k=k: ends.put((k, status)))
        for k in range(3)
    ]
    deadline = time.monotonic() + 10
    while len(made[0]._others) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return made, ends


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_death_is_told_to_all_others_by_its_number(dead, three, capsys):
    made, ends = three
    with pytest.raises(OSError), made[dead]:
        raise OSError
    assert sorted(ends.get(timeout=5) for _ in range(2)) == [(k, LOST) for k in range(3) if k != dead]  # fmt: skip
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith(f"error: process {dead} of this run has ended") for line in said)


@pytest.mark.parametrize("first", [0, 2])
def test_an_end_in_good_order_ends_nobody_else(first, three, capsys):
    made, ends = three
    with made[first]:
        pass
    time.sleep(0.3)
    assert ends.empty()
    assert capsys.readouterr().err == ""
    for peer in made:
        if peer is not made[first]:
            with peer:
                pass


def test_a_chief_that_cannot_be_reached_is_said_and_stops_nothing(capsys):
    with Peers(1, 2, "localhost", lambda _: 1):
        pass
    assert "process 0 cannot be reached at localhost:1" in capsys.readouterr().err
