"""How much of what was trained is lost where an export rounds it."""

from __future__ import annotations

import math

import numpy as np

from convert.layouts import FLOATS
from convert.sources import Training
from convert.weights import part_tensors
from sam3jax.weights.model_folder import ModelFolder
from sam3jax.weights.names import entries, parts_of
from sam3jax.weights.tensor_file import DTYPES


def rounding(folder: ModelFolder, training: Training, dtype: str) -> list[str]:
    """A sentence with the measured loss, as a share of what training added; none where nothing is rounded.

    folder: with the adapters merged, in float32. The share is |rounded - exact| / |exact - base|, in norm,
    over all tensors that were trained.
    """
    if dtype == "float32" or not training.before:
        return []
    parts = parts_of(path[0] for path in training.before)
    moved = {e.torch for e in entries(folder.config, parts) if e.name in training.moved}
    exact, base = (part_tensors(t, folder.config, parts) for t in (folder.leaves, training.before))
    narrow, lost, added, shares = DTYPES[FLOATS[dtype]], 0.0, 0.0, {}
    for name in sorted(moved):
        tuned = exact[name].read().astype(np.float32)
        error = _squares(tuned.astype(narrow).astype(np.float32) - tuned)
        change = _squares(tuned - base[name].read().astype(np.float32))
        lost, added = lost + error, added + change
        if change:
            shares[name] = math.sqrt(error / change)
    if not added:
        return []
    worst = max(shares, key=lambda name: shares[name])
    return [
        f"{dtype} as asked: the rounding is {math.sqrt(lost / added):.2g} times what training changed "
        f"({shares[worst]:.2g} in {worst}); --dtype float32 keeps all of it"
    ]


def _squares(x: np.ndarray) -> float:
    return float(np.sum(np.square(x, dtype=np.float64)))
