"""Train: `python -m sam3jax.train --config configs/x.yaml section.key=value ...`.

The order of things: configuration, data, base weights (init > noise), what is trained, the step,
resume (a checkpoint in the run folder goes before everything), the loop, the summary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("train"))

import jax

from sam3jax.config import Config, load_config
from sam3jax.errors import exit_status
from sam3jax.files import write_json
from sam3jax.options import parse
from sam3jax.tasks import TASKS
from sam3jax.training.log import RunLog
from sam3jax.training.mesh import (
    backend_of,
    join,
    local_mesh,
    make_mesh,
    micro_batches,
    put_batch,
    put_replicated,
)
from sam3jax.training.optim import build_optimizer, learning_rate
from sam3jax.training.rates import count, multipliers
from sam3jax.training.state import init_state, restore, save
from sam3jax.training.step import make_train_step
from sam3jax.training.timing import Timer, peak_memory
from sam3jax.training.validation import Validation
from sam3jax.viewing.report import write_report
from sam3jax.weights.base import open_base
from sam3jax.weights.checkpoints import Checkpoints
from sam3jax.weights.run_folder import open_run_folder
from sam3jax.weights.trainable import compact, start


def train(config: Config) -> dict[str, Any]:
    """Run (or continue) a training; returns what summary.json holds.

    Raises ConfigError, DataError, FileError: a setting, the data or a file is not right. Nothing is
    written before all of them are read.
    """
    base = open_base(config)
    config, mesh = base.config, make_mesh()
    task = TASKS[config.task](config, backend_of(mesh))
    process = dict(process_index=jax.process_index(), process_count=jax.process_count())
    micro = micro_batches(config, mesh)
    data = task.open(base.tokenizer)
    loader = task.loader(data, **process)
    weights = base.load()
    trainable, frozen = start(weights.params, config)
    rates = multipliers(trainable, frozen, config)
    optimizer = build_optimizer(config, trainable, rates)
    trained, total = count(trainable, rates), sum(x.size for x in jax.tree.leaves(weights.params))

    run = open_run_folder(config, weights.fingerprint)
    chief = jax.process_index() == 0
    checkpoints = Checkpoints(run, keep=config.keep)
    state = put_replicated(init_state(trainable, optimizer, config.optim.ema > 0), mesh)
    untrained = state.trainable
    if (found := checkpoints.latest()) is not None:
        state = restore(checkpoints, found, state)
        loader.set_state(checkpoints.about(found)["data"])
    first = int(state.step)
    if first >= config.steps and (run / "summary.json").is_file():
        if chief:
            print(f"{run} is finished: {first} of {config.steps} steps; raise `steps` to train on")
        checkpoints.close()
        return json.loads((run / "summary.json").read_text())
    validated = checkpoints.validation(first) is not None
    log = RunLog(run, first, config.steps, validated=validated, write=chief)
    try:
        log.say(f"run folder {run}, {'continues at' if first else 'starts at'} step {first}")
        for line in task.describe(data):
            log.say(line)
        log.say(f"{trained:,} parameters trained, {total:,} in the model, {mesh.size} device(s)")
        frozen = put_replicated(compact(frozen, config.model, backend_of(mesh)), mesh)
        prepared, frozen = task.prepare(state.trainable, frozen, data)
        prepared = put_replicated(prepared, mesh)
        ask = task.validation(data, local_mesh(mesh), **process)
        validate, before = None, None
        if ask is not None:
            validate = Validation(ask, config, task.best_by, run, log, checkpoints)
            before = validate.base(untrained, frozen, prepared) if config.init else None
            if first and not validated and _validates(config, first):
                validate(state, frozen, prepared, first)
        del untrained
        step = make_train_step(task, optimizer, mesh, seed=config.seed, ema=config.optim.ema)
        schedule = learning_rate(config.optim, config.steps)
        timer = Timer()
        pending = None
        for number in range(first + 1, config.steps + 1):
            batch = put_batch(next(loader), task.batch_spec, mesh, micro)
            with jax.transfer_guard("disallow"):  # a hidden copy is an error
                state, metrics = step(state, frozen, prepared, batch)
            # Read one step late: waiting for step n - 1 while step n runs keeps the device busy.
            if pending is not None:
                _log_step(log, pending, timer, schedule, config)
            pending = (number, metrics)
            validates = _validates(config, number)
            if validates or number % config.save_every == 0:
                # The line of a step is written before its checkpoint, so that a kill loses neither.
                _log_step(log, pending, timer, schedule, config)
                pending = None
                about = {"base": weights.fingerprint, "data": loader.get_state()}
                save(checkpoints, state, about)
                if validates and validate is not None:
                    validate(state, frozen, prepared, number)
                timer.pause()
        checkpoints.wait()
        best, last = (checkpoints.validation(s) or {} for s in (checkpoints.best(), config.steps))
        summary = {
            "steps": config.steps, "parameters_trained": trained, "parameters": total,
            "skipped_steps": int(state.skipped), "devices": mesh.size,
            "step_seconds_median": timer.median(), "peak_memory_gb": peak_memory(),
            "base": before, "final": last.get("metrics"), "best": best.get("metrics"),
        }  # fmt: skip
        if chief:
            write_json(run / "summary.json", summary)
            write_report(run)
        log.say(f"done: {run / 'report.html'}")
        return summary
    finally:
        checkpoints.close()  # a save under way is waited for, whatever ended the loop
        log.close()
        loader.close()


def _validates(config: Config, number: int) -> bool:
    """Whether a step is validated: every `eval_every`th, and the last one."""
    due = bool(config.eval_every) and number % config.eval_every == 0
    return due or number == config.steps


def _log_step(log, pending, timer: Timer, schedule, config: Config) -> None:
    number, metrics = pending
    jax.block_until_ready(metrics)
    timer.step_done()
    if number % config.log_every and number not in (1, config.steps):
        return
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    values["rate"] = float(schedule(number))
    if (seconds := timer.median(recent=50)) is not None:
        values["images_per_second"] = config.batch_size / seconds
        values["seconds_left"] = (config.steps - number) * seconds
    log.train(number, values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    options = parse("train", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    others = options.coordinator, options.num_processes, options.process_id
    if options.distributed or others != (None, None, None):
        join(*others)
    train(load_config(options.config, options.overrides))
