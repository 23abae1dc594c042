"""Train: `python -m sam3jax.train --config configs/x.yaml section.key=value ...`.

The order of things: configuration, data, base weights (init > noise), what is trained, the step,
resume (a checkpoint in the run folder goes before everything), the loop, the summary.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from typing import Any

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("train"))

import jax
import numpy as np

from sam3jax.config import Config, ConfigError, load_config
from sam3jax.data.datasets import open_datasets
from sam3jax.data.loader import make_train_loader
from sam3jax.data.pictures import DataError
from sam3jax.data.prompts import balance, tokenize, vocabulary
from sam3jax.doctor import describe
from sam3jax.errors import exit_status
from sam3jax.files import write_json
from sam3jax.options import parse
from sam3jax.training.log import RunLog
from sam3jax.training.optim import build_optimizer, learning_rate
from sam3jax.training.step import (
    encode_vocabulary,
    init_state,
    make_mesh,
    make_train_step,
    put_batch,
    put_replicated,
    text_is_trained,
)
from sam3jax.training.validation import Validation
from sam3jax.viewing.report import write_report
from sam3jax.weights.checkpoints import Checkpoints, load_base, open_run_folder, start
from sam3jax.weights.trainable import Tree, compact, count, merge, multipliers, without_text_tower


def train(config: Config) -> dict[str, Any]:
    """Run (or continue) a training; returns what summary.json holds.

    Raises ConfigError, DataError, FileError: a setting, the data or a file is not right. Nothing is
    written before all of them are read.
    """
    train_data, valid_data = open_datasets(config)
    phrases = vocabulary(config.data, *filter(None, (train_data, valid_data)))
    base = load_base(config)
    config = base.config
    tokens = tokenize(phrases, base.tokenizer)
    trainable, frozen = start(base)
    rates = multipliers(trainable, frozen, config)
    optimizer = build_optimizer(config, trainable, rates)
    mesh = make_mesh()
    if config.batch_size % mesh.size:
        raise DataError(
            f"batch_size {config.batch_size} does not divide over {mesh.size} devices: use a multiple of {mesh.size}"
        )
    process = dict(process_index=jax.process_index(), process_count=jax.process_count())
    loader = make_train_loader(train_data, phrases, tokens, config, **process)

    run = open_run_folder(base)
    chief = jax.process_index() == 0
    checkpoints = Checkpoints(run, config)
    state = put_replicated(init_state(trainable, optimizer, config.optim.ema > 0), mesh)
    if (found := checkpoints.latest()) is not None:
        state, data_state = checkpoints.restore(found, state)
        loader.set_state(data_state)
    first = int(state.step)
    log = RunLog(run, first, config.steps, write=chief)
    try:
        log.say(f"run folder {run}, {'continues at' if first else 'starts at'} step {first}")
        for line in (*describe(train_data), balance(train_data, config.data, config.seed)):
            log.say(line)
        trained, total = count(trainable, rates), _size(base.params)
        log.say(f"{trained:,} parameters trained, {total:,} in the model, {mesh.size} device(s)")

        validate = Validation(config, valid_data, phrases, tokens, frozen, run, log, process)
        before = validate.base(base) if valid_data is not None and config.init else None
        frozen = put_replicated(compact(frozen, config.model), mesh)
        text = None
        if not text_is_trained(trainable):
            text = put_replicated(encode_vocabulary(config, merge(trainable, frozen), tokens), mesh)
            frozen = without_text_tower(frozen)
        step = make_train_step(config, optimizer, mesh)
        schedule = learning_rate(config.optim, max(config.steps // config.optim.accumulate, 1))
        timer = Timer()
        pending = None
        for number in range(first + 1, config.steps + 1):
            state, metrics = step(state, frozen, text, put_batch(next(loader), mesh))
            # Read one step late: waiting for step n - 1 while step n runs keeps the device busy.
            if pending is not None:
                _log_step(log, pending, timer, schedule, config)
            pending = (number, metrics)
            last = number == config.steps
            due = config.eval_every and number % config.eval_every == 0
            scores = validate(state, number) if valid_data is not None and (due or last) else None
            if scores is not None or last or number % config.save_every == 0:
                checkpoints.save(state, loader.get_state(), scores)
                timer.pause()
        if pending is not None:
            _log_step(log, pending, timer, schedule, config, force=True)
        checkpoints.close()
        summary = {
            "steps": config.steps, "parameters_trained": trained, "parameters": total,
            "skipped_steps": int(state.skipped), "devices": mesh.size,
            "step_seconds_median": timer.median(), "peak_memory_gb": _peak_memory(),
            "base": before, "final": validate.last, "best": validate.best,
        }  # fmt: skip
        if chief:
            write_json(run / "summary.json", summary)
            write_report(run)
        log.say(f"done: {run / 'report.html'}")
        return summary
    finally:
        log.close()
        loader.close()


class Timer:
    """Seconds per step, from the end of one to the end of the next; compiling and pauses left out."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._last: float | None = None

    def step_done(self) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._times.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """What follows (validation, saving) is no part of a step."""
        self._last = None

    def median(self, recent: int | None = None) -> float | None:
        times = self._times[-recent:] if recent else self._times
        return float(np.median(times)) if times else None


def _log_step(log, pending, timer: Timer, schedule, config: Config, force: bool = False) -> None:
    number, metrics = pending
    jax.block_until_ready(metrics)
    timer.step_done()
    if not (force or number % config.log_every == 0 or number == 1):
        return
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    values["rate"] = float(schedule(-(-number // config.optim.accumulate)))
    if (seconds := timer.median(recent=50)) is not None:
        values["images_per_second"] = config.batch_size / seconds
        values["seconds_left"] = (config.steps - number) * seconds
    log.train(number, values)


def _size(tree: Tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _peak_memory() -> float:
    """Gigabytes: of the accelerator where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9  # fmt: skip


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes of a run, before jax is used. Raises ConfigError."""
    if processes is not None:  # jax itself ends who waits in vain, with a trace from C++
        where = f"{processes} at {coordinator}"
        print(f"process {process} of {where}: waiting for the others, up to 5 minutes", flush=True)
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot join other processes ({error}): give --coordinator HOST:PORT, --num-processes and "
            f"--process-id, or start under a cluster that jax knows"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    options = parse("train", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    others = options.coordinator, options.num_processes, options.process_id
    if options.distributed or others != (None, None, None):
        join(*others)
    train(load_config(options.config, options.overrides))
