"""Train: `python -m sam3jax.train --config configs/x.yaml section.key=value ...`.

The order of things: configuration, data, base weights (init > noise), what is trained, the step,
resume (a checkpoint in the run folder goes before everything), the loop, the summary.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("train"))

import jax

from sam3jax.config import Config, check_config, load_config
from sam3jax.errors import exit_status
from sam3jax.options import parse
from sam3jax.tasks import TASKS
from sam3jax.training.first_batches import draw_first
from sam3jax.training.first_nan import first_nan
from sam3jax.training.length import Patience, in_steps, is_validated
from sam3jax.training.log import Hook, RunLog, StepLog, nothing
from sam3jax.training.mesh import backend_of, local_mesh, make_mesh, put_batch
from sam3jax.training.micro_batch import resolve
from sam3jax.training.optim import build_optimizer, schedule_warning
from sam3jax.training.peers import joined_as
from sam3jax.training.precision import precision_line
from sam3jax.training.rates import count, multipliers
from sam3jax.training.sharding import parts_of, placed
from sam3jax.training.signals import Interruptions, stopped
from sam3jax.training.skipped import SkippedSteps
from sam3jax.training.state import init_state, restore, save
from sam3jax.training.step import make_train_step
from sam3jax.training.summary import finish, finished
from sam3jax.training.timing import peak_memory
from sam3jax.training.trackers import check_trackers
from sam3jax.training.validation import Validation
from sam3jax.weights.base import open_base
from sam3jax.weights.checkpoints import Checkpoints
from sam3jax.weights.frozen import compact
from sam3jax.weights.run_folder import open_run_folder, remark_missing
from sam3jax.weights.trainable import start


def train(
    config: Config, *, on_step: Hook = nothing, on_validation: Hook = nothing
) -> dict[str, Any]:
    """Run (or continue) a training; returns what summary.json holds.

    on_step, on_validation: called with a step and its metrics, in every process; what they raise ends the
    run, saved as far as it was. Raises ConfigError, DataError, FileError: a setting, the data or a file is
    not right. Nothing is written before all of them are read.
    """
    check_config(config)
    check_trackers(config.trackers)
    base, mesh = open_base(config), make_mesh()
    config, micro, chosen = resolve(base.config, mesh)
    parts, task = parts_of(mesh, config.shard), TASKS[config.task](config, backend_of(mesh))
    process = dict(process_index=jax.process_index(), process_count=jax.process_count())
    data = task.open(base.tokenizer)
    loader = task.loader(data, **process)
    config = in_steps(config, loader.epoch, data.valid is not None)
    weights = base.load()
    trainable, frozen = start(weights.params, config)
    rates = multipliers(trainable, frozen, config)
    optimizer = build_optimizer(config, trainable, rates, parts)
    trained, total = count(trainable, rates), sum(x.size for x in jax.tree.leaves(weights.params))
    # What is entered here is closed in reverse order, whatever ends the run.
    with ExitStack() as ending:
        folder = ending.enter_context(open_run_folder(config, weights.fingerprint))
        run, chief = folder.path, jax.process_index() == 0
        checkpoints = ending.enter_context(closing(Checkpoints(run, keep=config.keep)))
        state = init_state(placed(trainable, mesh, parts), optimizer, config.optim.ema > 0)
        state = placed(state, mesh, parts)
        untrained = state.trainable
        about: dict[str, Any] = {}
        if (found := checkpoints.latest()) is not None:
            if chief:
                remark_missing(run, checkpoints.steps())
            about = checkpoints.about(found, folder.id)
            state = restore(checkpoints, found, state)
            loader.set_state(about["data"], force=config.resume == "force")
        number = first = int(state.step)
        if (done := finished(run, first, config, say=chief)) is not None:
            return done
        patience = Patience(config.patience, config.min_improvement, about.get("patience"))
        if (known := checkpoints.validation(first)) is not None:
            patience.add(known["score"])
        validated = known is not None
        log = RunLog(run, first, config, id=folder.id or "", validated=validated, write=chief)
        ending.enter_context(closing(loader))
        ending.enter_context(closing(log))
        log.say(f"run folder {run}, {'continues at' if first else 'starts at'} step {first}")
        log.say(*task.describe(data), schedule_warning(config.optim, config.steps))
        log.say(f"{trained:,} parameters trained, {total:,} in the model, {mesh.size} device(s)")
        log.say(chosen, precision_line(config.model, mesh.devices.flat[0]))
        frozen = placed(compact(frozen, config, backend_of(mesh)), mesh)
        task.keep(frozen, data, mesh)
        prepared, frozen = task.prepare(state.trainable, frozen, data)
        prepared, frozen = placed(prepared, mesh), placed(frozen, mesh, parts)
        ask = task.validation(data, local_mesh(mesh), **process)
        validate = before = None
        if ask is not None:
            hooks = patience, on_validation
            validate = Validation(ask, config, task.best_by, run, log, checkpoints, *hooks)
            before = validate.base(untrained, frozen, prepared) if config.init else None
            if first and not validated and is_validated(config, first):
                validate(state, frozen, prepared, first)
        del untrained
        step = make_train_step(
            task, optimizer, mesh, seed=config.seed, ema=config.optim.ema, parts=parts
        )
        where = lambda: first_nan(task, mesh, state.trainable, frozen, prepared, batch)
        skipped = SkippedSteps(config.max_skipped, int(state.skipped), where)
        steps = StepLog(log, config, loader.epoch, skipped, on_step)
        interruptions = ending.enter_context(Interruptions(config.save_minutes))
        while number < config.steps and not patience.is_over:
            number += 1
            batch = next(loader)
            if number <= config.draw_batches and chief:
                draw_first(number, partial(task.draw, data, batch), run, log, again=not first)
            batch = put_batch(batch, task.batch_spec, mesh, micro)
            compiles = number == first + 1
            # No hidden copies.
            with log.busy("compiling (a minute or two)", compiles), jax.transfer_guard("disallow"):
                state, metrics = step(state, frozen, prepared, batch)
            steps.add(number, metrics)
            stop, late = interruptions.after(number)
            validates = is_validated(config, number)
            if stop or late or validates or number % config.save_every == 0:
                # The line of a step is written before its checkpoint, so that a kill loses neither.
                steps.flush()
                folder.check()
                about = {
                    "run": folder.id, "step": number, "base": weights.fingerprint, "data": loader.get_state(),
                    "validates": validates and validate is not None, "patience": patience.state,
                }  # fmt: skip
                save(checkpoints, state, about)
                interruptions.saved()
                if stop:
                    checkpoints.wait()
                    raise stopped(number, stop)
                if validates and validate is not None:
                    validate(state, frozen, prepared, number)
        checkpoints.wait()
        folder.check()
        if early := number < config.steps:
            log.say(f"stopped at step {number}: no better in {config.patience} validations")
        best, last = (checkpoints.validation(s) or {} for s in (checkpoints.best(), number))
        summary = {
            "steps": number, "stopped_early": early, "parameters_trained": trained, "parameters": total,
            "skipped_steps": int(state.skipped), "devices": mesh.size,
            "step_seconds_median": steps.timer.median(), "peak_memory_gb": peak_memory(),
            "base": before, "final": last.get("metrics"), "best": best.get("metrics"),
        }  # fmt: skip
        log.finish(last.get("metrics") or {})
        if chief:
            finish(run, summary)
        log.say(f"done: {run / 'report.html'}")
        return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    options = parse("train", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    with joined_as(options):
        train(load_config(options.config, options.overrides))
