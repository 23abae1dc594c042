"""Checksums: what was written is known again when it is read.

Arrays and JSON carry theirs inside. The files that a run leaves for people have theirs in RECORD, beside them.
CRC-32 finds damage, not forgery, at about 1 GB/s a core.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from sam3jax.files import write_json

RECORD = ".checksums.json"
_SUM = "crc32"
_HEAD = "# crc32 of the lines below: "


def of_array(array: Any) -> int:
    """Of the bytes of an array, in C order."""
    whole = np.ascontiguousarray(array)
    return zlib.crc32(whole.reshape(-1).view(np.uint8).data)


def of_bytes(data: bytes) -> str:
    """Of a whole file."""
    return f"{zlib.crc32(data):08x}"


def of_arrays(tree: Any) -> dict[str, str]:
    """{place in the tree: dtype, shape and checksum}; the same however arrays lie on devices.

    Every process of a run calls this where arrays are split over hosts.
    """

    def one(leaf: Any) -> str:
        array = np.asarray(leaf)
        return f"{array.dtype} {list(array.shape)} {of_array(array):08x}"

    leaves = jax.tree.leaves_with_path(tree)
    with ThreadPoolExecutor() as pool:  # zlib lets go of the interpreter
        sums = pool.map(one, (_on_host(leaf) for _, leaf in leaves))
        return {jax.tree_util.keystr(path): s for (path, _), s in zip(leaves, sums, strict=True)}


def _on_host(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf
    if leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    return leaf if leaf.is_fully_addressable else process_allgather(leaf, tiled=True)


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Places whose arrays are not those expected, missing and superfluous ones among them."""
    return sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of the rest of it."""
    rest = {k: v for k, v in content.items() if k != _SUM}
    return {**rest, _SUM: _of_json(rest)}


def is_whole(content: Mapping[str, Any]) -> bool | None:
    """Whether a JSON object is as `sealed` left it; None where it carries no checksum."""
    if _SUM not in content:
        return None
    return content[_SUM] == sealed(content)[_SUM]


def sealed_text(text: str) -> str:
    """YAML with a checksum in a comment on top."""
    return f"{_HEAD}{zlib.crc32(text.encode()):08x}\n{text}"


def is_whole_text(text: str) -> bool:
    """Whether YAML is as `sealed_text` left it."""
    head, _, rest = text.partition("\n")
    return text == sealed_text(rest) and head.startswith(_HEAD)


def record_files(folder: Path, *names: str) -> None:
    """Note what the files of these names hold now."""
    write_json(folder / RECORD, {**_recorded(folder), **{n: _of_file(folder / n) for n in names}})


def forget(folder: Path, name: str) -> None:
    """A file is about to grow: what was noted of it no longer holds."""
    if name in (recorded := _recorded(folder)):
        write_json(folder / RECORD, {k: v for k, v in recorded.items() if k != name})


def changed(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Files that are gone or not as they were noted, of `names` or of all. [RECORD] for a damaged record."""
    try:
        recorded = _read(folder / RECORD)
    except (OSError, ValueError):
        return [RECORD]
    chosen = recorded if names is None else [n for n in names if n in recorded]
    return [n for n in chosen if _of_file(folder / n) != recorded[n]]


def _recorded(folder: Path) -> dict[str, str]:
    try:
        return _read(folder / RECORD)
    except (OSError, ValueError):
        return {}


def _read(file: Path) -> dict[str, str]:
    found = json.loads(file.read_text())
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def _of_file(file: Path) -> str:
    try:
        return of_bytes(file.read_bytes())
    except OSError:
        return "gone"


def _of_json(content: Any) -> str:
    once = json.loads(json.dumps(content))  # keys become text, tuples lists
    return f"{zlib.crc32(json.dumps(once, sort_keys=True).encode()):08x}"
