"""How many pictures a device has room for: `micro_batch: auto`, and `sam3jax plan --search`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sam3jax.config import Config, ConfigError, load_config
from sam3jax.training import plan
from sam3jax.training.mesh import backend_of, micro_batches
from sam3jax.training.plan import USABLE, Needs
from sam3jax.weights.run_folder import CONFIG

GB = 1e9


def largest(
    needs_of: Callable[[int], Needs], room: float, choices: Sequence[int]
) -> tuple[int, dict[int, Needs]]:
    """(the largest of ascending choices that fits, 0 for none; what was compiled to find it).

    Memory grows by nearly the same with each picture: the first two choices are compiled, then what the
    line through them says, until the next larger choice is too much by the line or by a compilation.
    """
    tried: dict[int, Needs] = {}

    def fits(n: int) -> bool:
        tried[n] = needs_of(n)
        return tried[n].peak <= room

    first = last = choices[0]
    if not fits(first):
        return 0, tried
    low, high = 0, len(choices)  # choices[low] fits, choices[high] does not or is not there
    while high - low > 1:
        guess = low + 1
        if last != first:
            each = (tried[last].peak - tried[first].peak) / (last - first)
            line = lambda n, each=each: tried[first].peak + each * (n - first)
            guess = max(i for i in range(high) if i == 0 or line(choices[i]) <= room)
            if guess <= low:
                break
        last = choices[guess]
        if fits(last):
            low = guess
        else:
            high = guess
    return choices[low], tried


def most_that_fits(config: Config, devices: Sequence[Any], room: float) -> tuple[int, Needs]:
    """(largest micro_batch whatever batch_size is, its needs); (0, those of one picture) where that is too much."""
    one_update = lambda n: plan.needs(plan.with_micro_batch(config, n, len(devices)), devices)
    most, tried = largest(one_update, room, range(1, 1025))
    return most, tried[most or 1]


def choose(config: Config, devices: Sequence[Any], room: float) -> tuple[Config, Needs, str]:
    """A config whose micro_batch is auto, with a number in its place; what that needs; a line for people.

    room: bytes of one device. The number divides a device's share of the batch. Where not even the smallest
    fits, it is taken: the caller compares its needs.
    """
    share = config.batch_size // len(devices)
    choices = [n for n in range(1, share + 1) if share % n == 0]
    begun = time.monotonic()
    with_number = lambda n: config.model_copy(update={"micro_batch": n})
    most, tried = largest(lambda n: plan.needs(with_number(n), devices), room, choices)
    number = most or choices[0]
    found = tried[number]
    said = (
        f"micro_batch: auto takes {number} of {share} pictures of a device: {found.peak / GB:.2f} GB of {room / GB:.2f} "
        f"GB; compiled {len(tried)} times in {time.monotonic() - begun:.0f} s"
    )
    return with_number(number), found, said


def resolve(config: Config, mesh: Mesh) -> tuple[Config, int, str | None]:
    """(config with a number in the place of `auto`, micro-batches of a device and update, a line for the log or None).

    `auto` is the number of the run that is continued, else the largest one that fits. On a CPU nothing is searched:
    the memory is shared with everything else there, and a loop over micro-batches is slower. Raises ConfigError for a
    rest of the batch, and where one picture is too much.
    """
    said, number = None, micro_batches(config, mesh)
    if config.micro_batch == "auto":
        config, said = _resolve(config, mesh)
        number = micro_batches(config, mesh)
    return config, number, said


def _resolve(config: Config, mesh: Mesh) -> tuple[Config, str]:
    share = config.batch_size // mesh.size
    if (number := _of_the_run(config)) is not None:
        taken = config.model_copy(update={"micro_batch": number})
        return taken, f"micro_batch: auto keeps the {number} with which this run began"
    if backend_of(mesh) == "cpu":
        taken = config.model_copy(update={"micro_batch": share})
        return (
            taken,
            f"micro_batch: auto takes all {share} pictures of a device: on a CPU nothing is searched",
        )
    if jax.process_count() > 1:
        raise ConfigError(
            "micro_batch=auto is for runs of one process: give the number that `sam3jax plan --search` finds"
        )
    room = USABLE * _limit(mesh)
    chosen, needs, said = choose(config, list(mesh.devices.flat), room)
    if needs.peak > room:
        raise ConfigError(
            f"a step of {chosen.micro_batch} picture(s) at once needs {needs.peak / GB:.2f} GB, and a device has "
            f"{room / GB:.2f} GB to give: `sam3jax plan` with the same settings says which of them would help"
        )
    return chosen, said


def _of_the_run(config: Config) -> int | None:
    """The number in the run folder that is there, if one is."""
    file = Path(config.output) / CONFIG
    try:
        found = load_config(file).micro_batch if file.is_file() else None
    except ConfigError:  # whoever opens the folder says what is wrong with it
        return None
    return found if isinstance(found, int) else None


def _limit(mesh: Mesh) -> int:
    """Bytes that this process may take of a device."""
    stats = mesh.devices.flat[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ConfigError("micro_batch=auto: this device does not tell its memory; give a number")
    return int(stats["bytes_limit"])
