"""Write the frozen cases under tests/golden: inputs, and what the torch package makes of them.

    python -m scripts.make_loss_golden

Needs the `test` extra (sam3, torch). The figures prove the loss where torch is not installed
(tests/test_losses.py); run it again only when a case is added.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from sam3jax.config import LossConfig
from tests.loss_cases import random_case
from tests.parity import loss_reference

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
SHAPE = dict(images=3, prompts=1, queries=5, layers=2, targets=3, instances=3, size=(3, 4))
# name: (options of random_case, options of LossConfig)
CASES: dict[str, tuple[dict, dict]] = {
    "default": ({}, {}),
    "no_targets": (dict(counts=np.zeros((3, 1), int)), {}),
    "more_targets_than_queries": (dict(queries=4, targets=6, instances=6), {}),
    "crowded": (dict(crowded=True, counts=np.full((3, 1), 3)), {}),
    "saturated": (dict(logit_scale=80.0, zero_area=True), {}),
    "weak_focal_semantic": (
        {},
        dict(
            weak_loss=True, pos_focal=True, semantic=True, normalization="none", gamma=1.5, presence_gamma=2.0,
            use_o2m_matcher_on_o2m_aux=True, mask_resolution="prediction", pad_n_queries=None,
        ),
    ),
}  # fmt: skip


def main() -> None:
    for seed, (name, (shape, options)) in enumerate(CASES.items()):
        case = random_case(100 + seed, **{**SHAPE, **shape})
        terms, grads = loss_reference.run(case, LossConfig(**options))
        arrays = {f"case/{k}": v for k, v in dataclasses.asdict(case).items()}
        arrays |= {f"term/{k}": np.float64(v) for k, v in terms.items()}
        arrays |= {f"grad/{k}": v for k, v in grads.items()}
        path = FOLDER / f"loss_{name}.npz"
        np.savez_compressed(path, config=json.dumps(options), **arrays)
        print(f"{path.name}: core_loss {terms['core_loss']:.6f}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
