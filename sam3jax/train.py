"""Train: `python -m sam3jax.train --config configs/x.yaml section.key=value ...`.

The order of things: configuration, data, base weights (init > noise), what is trained, the step,
resume (a checkpoint in the run folder goes before everything), the loop, the summary.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sam3jax.checkpoint import (
    Base,
    Checkpoints,
    best_step,
    load_base,
    open_run_folder,
    start,
)
from sam3jax.comparison import write_evaluation, write_json
from sam3jax.config import Config, load_config
from sam3jax.data.coco import Dataset
from sam3jax.data.folders import open_datasets
from sam3jax.data.loader import make_eval_loader, make_train_loader
from sam3jax.data.pictures import DataError
from sam3jax.data.prompts import tokenize, vocabulary
from sam3jax.detector import Detector, write_thresholds
from sam3jax.doctor import describe
from sam3jax.draw import dataset_panel
from sam3jax.evaluate import detections_to_keep, evaluate_dataset
from sam3jax.log import RunLog
from sam3jax.metrics import Evaluation
from sam3jax.model import Sam3
from sam3jax.optim import build_optimizer, learning_rate
from sam3jax.report import write_report
from sam3jax.train_step import (
    encode_vocabulary,
    init_state,
    make_mesh,
    make_train_step,
    put_batch,
    put_replicated,
    text_is_trained,
)
from sam3jax.trainable import Tree, count, merge, multipliers


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

    run = open_run_folder(config)
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
        for line in describe(train_data):
            log.say(line)
        trained, total = count(trainable, rates), _size(base.params)
        log.say(f"{trained:,} parameters trained, {total:,} in the model, {mesh.size} device(s)")

        validate = Validation(config, valid_data, phrases, tokens, frozen, run, log, process)
        before = validate.base(base) if valid_data is not None and config.init else None
        frozen = put_replicated(compact(frozen, config), mesh)
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


class Validation:
    """Validates the run's weights; remembers the last and the best metrics, writes their results."""

    def __init__(
        self, config: Config, dataset: Dataset | None, phrases: tuple[str, ...], tokens: np.ndarray,
        frozen: Tree, run: Path, log: RunLog, process: dict[str, int],
    ) -> None:  # fmt: skip
        self._config, self._dataset, self._frozen = config, dataset, frozen
        self._run, self._log = run, log
        self.last: dict[str, float] | None = None
        self.best: dict[str, float] | None = None
        self._before: Evaluation | None = None
        if dataset is None:
            return
        if best_step(run) is not None:
            self.best = json.loads((run / "best.json").read_text())["metrics"]
        e = config.evaluation
        self._detector = Detector(Sam3(config.model), e, limit=detections_to_keep(dataset, e))
        self._loader = make_eval_loader(dataset, phrases, tokens, config, targets=False, **process)

    def base(self, base: Base) -> dict[str, float]:
        """Metrics of the model that the run starts from."""
        self._before = self._evaluate({"params": base.params})
        self._log.say(f"base: {_line(self._before.metrics)}")
        return self._before.metrics

    def __call__(self, state: Any, number: int) -> dict[str, float]:
        weights = state.trainable if state.ema is None else state.ema
        found = self._evaluate(merge(jax.device_get(weights), self._frozen))
        self.last = found.metrics
        self._log.valid(number, found.metrics)
        self._draw(found, number)
        name = self._config.best_metric
        if name not in found.metrics:
            raise DataError(
                f"best_metric {name!r} is not measured here; there are {', '.join(found.metrics)}"
            )
        # Of equals the later one, as the checkpoints have it.
        if self.best is None or found.metrics[name] >= self.best[name]:
            self.best = found.metrics
            if jax.process_index() == 0:
                about = {"run": str(self._run), "step": number, "weights": "tuned", "threshold": self._config.evaluation.threshold}  # fmt: skip
                write_evaluation(self._run, self._dataset, found, self._before, about=about)
                write_thresholds(self._run, found.thresholds)
                write_json(self._run / "best.json", {"step": number, "metrics": found.metrics})
        return found.metrics

    def _evaluate(self, variables: Tree) -> Evaluation:
        e = self._config.evaluation
        return evaluate_dataset(
            self._detector, variables, self._loader, self._dataset, e, batches=e.batches
        )

    def _draw(self, found: Evaluation, number: int) -> None:
        data, e = self._dataset, self._config.evaluation
        seen = {p["image_id"] for p in found.predictions}
        records = [r for r in data.images if r.id in seen or e.batches is None][: e.panels]
        for row, record in enumerate(records):
            panel = dataset_panel(record, found.predictions, data.categories, threshold=e.threshold)
            self._log.picture(number, f"{row}", panel, self._run / "predictions" / f"{number:07d}")


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


def compact(frozen: Tree, config: Config) -> Tree:
    """Frozen kernels in the compute dtype: the values each layer would cast them to, half the bytes."""
    dtype = config.model.compute_dtype

    def cast(path: tuple[Any, ...], x: Any) -> Any:
        exact = {"scoring", "bbox_embed", "presence_token_head"} & {k.key for k in path}
        as_is = exact or path[-1].key != "kernel" or x.dtype == dtype
        return x if as_is else x.astype(dtype)

    return jax.tree.map_with_path(cast, frozen)


def without_text_tower(frozen: Tree) -> Tree:
    """What a step needs that is given its phrases encoded: 1.4 GB less at full size."""
    params = {name: part for name, part in frozen["params"].items() if name != "text_encoder"}
    return {**frozen, "params": params}


def _size(tree: Tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _line(metrics: dict[str, float]) -> str:
    shown = [k for k in ("segm/AP", "segm/AP50", "bbox/AP", "cgF1") if k in metrics]
    return ", ".join(f"{k} {metrics[k]:.3f}" for k in shown)


def _peak_memory() -> float:
    """Gigabytes: of the accelerator where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sam3jax.train", description="Train a SAM 3 detector."
    )
    parser.add_argument("--config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    try:
        train(load_config(options.config, options.overrides))
    except ValueError as error:
        if type(error) is ValueError:
            raise  # ours are subclasses; a plain one is a defect and keeps its traceback
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
