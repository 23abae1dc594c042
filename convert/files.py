"""Reading and writing PyTorch checkpoints: `.pt` archives, safetensors (one file or sharded), folders.

Tensors are read one at a time, so memory follows the largest tensor, not the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.archive import odd_dtypes, read_archive
from convert.folders import CARRIED, VOCABULARIES, candidates, series, weights_among
from sam3jax.files import FileError, refuse_foreign, whole
from sam3jax.weights.tensor_file import Tensor, read_header, read_named, stream_tensors

_TRANSFORMERS = "detr_decoder."  # in a transformers checkpoint, in no other


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors of a checkpoint by name, unread, and what lay around them.

    carried: tensors that an earlier export kept beside the file. config: the `config.json` beside weights
    under transformers' names, if any. tokenizer: the file beside the weights that holds a vocabulary, if any.
    ignored: other things in the file, such as an optimizer's state. others: checkpoints beside it in
    the folder that was asked for. files: all that a conversion reads of it.
    """

    path: Path
    tensors: dict[str, Tensor]
    carried: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] | None = None
    tokenizer: Path | None = None
    ignored: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

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
    names = [file.name for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    file = path / weights_among(names, path) if path.is_dir() else path
    ignored: tuple[str, ...] = ()
    refuse_foreign(file)
    shards: list[Path] = []
    if file.name.endswith(".index.json"):
        tensors, shards = _read_shards(file)
    elif _looks_like_safetensors(file):
        tensors = read_header(file)[0]
    else:
        tensors, ignored = read_archive(file)
    if not tensors:
        raise FileError(f"{file} holds no tensors; found {', '.join(ignored) or 'nothing'}")
    beside = file.with_name(file.name + CARRIED)
    carried = read_header(beside)[0] if beside.is_file() else {}
    written = file.parent / "config.json"
    # Beside a published checkpoint a config.json is somebody else's.
    transformers = any(_TRANSFORMERS in name for name in tensors)
    config = read_json(written) if transformers and written.is_file() else None
    others = tuple(name for name in candidates(names) if name != file.name)
    vocabulary = next((f for name in VOCABULARIES if (f := file.parent / name).is_file()), None)
    files = [file, *shards, *([beside] if carried else []), *([written] if config else [])]
    files += [vocabulary] if vocabulary else []
    return Checkpoint(file, tensors, carried, config, vocabulary, ignored, others, tuple(files))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileError where the file holds none."""
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
    if path.suffix == ".safetensors" and head.startswith(b"PK"):  # torch.load goes by the name
        raise FileError(
            f"{path} is a torch archive, not a safetensors file: rename it to end in .pt"
        )
    return path.suffix == ".safetensors" or (
        len(head) == 9 and head[8:] == b"{" and head[5:8] == b"\0\0\0"
    )


def _read_shards(index: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """The tensors of an index, unread, and the files that hold them."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise FileError(
            f"{index} has no weight_map of tensor names to file names: is it the index of a sharded checkpoint?"
        )
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
    _check_surplus(index, weight_map, contents)
    tensors = {tensor: contents[shard][tensor] for tensor, shard in weight_map.items()}
    return tensors, list(shards.values())


def _check_surplus(
    index: Path, weight_map: Mapping[str, str], contents: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Raises FileError where the shards hold more than their index says."""
    surplus = [
        f"{tensor} (in {shard}; {f'listed for {weight_map[tensor]}' if tensor in weight_map else 'not listed'})"
        for shard, tensors in contents.items()
        for tensor in tensors
        if weight_map.get(tensor) != shard
    ]
    if surplus:
        raise FileError(
            f"{index} and its shards do not belong together: they hold {len(surplus)} tensors more: "
            f"{', '.join(surplus)}; download all of them again"
        )
    siblings = {series(name) for name in contents}
    unlisted = [
        p.name
        for p in sorted(index.parent.glob("*-of-*"))
        if p.name not in contents and series(p.name) in siblings
    ]
    if unlisted:
        raise FileError(
            f"{index} does not list {', '.join(unlisted)} beside it: download the index again, or remove the shard"
        )


def to_torch_tensor(array: np.ndarray) -> Any:
    """A torch tensor of the same bits; bfloat16 and float8 included."""
    import torch

    array = np.require(array, requirements=["C", "W"])  # torch takes no read-only memory
    for odd, dtype in odd_dtypes().items():
        if array.dtype == dtype:
            carrier = np.int16 if odd == torch.bfloat16 else np.uint8
            return torch.from_numpy(array.view(carrier)).view(odd)
    return torch.from_numpy(array)


def write_checkpoint(
    path: str | Path, tensors: Mapping[str, Tensor], carried: Mapping[str, Tensor] | None = None
) -> None:
    """Write tensors as `.safetensors` or, with any other ending, as a torch archive.

    carried: what the layout has no place for; lies beside the file as `NAME.carried.safetensors`,
    where `read_checkpoint` finds it. Files appear whole or not at all. Raises FileError on a full disk.
    """
    path = Path(path)
    beside = path.with_name(path.name + CARRIED)
    if carried:
        with whole(beside, sum(t.nbytes for t in carried.values())) as kept:
            stream_tensors(kept, carried)
            # Inside, so that neither takes its place before both are written.
            _write_one(path, tensors)
    else:
        _write_one(path, tensors)
        beside.unlink(missing_ok=True)


def _write_one(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with whole(path, sum(t.nbytes for t in tensors.values())) as temporary:
        if path.suffix == ".safetensors":
            stream_tensors(temporary, tensors, {"format": "pt"})
            return
        torch = _torch(path)
        state = {name: to_torch_tensor(read_named(name, t)) for name, t in tensors.items()}
        with open(temporary, "wb") as file:
            _save(torch, state, file)
            file.flush()
            os.fsync(file.fileno())


def _torch(path: Path) -> Any:
    """The module torch, which writes archives. Raises FileError where it is not installed."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise FileError(
            f"writing {path.name} needs torch: pip install 'sam3jax[convert]', or give an --out that ends in "
            ".safetensors"
        ) from error
    return torch


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
