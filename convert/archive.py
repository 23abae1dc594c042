"""Reading `.pt` archives, one tensor at a time.

Nothing in a file is ever executed (convert.pickled), and torch is not needed. Bytes are checked against
the archive's checksums as they are read.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.pickled import CarriesCode, Stored, unpickle
from sam3jax.files import FileError
from sam3jax.weights.tensor_file import Tensor

# Where trainers keep the weights among other things.
_NESTS = ("model", "state_dict", "model_state_dict", "model_state", "module", "ema_model", "params")

_CHUNK = 1 << 24  # bytes
_REPEATED = 1 << 20  # bytes that a tensor may make of a smaller storage, as `expand` does


class _Damaged(FileError):
    """torch cannot load the archive."""


def read_archive(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a `.pt` file, unread, and the names of what else lies in it.

    Raises FileError, with its own sentence for each: cut short, no archive, a pickle that carries code,
    no tensors, tensors beyond their storage; and when a tensor is read whose bytes are damaged.
    """
    _check_archive(path)
    entries, folder = _entries(path)
    entry = entries[f"{folder}data.pkl"]
    data = np.fromfile(path, np.uint8, entry.size, offset=entry.start)
    entry.check(path, data)
    try:
        content = unpickle(data.tobytes())
    except CarriesCode as error:
        raise FileError(
            f"{path} carries code: its pickle wants to import {error}. Refused, nothing was run. "
            "A checkpoint needs tensors only: ask its author for the state_dict, or for safetensors"
        ) from None
    except Exception as error:  # the file is not trusted: a pickle can be wrong in every way
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise FileError(
            f"{path} is a damaged checkpoint archive ({reason:.200}); download it again"
        ) from error
    state, ignored = _state_dict(content, path)
    return {n: _file_tensor(path, n, t, entries, folder) for n, t in state.items()}, ignored


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


def _entries(path: Path) -> tuple[dict[str, _Entry], str]:
    """The entries of an archive by name, and what stands before theirs: the folder with `data.pkl`."""
    found: dict[str, _Entry] = {}
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)  # the lengths of name and extra field
            lengths = file.read(4)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", lengths.ljust(4, b"\0")))
            if start + info.file_size > size:
                raise FileError(f"{path} is cut short: {info.filename} reaches beyond its end")
            if info.filename in found:
                raise FileError(f"{path} is damaged: it holds {info.filename} twice")
            found[info.filename] = _Entry(info.filename, start, info.file_size, info.CRC)
    pickles = [name for name in found if name.endswith("/data.pkl")]
    if len(pickles) > 1:
        raise FileError(f"{path} is damaged: it holds {', '.join(pickles)}, expected one data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    order = found.get(f"{folder}byteorder")
    if order and np.fromfile(path, np.uint8, order.size, offset=order.start).tobytes() != b"little":
        raise FileError(
            f"{path} was written by a machine with another byte order: load it and save it again there, as "
            "safetensors"
        )
    return found, folder


def _file_tensor(
    path: Path, name: str, tensor: Stored, entries: Mapping[str, _Entry], folder: str
) -> Tensor:
    """A tensor that is read from its place in the archive. Raises FileError where it has none.

    Plain reads, no memory map: mapped pages stay counted as ours, and a checkpoint in bfloat16 would
    take twice its size by the end.
    """
    if tensor.storage is None or tensor.dtype is None:
        raise FileError(
            f"{path}: tensor {name} is of kind {tensor.kind}, expected a plain one: convert it to float32 (dense) "
            "or remove it"
        )
    entry = entries.get(f"{folder}data/{tensor.storage.key}")
    if entry is None:
        raise FileError(f"{path} is damaged: the storage of tensor {name} is not in it")
    dtype, shape, steps = tensor.dtype, tensor.shape, tensor.strides
    if len(shape) != len(steps):
        raise FileError(f"{path} is damaged: tensor {name} has {len(shape)} sizes, {len(steps)} strides")  # fmt: skip
    reach = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))  # fmt: skip
    need = (tensor.offset + reach) * dtype.itemsize
    if need > entry.size:
        raise FileError(
            f"{path} is damaged: tensor {name} of shape {list(shape)} reaches to byte {need:,} of a storage of "
            f"{entry.size:,} bytes; download it again"
        )
    count = math.prod(shape)
    if (total := count * dtype.itemsize) > max(entry.size, _REPEATED):
        raise FileError(
            f"{path}: tensor {name} of shape {list(shape)} makes {total:,} bytes by repeating a storage of "
            f"{entry.size:,} bytes: no weights look like that"
        )
    start = entry.start + tensor.offset * dtype.itemsize
    strides = tuple(step * dtype.itemsize for step in steps)
    contiguous = all(
        n == 1 or step == math.prod(shape[i + 1 :]) for i, (n, step) in enumerate(zip(shape, steps, strict=True))
    )  # fmt: skip

    def get(slot: tuple[int, ...]) -> np.ndarray:
        flat = np.fromfile(path, dtype, reach, offset=start)
        entry.check(path, flat if flat.nbytes == entry.size else None)
        if contiguous or not count:
            array = flat.reshape(shape)
        else:
            array = np.lib.stride_tricks.as_strided(flat, shape, strides)
        array = array.conj() if tensor.conjugate else array
        return (-array if tensor.negative else array)[slot]

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


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The mapping of names to tensors, wherever the trainer that wrote the file put it."""
    ignored: list[str] = []
    seen: set[int] = set()
    while isinstance(content, Mapping) and id(content) not in seen:
        seen.add(id(content))  # a pickle can put a dictionary into itself
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Stored)}
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


def odd_dtypes() -> dict[Any, np.dtype]:
    """The dtypes that numpy alone does not have."""
    import torch

    return {
        torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
        torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: np.dtype(ml_dtypes.float8_e5m2),
    }
