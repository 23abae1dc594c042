"""Weights in and out: PyTorch checkpoints of SAM 3 <-> the Flax tree. `python -m convert --help`."""

from convert.weights import ConversionError, to_flax, to_torch

__all__ = ["ConversionError", "to_flax", "to_torch"]
