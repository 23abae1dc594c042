"""What is wrong with the numbers of a checkpoint: NaN, infinity, nothing but zeros."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from convert.weights import ConversionError
from sam3jax.weights.tensor_file import Tensor, is_float, read_named


def examine(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], list[str]]:
    """({name: how many of its numbers are not finite}, names of matrices of zeros). Reads every tensor.

    A vector of zeros is a usual beginning (biases), a matrix of zeros is not.
    """
    broken: dict[str, int] = {}
    zeros: list[str] = []
    for name, tensor in tensors.items():
        if not is_float(tensor.dtype) or not tensor.nbytes:
            continue
        array = read_named(name, tensor)
        if wrong := array.size - int(np.count_nonzero(np.isfinite(array))):
            broken[name] = wrong
        elif array.ndim > 1 and not array.any():
            zeros.append(name)
    return broken, zeros


def value_notes(live: Mapping[str, Tensor], carried: Mapping[str, Tensor]) -> list[str]:
    """Sentences about numbers that a person should look at, for `inspect`."""
    broken, zeros = examine(live)
    beside, _ = examine(carried)
    notes = [f"PROBLEM: {_broken(broken)}"] if broken else []
    if beside:
        notes.append(f"carried, {_broken(beside)}")
    return [*notes, *_zeros(zeros)]


def refuse_broken(live: Mapping[str, Tensor], carried: Mapping[str, Tensor]) -> list[str]:
    """The sentences of `value_notes`. Raises ConversionError where a tensor that is used is not finite."""
    broken, zeros = examine(live)
    if broken:
        raise ConversionError(f"{_broken(broken)}: nothing could be computed; download it again")
    beside, _ = examine(carried)
    return [*([f"carried, {_broken(beside)}"] if beside else []), *_zeros(zeros)]


def _broken(broken: Mapping[str, int]) -> str:
    listed = ", ".join(f"{name} ({n:,})" for name, n in broken.items())
    return f"{len(broken)} tensors hold NaN or infinity: {listed}"


def _zeros(zeros: list[str]) -> list[str]:
    return [f"{len(zeros)} tensors are zeros only: {', '.join(zeros)}"] if zeros else []
