"""The first batches of a run, drawn into its folder: what the model sees, before hours are spent on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sam3jax.training.log import RunLog

BATCHES = "batches"  # folder of a run


def draw_first(
    number: int, draw: Callable[[], Image.Image], run: Path, log: RunLog, *, again: bool
) -> None:
    """Write batches/batch_<number>.png. A picture that cannot be written is said, and no reason to stop.

    again: False leaves a picture that is there as it is, as a run that continues wants it.
    """
    if not run.exists():  # removed meanwhile: the next save says so, nothing makes it anew
        return
    folder, name = run / BATCHES, f"batch_{number}"
    if not again and (folder / f"{name}.png").exists():
        return
    try:
        log.picture(number, name, draw(), folder)
    except OSError as error:
        log.say(f"batch {number} is not drawn: {error}")
        return
    if number == 1:
        log.say(f"look at {folder}/: what the model sees")
