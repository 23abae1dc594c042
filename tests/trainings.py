"""The training command in tests: a small model, and what a run folder says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sam3jax import train
from sam3jax.training.step import make_train_step
from sam3jax.weights.run_folder import MAY_CHANGE
from tests.batches import DECODER, SMALL_MODEL


class Killed(Exception):
    """In the place of a kill."""


def words(settings: Mapping[str, Any], model: Mapping[str, Any] = SMALL_MODEL) -> list[str]:
    """The overrides of a short training of a small model."""
    common = {
        "log_every": 1, "lora.targets": list(DECODER), "optim.learning_rate": 1e-2, "optim.warmup_steps": 2,
        "evaluation.panels": 1, **{f"model.{k}": v for k, v in model.items()},
    }  # fmt: skip
    return [f"{k}={v}" for k, v in {**common, **settings}.items()]


def step_for_equal_settings() -> Callable[..., Any]:
    """`make_train_step`, but trainings that differ in nothing the step reads share one compiled step."""
    made: dict[Any, Any] = {}

    def once(task, optimizer, mesh, *, seed, ema=0.0, parts=1):
        # The schedule alone reads the number of steps; what `data` changes, shapes tell.
        optim = task.config.optim
        ends = optim.schedule != "constant" or optim.cooldown_steps
        unread = {name for name in MAY_CHANGE if "." not in name and not (ends and name == "steps")}
        settings = task.config.model_dump_json(exclude={"data", *unread})
        key = type(task), settings, mesh, seed, ema, parts
        if key not in made:
            made[key] = make_train_step(task, optimizer, mesh, seed=seed, ema=ema, parts=parts)
        return made[key]

    return once


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], Any]) -> None:
    """Do something while a training prepares its `number`th step."""
    put, steps = train.put_batch, []

    def wrapped(*given):
        steps.append(1)
        if len(steps) == number:
            action()
        return put(*given)

    monkeypatch.setattr(train, "put_batch", wrapped)


def kill() -> None:
    raise Killed


def logged(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, without what differs from process to process."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("images_per_second", "seconds_left", "peak_memory_gb")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def losses(run: Path) -> dict[int, float]:
    """Step -> loss of training."""
    return {line["step"]: line["loss"] for line in logged(run) if line["split"] == "train"}
