"""Put a trained tiny SAM 3 into the package, in bfloat16, with the record of how it was trained.

    python -m scripts.ship_shapes --run runs/shapes_base --out sam3jax/assets/tiny_shapes

The record is `source` in the folder's config.json: every run in the chain with its settings and its
results, down to the folder that scripts.pretrain_shapes wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from sam3jax.config import Config, load_config
from sam3jax.weights.base import open_base
from sam3jax.weights.model_folder import is_model_folder, open_model_folder, save_model_folder


def record(start: str | None) -> list[dict[str, Any]]:
    """How `start` came about, oldest first: what pretrained it, then a run after the other."""
    if start is None:
        return []
    if is_model_folder(start):
        return [dict(open_model_folder(start).source)]
    path = Path(start)
    config = load_config(path / "config.yaml")
    summary = json.loads((path / "summary.json").read_text())
    told = {
        "made by": "python -m sam3jax.train",
        "settings": _without_defaults(
            config.model_dump(mode="json", exclude={"init", "output", "model"}),
            Config().model_dump(mode="json"),
        ),
        "devices": summary["devices"],
        "step_seconds_median": summary["step_seconds_median"],
        "validation": summary["best"] or summary["final"],
    }
    return [*record(config.init), told]


def _without_defaults(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            value = _without_defaults(value, defaults[key])
            if not value:
                continue
        if value != defaults.get(key):
            out[key] = value
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--out", required=True, type=Path, help="model folder to write")
    options = parser.parse_args()
    base = open_base(Config(init=str(options.run)))
    narrow = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), base.load().params)
    source = {"trained": record(str(options.run)), "jax": jax.__version__}
    save_model_folder(options.out, base.config.model, narrow, base.tokenizer, source=source)
    size = sum(f.stat().st_size for f in options.out.iterdir())
    print(f"{options.out}: {size:,} bytes")


if __name__ == "__main__":
    main()
