"""A model folder: what `python -m convert` writes and everything reads.

    config.json             the ModelConfig, where the weights came from, and checksums of all that is here
    tokenizer.json          the vocabulary
    model.safetensors       the parameter tree, layers stacked as in Flax, named vit/ln_pre/scale, ...:
                            the detector, and other parts where a training made them live
    carried.safetensors     tensors of no live part (tracker, second neck, dead ones), under torch
                            names, so that an export can hand them back; may be absent

The folder appears whole or not at all. `shipped:NAME` stands for one inside the package, in
sam3jax/assets.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam3jax.checksums import is_whole, of_bytes, sealed
from sam3jax.config import ConfigError, ModelConfig, parse_config
from sam3jax.data.tokenizer import Tokenizer
from sam3jax.files import FileError, refuse_to_replace, whole
from sam3jax.weights.names import DEFAULT_PARTS, parts_of
from sam3jax.weights.tensor_file import (
    Tensor,
    is_float,
    read_named,
    read_tensors,
    stream_tensors,
)
from sam3jax.weights.tree import flatten, put

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, CARRIED = "model.safetensors", "carried.safetensors"
NAMES = (CONFIG, TOKENIZER, WEIGHTS, CARRIED)
FORMAT = "sam3jax model folder"
VERSION = 1
SUMS = "checksums"  # {file: {array: checksum}}, {tokenizer.json: checksum}
SHIPPED = "shipped:"
_ASSETS = Path(__file__).parents[1] / "assets"


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder, its tensors unread.

    leaves: the parameter tree by path, of all parts that are live. carried: by torch name. tokenizer: the JSON text, or None.
    source: what the conversion noted about the checkpoint (layout, prefixes, ...). checked: whether the folder
    carries checksums, by which every array is checked when it is first read.
    """

    path: Path
    config: ModelConfig
    leaves: dict[tuple[str, ...], Tensor]
    carried: dict[str, Tensor]
    tokenizer: str | None
    source: dict[str, Any]
    checked: bool = False


def locate(path: str | Path) -> Path:
    """Where a model folder lies: the path itself, or sam3jax/assets/NAME for `shipped:NAME`."""
    name = str(path)
    return _ASSETS / name.removeprefix(SHIPPED) if name.startswith(SHIPPED) else Path(path)


def is_model_folder(path: str | Path) -> bool:
    """Whether a folder says of itself that it is one."""
    file = locate(path) / CONFIG
    try:
        return json.loads(file.read_text("utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def open_model_folder(path: str | Path) -> ModelFolder:
    """Open a model folder without reading its tensors.

    Raises FileError where it is none, is of a newer version, lacks a file, or holds other arrays than
    its config asks for.
    """
    asked, path = path, locate(path)
    if not is_model_folder(path):
        if str(asked).startswith(SHIPPED):
            names = sorted(p.name for p in _ASSETS.iterdir() if is_model_folder(p))
            raise FileError(
                f"{asked} is not shipped with sam3jax, it has {', '.join(SHIPPED + n for n in names)}"
            )
        what = (
            "is no model folder"
            if path.is_dir()
            else "does not exist"
            if not path.exists()
            else "is a file"
        )
        raise FileError(
            f"{path} {what}; expected a folder written by `python -m convert torch-to-jax --src sam3.pt --out {path}`"
        )
    content = json.loads((path / CONFIG).read_text("utf-8"))
    version = content.get("version", 0)
    if not isinstance(version, int) or version > VERSION:
        raise FileError(
            f"{path} is of version {version!r}, this program reads {VERSION}: update it"
        )
    try:
        config = parse_config(content.get("model", {}), ModelConfig)
    except ConfigError as error:
        raise FileError(f"{path / CONFIG}: {error}") from error
    if not (path / WEIGHTS).is_file():
        raise FileError(f"{path} has no {WEIGHTS}: convert the checkpoint again")
    sums = content.get(SUMS)
    found = read_tensors(path / WEIGHTS, _section(sums, WEIGHTS))
    leaves = {tuple(name.split("/")): t for name, t in found.items()}
    _check_leaves(path, leaves, config)
    carried: dict[str, Tensor] = {}
    if (path / CARRIED).is_file():
        carried = read_tensors(path / CARRIED, _section(sums, CARRIED))
    tokenizer = (path / TOKENIZER).read_bytes() if (path / TOKENIZER).is_file() else None
    if sums is not None:
        written = {WEIGHTS: found, CARRIED: carried}
        _check_sums(
            path, content, {name: set(tensors) for name, tensors in written.items()}, tokenizer
        )
    text = tokenizer.decode("utf-8", "replace") if tokenizer is not None else None
    return ModelFolder(
        path, config, leaves, carried, text, content.get("source", {}), sums is not None
    )


def _section(sums: Any, name: str) -> dict[str, str]:
    """The checksums of one file's arrays; {} where somebody wrote something else there."""
    found = sums.get(name) if isinstance(sums, dict) else None
    return found if isinstance(found, dict) else {}


def _check_sums(
    path: Path,
    content: Mapping[str, Any],
    written: Mapping[str, set[str]],
    tokenizer: bytes | None,
) -> None:
    """Raises FileError where config.json, the vocabulary or the list of arrays is not as it was written."""
    wrong = [] if is_whole(content) else [CONFIG]
    if not wrong:
        sums = content[SUMS]
        wrong = [
            name for name in (WEIGHTS, CARRIED) if _section(sums, name).keys() != written[name]
        ]
        if TOKENIZER in sums and (tokenizer is None or sums[TOKENIZER] != of_bytes(tokenizer)):
            wrong.append(TOKENIZER)
    if wrong:
        raise FileError(
            f"{path}: {', '.join(wrong)} changed after they were written: remove the folder, and copy it or convert "
            "the checkpoint again"
        )


def _check_leaves(
    path: Path, leaves: Mapping[tuple[str, ...], Tensor], config: ModelConfig
) -> None:
    from sam3jax.weights.parts import leaf_shapes

    want = leaf_shapes(config, _parts(leaves))
    wrong = [f"{'/'.join(p)} is missing" for p in want.keys() - leaves.keys()]
    wrong += [f"{'/'.join(p)} has no place" for p in leaves.keys() - want.keys()]
    wrong += [
        f"{'/'.join(p)} is {list(leaves[p].shape)}, expected {list(want[p])}"
        for p in want.keys() & leaves.keys()
        if leaves[p].shape != want[p]
    ]
    if wrong:
        raise FileError(
            f"{path}: {WEIGHTS} does not fit {CONFIG}, convert the checkpoint again; {len(wrong)} arrays differ: "
            f"{'; '.join(sorted(wrong))}"
        )


def _parts(leaves: Mapping[tuple[str, ...], Tensor]) -> tuple[str, ...]:
    """The parts that a weights file holds; a detector is always expected."""
    found = parts_of(path[0] for path in leaves)
    return tuple(dict.fromkeys((*DEFAULT_PARTS, *found)))


def load_tokenizer(folder: ModelFolder) -> Tokenizer:
    """The vocabulary of a model folder. Raises FileError where it holds none, or a larger one than its text tower."""
    if folder.tokenizer is None:
        raise FileError(
            f"{folder.path} has no {TOKENIZER}: convert again with --tokenizer FILE (CLIP's tokenizer.json or "
            "bpe_simple_vocab_16e6.txt.gz)"
        )
    try:
        tokenizer = Tokenizer(json.loads(folder.tokenizer), folder.config.text_length)
    except (ValueError, TypeError) as error:
        raise FileError(
            f"{folder.path / TOKENIZER} holds no vocabulary ({error}): put it back, or convert the checkpoint again"
        ) from error
    if tokenizer.vocab_size > folder.config.vocab_size:
        raise FileError(
            f"{folder.path}: the vocabulary has {tokenizer.vocab_size} tokens, the text tower {folder.config.vocab_size}"
        )
    return tokenizer


def load_params(
    folder: ModelFolder, dtype: Any = None, parts: Iterable[str] = DEFAULT_PARTS
) -> dict[str, Any]:
    """The parameter tree of a model folder; numpy arrays, floats in `dtype` or as stored.

    parts: which parts of the model become leaves (sam3jax.weights.names); those that the folder
    carries under torch names are turned, others that it holds are left out.
    Raises FileError where the folder lacks a part.
    """
    from sam3jax.weights.parts import live_parts

    params: dict[str, Any] = {}
    leaves = live_parts(folder.leaves, folder.carried, folder.config, parts, str(folder.path))
    for path, tensor in leaves.items():
        if dtype is not None and is_float(tensor.dtype):
            tensor = tensor.astype(dtype)
        put(params, path, read_named("/".join(path), tensor))
    return params


def load_model_folder(
    path: str | Path, *, dtype: Any = None, parts: Iterable[str] = DEFAULT_PARTS
) -> tuple[ModelConfig, dict[str, Any], Tokenizer]:
    """(config, params, tokenizer) of a model folder; numpy arrays, floats in `dtype` or as stored.

    parts: as in `load_params`. Raises FileError where the folder is damaged, lacks a part, or holds no
    vocabulary for its text tower.
    """
    folder = open_model_folder(path)
    tokenizer = load_tokenizer(folder)
    return folder.config, load_params(folder, dtype, parts), tokenizer


def save_model_folder(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any] | Mapping[tuple[str, ...], Tensor],
    tokenizer: Tokenizer | str | None,
    *,
    carried: Mapping[str, Tensor | np.ndarray] | None = None,
    source: Mapping[str, Any] | None = None,
    approve: Callable[[], None] | None = None,
) -> None:
    """Write a model folder; an older one in its place is replaced, one that holds other files too is not.

    params: the tree of arrays, or {path: Tensor} to be read one at a time. tokenizer: or its JSON text.
    approve: called when all arrays have been read; where it raises, nothing is left.
    Raises FileError where the place is taken by something else or the disk is full.
    """
    path = Path(path)
    refuse_to_replace(path, NAMES if is_model_folder(path) else (), "model folder")
    leaves = {"/".join(p): t for p, t in _tensors(params).items()}
    rest = {
        name: t if isinstance(t, Tensor) else Tensor.of(np.asarray(t))
        for name, t in (carried or {}).items()
    }
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": config.model_dump(mode="json"),
        "source": dict(source or {}),
    }
    size = sum(t.nbytes for t in (*leaves.values(), *rest.values()))
    with whole(path, size) as temporary:
        temporary.mkdir()
        sums: dict[str, Any] = {WEIGHTS: stream_tensors(temporary / WEIGHTS, leaves)}
        if rest:
            sums[CARRIED] = stream_tensors(temporary / CARRIED, rest)
        if tokenizer is not None:
            text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_json()
            (temporary / TOKENIZER).write_bytes(text.encode())
            sums[TOKENIZER] = of_bytes(text.encode())
        content = sealed({**content, SUMS: sums})
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        if approve is not None:
            approve()


def _tensors(tree: Mapping[Any, Any]) -> dict[tuple[str, ...], Tensor]:
    """The leaves of a tree, or of {path: tensor}."""
    by_path = {path: leaf for path, leaf in tree.items() if isinstance(path, tuple)}
    by_path |= flatten({k: v for k, v in tree.items() if not isinstance(k, tuple)})
    return {
        path: leaf if isinstance(leaf, Tensor) else Tensor.of(np.asarray(leaf))
        for path, leaf in by_path.items()
    }
