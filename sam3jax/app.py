"""A page to click in: `python -m sam3jax.app --run RUN`, or without a run the tiny model of the package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("app"))

from sam3jax.errors import exit_status
from sam3jax.options import parse
from sam3jax.viewing.click_page import build, gradio, launch
from sam3jax.viewing.click_session import Side, Studio
from sam3jax.viewing.predictor import Predictor
from sam3jax.weights.run_folder import open_run_base, read_run

SHIPPED = "shipped:tiny_shapes"
MASKS = "app_masks"  # where masks go where no training set is known


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until it is stopped."""
    options = parse("app", arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    gradio()  # refused before the models are read
    if options.run:
        open_run_base(options.run)
    studio = Studio(sides(options.run, options.model))
    folder = options.data or _training_set(options.run)
    launch(build(studio, folder), host=options.host, port=options.port)
    return 0


def sides(run: str | None, model: str | None = None) -> list[Side]:
    """Tuned and base of a run, or a model alone."""
    if run is None:
        return [Side("model", Predictor.from_model_folder(model or SHIPPED))]
    return [
        Side(name, Predictor.from_run(run, base=base))
        for name, base in (("tuned", False), ("base", True))
    ]


def _training_set(run: str | None) -> str:
    """The folder that a run was trained on, if it is one; generated pictures are not."""
    data = read_run(run).config.data.train if run else None
    return str(data) if data and Path(str(data)).exists() else MASKS
