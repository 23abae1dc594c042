"""Reading and writing PyTorch checkpoints: `.pt` archives, safetensors (one file or sharded), folders.

Tensors are read one at a time, so memory follows the largest tensor, not the file. Nothing in a file
is ever executed: pickles are opened with torch's weights-only reader, and what it refuses is named.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sam3jax.tensor_file import FileError, Tensor, read_header, whole, write_tensors

CARRIED = ".carried.safetensors"  # beside a checkpoint: what its layout has no place for
# Where trainers keep the weights among other things.
_NESTS = ("model", "state_dict", "model_state_dict", "model_state", "module", "ema_model", "params")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors of a checkpoint by name, unread, and what lay around them.

    carried: tensors that an earlier export kept beside the file. config: the `config.json` beside the
    weights, if any. tokenizer: the file beside the weights that holds a vocabulary, if any.
    ignored: other things in the file, such as an optimizer's state. others: checkpoints beside it in
    the folder that was asked for.
    """

    path: Path
    tensors: dict[str, Tensor]
    carried: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] | None = None
    tokenizer: Path | None = None
    ignored: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: a `.pt` or `.safetensors` file, an index of shards, or a folder with one.

    Raises FileError, with its own sentence for each: nothing there, several candidates, cut short,
    no archive, a pickle that carries code, no tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(f"there is no {path}: give the path of a checkpoint file or folder")
    file = _weights_in(path) if path.is_dir() else path
    ignored: tuple[str, ...] = ()
    if file.name.endswith(".index.json"):
        tensors = _read_shards(file)
    elif _looks_like_safetensors(file):
        tensors = read_header(file)[0]
    else:
        tensors, ignored = _read_pt(file)
    if not tensors:
        raise FileError(f"{file} holds no tensors; found {', '.join(ignored) or 'nothing'}")
    beside = file.with_name(file.name + CARRIED)
    carried = read_header(beside)[0] if beside.is_file() else {}
    config = (
        _read_json(file.parent / "config.json") if (file.parent / "config.json").is_file() else None
    )
    others = tuple(p.name for p in _candidates(path) if p != file) if path.is_dir() else ()
    vocabulary = _tokenizer_beside(file.parent)
    return Checkpoint(file, tensors, carried, config, vocabulary, ignored, others)


def _weights_in(folder: Path) -> Path:
    """The one checkpoint of a folder; safetensors before pickles, the whole before shards."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / name).is_file():
            return folder / name
    files = _candidates(folder)
    if len(files) == 1:
        return files[0]
    found = ", ".join(p.name for p in files) or "no .pt or .safetensors file"
    raise FileError(f"{folder} holds {found}: give the path of one checkpoint file")


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint files of a folder, shards and what exports keep aside left out."""
    endings = (".safetensors", ".pt", ".pth", ".bin")
    files = sorted(p for p in folder.iterdir() if p.suffix in endings)
    return [p for p in files if not p.name.endswith(CARRIED) and "-of-" not in p.name]


def _tokenizer_beside(folder: Path) -> Path | None:
    names = ("tokenizer.json", "bpe_simple_vocab_16e6.txt.gz", "merges.txt")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _looks_like_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (
        len(head) == 9 and head[8:] == b"{" and head[5:8] == b"\0\0\0"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FileError(f"{index} has no weight_map: is it the index of a sharded checkpoint?")
    shards = {name: index.parent / name for name in sorted(set(weight_map.values()))}
    absent = [name for name, path in shards.items() if not path.is_file()]
    if absent:
        raise FileError(
            f"{len(absent)} of {len(shards)} shards of {index} are absent: {', '.join(absent)}; download them too"
        )
    contents = {name: read_header(path)[0] for name, path in shards.items()}
    lost = [
        f"{tensor} (in {shard})"
        for tensor, shard in weight_map.items()
        if tensor not in contents[shard]
    ]
    if lost:
        raise FileError(f"{index} names tensors that its shards do not hold: {', '.join(lost)}")
    return {tensor: contents[shard][tensor] for tensor, shard in weight_map.items()}


def _read_pt(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    _check_archive(path)
    state, ignored = _state_dict(_load(path, map_location="meta"), path)
    places = _places(path)
    if all(_place(t) in places for t in state.values()):
        return {name: _file_tensor(path, name, t) for name, t in state.items()}, ignored
    # An older torch, or an archive that another program packed: let torch find the bytes.
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
            raise FileError(
                f"{path} is a damaged checkpoint archive ({reason}); download it again"
            ) from error


def _places(path: Path) -> frozenset[int]:
    """Where the uncompressed contents of an archive begin, in bytes from the start of the file."""
    found = set()
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(
                info.header_offset + 26
            )  # lengths of name and extra field, in the local header
            name, extra = struct.unpack("<HH", file.read(4))
            if info.compress_type == zipfile.ZIP_STORED:
                found.add(info.header_offset + 30 + name + extra)
    return frozenset(found)


def _place(tensor: Any) -> int | None:
    """Where torch says that the storage of a tensor loaded to "meta" lies in the file."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if tensor.is_meta else None


def _file_tensor(path: Path, name: str, tensor: Any) -> Tensor:
    """A tensor that is read from its place in the archive.

    Not through torch's memory map: pages of it stay counted as ours, and a checkpoint in bfloat16
    would take twice its size by the end.
    """
    import torch

    dtype = np.dtype(
        _odd_dtypes().get(tensor.dtype) or torch.empty(0, dtype=tensor.dtype).numpy().dtype
    )
    shape, strides = tuple(tensor.shape), tuple(n * dtype.itemsize for n in tensor.stride())
    start = _place(tensor) + tensor.storage_offset() * dtype.itemsize
    contiguous = tensor.is_contiguous()
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, tensor.stride(), strict=True))

    def get(slot: tuple[int, ...]) -> np.ndarray:
        count = 0 if 0 in shape else math.prod(shape) if contiguous else reach
        flat = np.fromfile(path, dtype, count, offset=start)
        if contiguous or not count:
            return flat.reshape(shape)[slot]
        return np.lib.stride_tricks.as_strided(flat, shape, strides)[slot]

    return Tensor(shape, dtype, get)


def _check_archive(path: Path) -> None:
    """Raises FileError where the file is no whole zip archive written by torch.save."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
    if size == 0:
        raise FileError(f"{path} is empty (0 bytes); download it again")
    if head.startswith(b"version https://git-lfs"):
        raise FileError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b'{"error')):
        raise FileError(
            f"{path} is a web page, not a checkpoint: the download needs access to the gated repository"
        )
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
        tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
        nest = next((k for k in _NESTS if isinstance(content.get(k), Mapping)), None)
        if nest is None:
            ignored += [str(k) for k in content if k not in tensors]
            return {str(k): v for k, v in tensors.items()}, tuple(ignored)
        ignored += [str(k) for k in content if k != nest]
        content = content[nest]
    raise FileError(
        f"{path} holds a {type(content).__name__}, expected a dictionary of tensors (a state_dict)"
    )


def _torch_tensor(name: str, tensor: Any, path: Path) -> Tensor:
    import torch

    try:
        if dtype := _odd_dtypes().get(tensor.dtype):
            carrier = torch.int16 if tensor.dtype == torch.bfloat16 else torch.uint8
            array = tensor.detach().view(carrier).numpy().view(dtype)
        else:
            array = tensor.detach().resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:
        raise FileError(
            f"{path}: tensor {name} of kind {tensor.dtype}, {tensor.layout} cannot be read: {error}"
        ) from error
    return Tensor.of(array)


def to_torch_tensor(array: np.ndarray) -> Any:
    """A torch tensor of the same bits; bfloat16 and float8 included."""
    import torch

    array = np.require(array, requirements=["C", "W"])  # torch takes no read-only memory
    for odd, dtype in _odd_dtypes().items():
        if array.dtype == dtype:
            carrier = np.int16 if odd == torch.bfloat16 else np.uint8
            return torch.from_numpy(array.view(carrier)).view(odd)
    return torch.from_numpy(array)


def _odd_dtypes() -> dict[Any, np.dtype]:
    """The dtypes that numpy alone does not have."""
    import torch

    return {
        torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
        torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: np.dtype(ml_dtypes.float8_e5m2),
    }


def write_checkpoint(
    path: str | Path, tensors: Mapping[str, Tensor], carried: Mapping[str, Tensor] | None = None
) -> None:
    """Write tensors as `.safetensors` or, with any other ending, as a torch archive.

    carried: what the layout has no place for; lies beside the file as `NAME.carried.safetensors`,
    where `read_checkpoint` finds it. Files appear whole or not at all. Raises FileError on a full disk.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        write_tensors(path, tensors, {"format": "pt"})
    else:
        import torch

        with whole(path, sum(t.nbytes for t in tensors.values())) as temporary:
            state = {name: to_torch_tensor(t.read()) for name, t in tensors.items()}
            with open(temporary, "wb") as file:
                _save(torch, state, file)
                file.flush()
                os.fsync(file.fileno())
    beside = path.with_name(path.name + CARRIED)
    if carried:
        write_tensors(beside, carried)
    else:
        beside.unlink(missing_ok=True)


def _save(torch: Any, state: Mapping[str, Any], file: Any) -> None:
    """torch.save, with the disk's own error instead of torch's "unexpected pos" about it."""
    failures: list[OSError] = []

    class Watched:
        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failures.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(state, Watched())
    except (RuntimeError, OSError):
        if failures:
            raise failures[0] from None
        raise
