"""What is wrong with the numbers of a checkpoint: NaN, infinity, nothing but zeros."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from convert.weights import ConversionError
from sam3jax.weights.tensor_file import Tensor, is_float, read_named


class Watch:
    """Looks at tensors while they are read, so that nothing is read twice for it.

    broken: {name: how many of its numbers are not finite}. zeros: names of matrices of zeros; a vector of
    zeros is a usual beginning (biases), a matrix is not.
    """

    def __init__(self) -> None:
        self.broken: dict[str, int] = {}
        self.zeros: list[str] = []
        self._seen: set[str] = set()

    def over(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, looked at when they are read."""
        return {name: self._watched(name, tensor) for name, tensor in tensors.items()}

    def refuse_broken(self) -> None:
        """Raises ConversionError that names all tensors seen so far that are not finite."""
        if self.broken:
            raise ConversionError(
                f"{_broken(self.broken)}: nothing could be computed; download it again"
            )

    def _watched(self, name: str, tensor: Tensor) -> Tensor:
        if not is_float(tensor.dtype) or not tensor.nbytes:
            return tensor

        def get(slot: tuple[int, ...]) -> np.ndarray:
            array = tensor.read()
            if name not in self._seen:
                self._seen.add(name)
                self._look(name, array)
            return array[slot]

        return Tensor(tensor.shape, tensor.dtype, get)

    def _look(self, name: str, array: np.ndarray) -> None:
        low, high = _bounds(array)
        if not np.isfinite(low) or not np.isfinite(high):
            self.broken[name] = array.size - int(np.count_nonzero(np.isfinite(array)))
        elif array.ndim > 1 and low == high == 0:
            self.zeros.append(name)


def looked_at(live: Mapping[str, Tensor], carried: Mapping[str, Tensor]) -> tuple[Watch, Watch]:
    """What there is to say of tensors that are used and of carried ones. Reads every tensor."""
    watches = Watch(), Watch()
    for watch, tensors in zip(watches, (live, carried), strict=True):
        for name, tensor in watch.over(tensors).items():
            read_named(name, tensor)
    return watches


def value_notes(used: Watch, carried: Watch) -> list[str]:
    """Sentences about numbers that a person should look at."""
    zeros = f"{len(used.zeros)} tensors are zeros only: {', '.join(used.zeros)}"
    return [
        *([f"PROBLEM: {_broken(used.broken)}"] if used.broken else []),
        *([f"carried, {_broken(carried.broken)}"] if carried.broken else []),
        *([zeros] if used.zeros else []),
    ]


def _bounds(array: np.ndarray) -> tuple[float, float]:
    """Smallest and largest number, NaN where there is one; without an array beside it."""
    if array.dtype.itemsize < 4:  # numpy compares half precision number by number
        array = array.astype(np.float32)
    with np.errstate(invalid="ignore"):
        return float(array.min()), float(array.max())


def _broken(broken: Mapping[str, int]) -> str:
    listed = ", ".join(f"{name} ({n:,})" for name, n in broken.items())
    return f"{len(broken)} tensors hold NaN or infinity: {listed}"
