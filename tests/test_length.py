"""How long a run is: epochs, patience, and what people are told."""

from __future__ import annotations

import json

import pytest

from sam3jax import train
from sam3jax.config import ConfigError, load_config, parse_config
from sam3jax.training.length import Patience, in_steps
from tests.coco_folders import write_small_shapes
from tests.small_run import SIZES
from tests.trainings import words


@pytest.mark.parametrize(
    ("epochs", "pictures", "batch", "steps"),
    [(1, 100, 10, 10), (3, 100, 10, 30), (0.5, 100, 10, 5), (1, 101, 10, 11), (0.001, 3, 8, 1)],
)
def test_epochs_are_counted_in_steps(epochs, pictures, batch, steps):
    config = parse_config({"epochs": epochs, "batch_size": batch, "steps": 7})
    assert in_steps(config, pictures).steps == steps
    assert in_steps(parse_config({"steps": 7}), pictures).steps == 7


@pytest.mark.parametrize("setting", ["patience=2", "best_metric=segm/AP"])
def test_what_validations_decide_is_refused_without_any(setting, tmp_path, capsys):
    data = write_small_shapes(tmp_path / "data", train=2)
    settings = {"data.train": data, "output": tmp_path / "run", "batch_size": 8}
    sizes = {f"model.{k}": v for k, v in SIZES.items()}
    assert train.main([*words(settings | sizes), setting]) == 2
    name = setting.partition("=")[0]
    assert (
        f"{name} is about validations, and there are no validation data" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_a_training_of_a_path_is_told_how_to_read_it():
    with pytest.raises(ConfigError, match=r"found 'demo.yaml': load_config\(path, overrides\)"):
        train.train("demo.yaml")  # pyright: ignore


def test_patience_counts_validations_that_are_no_better():
    patience = Patience(2, least=0.1)
    ends = []
    for score in (0.1, 0.15, 0.3, 0.35, 0.39):  # better are the first and the third
        patience.add(score)
        ends.append(patience.is_over)
    assert ends == [False, False, False, False, True]


def test_patience_goes_on_from_a_checkpoint():
    whole, scores = Patience(3), [0.5, 0.4, 0.3, 0.2]
    for score in scores:
        whole.add(score)
    for stop in range(len(scores)):
        first = Patience(3)
        for score in scores[:stop]:
            first.add(score)
        second = Patience(3, state=json.loads(json.dumps(first.state)))
        for score in scores[stop:]:
            second.add(score)
        assert second.state == whole.state
        assert second.is_over


def test_without_patience_nothing_ends():
    patience = Patience(0)
    for score in (1.0, *[0.0] * 50):
        patience.add(score)
    assert not patience.is_over


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_that_does_not_improve_ends_and_is_finished(tmp_path, capsys):
    data, run = write_small_shapes(tmp_path / "data", train=4, valid=2), tmp_path / "run"
    settings = {
        "data.train": data, "output": run, "epochs": 5, "batch_size": 2, "eval_every": 2, "save_every": 4,
        "patience": 2, "optim.learning_rate": 1e-30, "log_every": 1, "draw_batches": 0,
        **{f"model.{k}": v for k, v in SIZES.items()},
    }  # fmt: skip
    config = load_config(None, words(settings))
    steps, validations = [], []
    summary = train.train(
        config,
        on_step=lambda step, metrics: steps.append((step, metrics["loss"])),
        on_validation=lambda step, metrics: validations.append(step),
    )
    # Nothing is learned: the validation of step 2 is the best one, those of 4 and 6 are no better.
    assert validations == [2, 4, 6]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert summary["steps"] == 6
    assert summary["stopped_early"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    assert [line["epoch"] for line in trained] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert trained[1]["loss"] == pytest.approx(steps[1][1])
    said = capsys.readouterr().err
    assert "compiling (a minute or two): " in said
    assert "stopped at step 6: no better in 2 validations" in said
    again = train.train(config)
    assert again == json.loads((run / "summary.json").read_text())
    assert "6 of 10 steps; set `patience` to 0 to train on" in capsys.readouterr().out
