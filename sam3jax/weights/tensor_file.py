"""Safetensors files, read one tensor at a time and written as a stream, bfloat16 included.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header,
the header {name: {dtype, shape, data_offsets}}, then the data. The package's own numpy interface knows
neither bfloat16 nor writing without all tensors in memory; the files are the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sam3jax.checksums import of_array
from sam3jax.files import FileError, refuse_foreign, whole

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read when asked for.

    get(slot) returns the sub-array at a leading index, `()` for all of it, as numpy.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    get: Callable[[tuple[int, ...]], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        """An array that is already there."""
        return cls(tuple(array.shape), array.dtype, lambda slot: np.asarray(array[slot]))

    def read(self, slot: tuple[int, ...] = ()) -> np.ndarray:
        """The array, or the part of it at a leading index."""
        return self.get(slot)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def astype(self, dtype: np.dtype) -> Tensor:
        """The same in another dtype, converted when read."""
        return Tensor(self.shape, np.dtype(dtype), lambda slot: to_dtype(self.get(slot), dtype))


def is_float(dtype: np.dtype) -> bool:
    """Whether the dtype is a real floating one, bfloat16 and float8 included (numpy calls those void)."""
    return _CODES.get(dtype, "").startswith(("F", "BF"))


def to_dtype(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array in another dtype. Raises FileError where a finite number would not stay one."""
    with np.errstate(over="ignore"):
        out = array.astype(dtype, copy=False)
    if is_float(array.dtype) and is_float(out.dtype) and out.dtype != array.dtype:
        lost = ~np.isfinite(out) & np.isfinite(array)
        if lost.any():
            largest = np.abs(array[lost].astype(np.float64)).max()
            raise FileError(
                f"{lost.sum():,} of {lost.size:,} numbers, up to {largest:.4g}, do not fit {out.dtype} (at most "
                f"{float(ml_dtypes.finfo(out.dtype).max):.4g}); take bfloat16 or float32"
            )
    return out


def read_named(name: str, tensor: Tensor) -> np.ndarray:
    """The array of a tensor, with its name in the sentence where that fails."""
    try:
        return tensor.read()
    except FileError as error:
        raise FileError(f"tensor {name}: {error}") from error


def read_tensors(path: str | Path, sums: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, unread.

    sums: what `stream_tensors` returned; each tensor is checked when it is first read.
    Raises FileError where the file is damaged.
    """
    return read_header(path, sums)[0]


def read_header(
    path: str | Path, sums: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, unread, and the metadata of a safetensors file. sums: see `read_tensors`.

    Raises FileError where the file is cut short or is something else.
    """
    path = Path(path)
    refuse_foreign(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        if size < 8 or length > _MAX_HEADER:
            raise FileError(
                f"{path} is not a safetensors file: it begins with no header of that format; "
                "is it complete, and does its name end as it should?"
            )
        if start > size:
            raise FileError(
                f"{path} is cut short: {size:,} bytes, its header alone takes {start:,}; fetch it again"
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_once)
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict):
                raise ValueError("__metadata__ is no object")
            spans = {name: _span(name, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(
                f"{path} is not a safetensors file: unreadable header ({error})"
            ) from error
    expected = start + max((end for *_, end in spans.values()), default=0)
    if size < expected:
        raise FileError(
            f"{path} is cut short: {size:,} bytes of {expected:,}; copy or download it again"
        )
    _check_spans(path, {name: span[2:] for name, span in spans.items()}, size - start)

    return {
        name: _file_tensor(path, dtype, shape, start + begin, (sums or {}).get(name))
        for name, (dtype, shape, begin, _) in spans.items()
    }, metadata


def _file_tensor(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int, expected: str | None
) -> Tensor:
    unchecked = [expected] if expected else []

    def get(slot: tuple[int, ...]) -> np.ndarray:
        if slot and unchecked:
            get(())
        rest = shape[len(slot) :]
        before = int(np.ravel_multi_index(slot, shape[: len(slot)])) if slot else 0
        count = math.prod(rest)
        # A plain read, not a memory map: mapped pages would count as ours until the file is closed.
        start = offset + before * count * dtype.itemsize
        array = np.fromfile(path, dtype, count, offset=start).reshape(rest)
        if unchecked:
            if (found := checksum(array)) != expected:
                raise FileError(
                    f"its bytes in {path} are not those that were written (checksum {found}, expected {expected}): "
                    "remove them, and copy them or convert the checkpoint again"
                )
            unchecked.clear()
        return array

    return Tensor(shape, dtype, get)


def checksum(array: np.ndarray) -> str:
    """Eight hexadecimal digits of an array's bytes."""
    return f"{of_array(array):08x}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where a name stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} stands in it twice")
    return found


def _span(name: str, entry: dict[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} of {name} is not known here")
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        good = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not good:
            raise ValueError(f"{numbers!r:.80} of {name}, expected whole numbers from 0")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - begin} bytes for {dtype} {shape}")
    return dtype, tuple(shape), begin, end


def _check_spans(path: Path, spans: Mapping[str, tuple[int, int]], size: int) -> None:
    """Raises FileError where the tensors do not fill the data one behind the other, as the format demands."""
    at = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != at:
            what = "overlap" if begin < at else "leave a hole"
            raise FileError(
                f"{path} is damaged: the bytes of {name} begin at {begin:,}, expected {at:,}: its tensors {what}; "
                "download it again"
            )
        at = end
    if at != size:
        raise FileError(
            f"{path} is damaged: {size - at:,} bytes follow that belong to no tensor; download it again"
        )


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, one tensor in memory at a time; the file appears whole or not at all.

    Raises FileError where the disk is full or a dtype has no place in the format.
    """
    with whole(path, sum(t.nbytes for t in tensors.values())) as temporary:
        stream_tensors(temporary, tensors, metadata)


def stream_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """write_tensors to a place that `whole` gave. Returns the checksum of each tensor."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, sums = 0, {}
    # Larger items first, as the format's own writer does, so that every tensor lies aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise FileError(
                f"tensor {name} is {tensor.dtype}, which a safetensors file cannot hold; expected one of "
                f"{', '.join(map(str, _CODES))}: convert it or remove it"
            )
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name]
            array = np.asarray(read_named(name, tensor), order="C")
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise AssertionError(
                    f"{name}: promised {tensor.dtype} {tensor.shape}, got {array.dtype} {array.shape}"
                )
            file.write(array.reshape(-1).view(np.uint8).data)
            sums[name] = checksum(array)
    return sums
