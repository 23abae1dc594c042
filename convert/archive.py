"""Reading `.pt` archives, one tensor at a time.

Nothing in a file is ever executed: pickles are opened with torch's weights-only reader, and what it
refuses is named. Bytes are checked against the archive's checksums as they are read.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sam3jax.files import FileError
from sam3jax.weights.tensor_file import Tensor

# Where trainers keep the weights among other things.
_NESTS = ("model", "state_dict", "model_state_dict", "model_state", "module", "ema_model", "params")

_CHUNK = 1 << 24  # bytes


class _Damaged(FileError):
    """torch cannot load the archive."""


def read_archive(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a `.pt` file, unread, and the names of what else lies in it.

    Raises FileError, with its own sentence for each: cut short, no archive, a pickle that carries code,
    no tensors; and when a tensor is read whose bytes are damaged.
    """
    _check_archive(path)
    try:
        state, ignored = _state_dict(_load(path, map_location="meta"), path)
    except _Damaged:
        # Or it holds a kind of tensor that has no form without bytes, which is named below.
        state, ignored = {}, ()
    entries = _entries(path)
    places = {n: place for n, t in state.items() if (place := _place(t)) is not None}
    if state and all(places.get(n) in entries for n in state):
        return {n: _file_tensor(path, n, t, entries[places[n]]) for n, t in state.items()}, ignored
    # An older torch, or an archive that another program packed: let torch find the bytes.
    for entry in entries.values():
        entry.check(path)
    state, ignored = _state_dict(_load(path, map_location="cpu", mmap=True), path)
    return {name: _torch_tensor(name, t, path) for name, t in state.items()}, ignored


def _load(path: Path, **options: Any) -> Any:
    """torch.load, weights only; its refusals and failures as FileError."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about storages; nothing a reader could act on
        try:
            return torch.load(path, weights_only=True, **options)
        except pickle.UnpicklingError as error:
            raise FileError(_refusal(path, error)) from None
        except (RuntimeError, EOFError, KeyError, ValueError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise _Damaged(
                f"{path} is a damaged checkpoint archive ({reason}); download it again"
            ) from error


@dataclasses.dataclass
class _Entry:
    """An uncompressed entry of an archive: where its bytes begin, how many they are, their checksum."""

    name: str
    start: int
    size: int
    crc: int  # 0: the writer computed none
    sound: bool = False

    def check(self, path: Path, data: np.ndarray | None = None) -> None:
        """Raises FileError where the bytes are not those that were written. data: all of them, if at hand."""
        if self.sound or not self.crc:
            return
        crc = 0
        if data is not None:
            crc = zlib.crc32(data.view(np.uint8).data)
        else:
            for start in range(self.start, self.start + self.size, _CHUNK):
                count = min(_CHUNK, self.start + self.size - start)
                crc = zlib.crc32(np.fromfile(path, np.uint8, count, offset=start).data, crc)
        if crc != self.crc:
            raise FileError(
                f"{path} is damaged: the bytes of {self.name} do not have the checksum that the archive notes "
                f"({crc:08x}, expected {self.crc:08x}); copy or download it again"
            )
        self.sound = True


def _entries(path: Path) -> dict[int, _Entry]:
    """The entries of an archive by the place of their bytes, from the start of the file."""
    found = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)  # the lengths of name and extra field
            lengths = file.read(4)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", lengths))
            found[start] = _Entry(info.filename, start, info.file_size, info.CRC)
    return found


def _place(tensor: Any) -> int | None:
    """Where torch says that the storage of a tensor loaded to "meta" lies in the file."""
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:  # sparse
        return None
    return getattr(storage, "_checkpoint_offset", None) if tensor.is_meta else None


def _file_tensor(path: Path, name: str, tensor: Any, entry: _Entry) -> Tensor:
    """A tensor that is read from its place in the archive.

    Not through torch's memory map: pages of it stay counted as ours, and a checkpoint in bfloat16
    would take twice its size by the end.
    """
    import torch

    dtype = odd_dtypes().get(tensor.dtype)
    if dtype is None:
        dtype = _torch_tensor(name, torch.empty(0, dtype=tensor.dtype), path).dtype
    shape, strides = tuple(tensor.shape), tuple(n * dtype.itemsize for n in tensor.stride())
    start = entry.start + tensor.storage_offset() * dtype.itemsize
    contiguous = tensor.is_contiguous()
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, tensor.stride(), strict=True))

    def get(slot: tuple[int, ...]) -> np.ndarray:
        count = 0 if 0 in shape else math.prod(shape) if contiguous else reach
        flat = np.fromfile(path, dtype, count, offset=start)
        entry.check(path, flat if flat.nbytes == entry.size else None)
        if contiguous or not count:
            return flat.reshape(shape)[slot]
        return np.lib.stride_tricks.as_strided(flat, shape, strides)[slot]

    return Tensor(shape, dtype, get)


def _check_archive(path: Path) -> None:
    """Raises FileError where the file is no whole zip archive written by torch.save."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(2)
    if not head.startswith(b"PK"):
        kind = (
            "a bare pickle (torch.save before 1.6, or another program)"
            if head[:1] == b"\x80"
            else "no zip archive"
        )
        raise FileError(
            f"{path} is {kind}; a checkpoint is a zip archive written by torch.save or a safetensors file. "
            "It was not opened, since a pickle can carry code"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise FileError(
            f"{path} is cut short or damaged: a zip archive of {size:,} bytes without its end ({error}); "
            "copy or download it again"
        ) from None
    if not any(name.endswith("/data.pkl") for name in names):
        raise FileError(
            f"{path} is a zip archive but no checkpoint: it has no data.pkl, only {', '.join(names[:3])}"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise FileError(
            f"{path} is a TorchScript program, which carries code; save its state_dict() with torch.save instead"
        )
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise FileError(
            f"{path} was packed again with compression, which torch cannot read in place: unpack it and save it with torch.save"
        )
    ends = [info.header_offset + info.compress_size for info in infos]
    if max(ends, default=0) > size:
        raise FileError(
            f"{path} is cut short: {size:,} bytes, its contents need {max(ends):,}; download it again"
        )


def _refusal(path: Path, error: Exception) -> str:
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the file is not trusted; any failure leaves us with torch's own words
        names = []
    what = ", ".join(names) or str(error).splitlines()[0]
    return (
        f"{path} carries code: its pickle wants to import {what}. Refused, nothing was run. "
        "A checkpoint needs tensors only: ask its author for the state_dict, or for safetensors"
    )


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The mapping of names to tensors, wherever the trainer that wrote the file put it."""
    import torch

    ignored: list[str] = []
    while isinstance(content, Mapping):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
        nests = [k for k, v in content.items() if isinstance(v, Mapping)]
        nest = next((k for k in _NESTS if k in nests), None)
        if nest is None and not tensors and len(nests) == 1:
            nest = nests[0]
        if nest is None:
            ignored += [str(k) for k in content if str(k) not in tensors]
            return tensors, tuple(ignored)
        # A name with a dot is a module's; a tensor without one may be a loss or a step.
        if weights := [name for name in tensors if "." in name]:
            raise FileError(
                f"{path} holds weights in {nest!r} and {len(weights)} beside it: {', '.join(weights)}; "
                "put all of them into one dictionary, or remove those that do not belong to the model"
            )
        ignored += [str(k) for k in content if k != nest]
        content = content[nest]
    raise FileError(
        f"{path} holds a {type(content).__name__}, expected a dictionary of tensors (a state_dict)"
    )


def _torch_tensor(name: str, tensor: Any, path: Path) -> Tensor:
    import torch

    try:
        if dtype := odd_dtypes().get(tensor.dtype):
            carrier = torch.int16 if tensor.dtype == torch.bfloat16 else torch.uint8
            array = tensor.detach().view(carrier).numpy().view(dtype)
        else:
            array = tensor.detach().resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:
        raise FileError(
            f"{path}: tensor {name} is of kind {tensor.dtype}, {tensor.layout}, expected a plain one: convert it to "
            "float32 (dense) or remove it"
        ) from error
    return Tensor.of(array)


def odd_dtypes() -> dict[Any, np.dtype]:
    """The dtypes that numpy alone does not have."""
    import torch

    return {
        torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
        torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: np.dtype(ml_dtypes.float8_e5m2),
    }
