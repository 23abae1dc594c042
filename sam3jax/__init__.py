"""SAM 3 in JAX: fine-tune, evaluate and run the promptable detector. See README.md.

The names below are imported when they are first used: `import sam3jax` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam3jax.config import Config, load_config
    from sam3jax.losses import compute_losses
    from sam3jax.matching import hungarian
    from sam3jax.model import Sam3
    from sam3jax.viewing.click_predictor import ClickPredictor
    from sam3jax.viewing.predictor import Predictor

    __version__: str

__all__ = ["ClickPredictor", "Config", "Predictor", "Sam3", "__version__", "compute_losses", "hungarian", "load_config"]  # fmt: skip

_PLACES = {
    "ClickPredictor": "sam3jax.viewing.click_predictor",
    "Config": "sam3jax.config",
    "Predictor": "sam3jax.viewing.predictor",
    "Sam3": "sam3jax.model",
    "compute_losses": "sam3jax.losses",
    "hungarian": "sam3jax.matching",
    "load_config": "sam3jax.config",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'sam3jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sam3jax")
    except PackageNotFoundError:  # run from its sources, not installed
        return "unknown"
