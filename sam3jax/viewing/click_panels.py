"""Panels of clicked objects: picture, truth, and what came out after each click."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sam3jax.viewing import draw

SHOWN = (1, 2, 3, 5, 8, 12, 20)  # clicks behind which the masks are drawn
MOST = 4  # columns of them


def click_panel(
    picture: Image.Image,
    truth: np.ndarray,
    masks: np.ndarray,
    ious: np.ndarray,
    clicks: np.ndarray,
    *,
    title: str = "",
    height: int = 300,
) -> Image.Image:
    """picture | truth | after 1, 2, 3, ... clicks, each object in its own colour.

    truth [K, Y, X], masks [R, K, Y, X] bool on any grid over the picture; ious [R, K];
    clicks [R, K, 3]: x, y in pixels of that grid, 1 inside (green) or 0 outside (red).
    """
    rows, columns = truth.shape[1:]
    scale = np.array([picture.width / columns, picture.height / rows])
    places = (clicks[..., :2] + 0.5) * scale - 0.5
    longer = round(height * min(max(1.0, picture.width / picture.height), draw.WIDEST))

    def drawn(shapes: np.ndarray, rounds: int) -> Image.Image:
        instances = [
            draw.Instance(
                "", (0, 0, 0, 0), mask, number=k,
                clicks=tuple((float(places[r, k, 0]), float(places[r, k, 1]), bool(clicks[r, k, 2])) for r in range(rounds)),
            )
            for k, mask in enumerate(shapes)
        ]  # fmt: skip
        return draw.overlay(picture, instances, smallest=longer, largest=longer)

    parts = [("picture", drawn(truth[:0], 0)), (f"truth: {len(truth)}", drawn(truth, 0))]
    for number in shown(len(masks)):
        mean = f"{ious[number - 1].mean():.2f}" if ious.shape[1] else "-"
        caption = f"{number} click{'s' * (number > 1)}: IoU {mean}"
        parts.append((caption, drawn(masks[number - 1], number)))
    return draw.row(parts, title=title, height=height)


def shown(budget: int) -> Sequence[int]:
    """After how many clicks of a budget a panel shows the masks: the first ones, and the last."""
    found = [n for n in SHOWN if n < budget][: MOST - 1]
    return [*found, budget]
