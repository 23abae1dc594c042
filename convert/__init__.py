"""Weights in and out: PyTorch checkpoints of SAM 3 <-> the Flax tree. `python -m convert --help`.

The names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.weights import ConversionError, to_flax, to_torch

__all__ = ["ConversionError", "to_flax", "to_torch"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("convert.weights"), name)
    raise AttributeError(f"module 'convert' has no attribute {name!r}")
