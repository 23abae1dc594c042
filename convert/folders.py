"""Which file of a folder or of a repository is the checkpoint, and what beside it matters."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sam3jax.files import FileError

CARRIED = ".carried.safetensors"  # beside a checkpoint: what its layout has no place for
VOCABULARIES = ("tokenizer.json", "bpe_simple_vocab_16e6.txt.gz", "merges.txt")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BESIDE = ("config.json", "vocab.json", ADAPTER_CONFIG, *VOCABULARIES)
_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
_FIRST = ("model.safetensors", "model.safetensors.index.json", ADAPTER)
_SHARD = re.compile(r"^(.*)-\d+-of-(\d+\.\w+)$")


def weights_among(names: Iterable[str], place: object) -> str:
    """The one checkpoint among the files of `place`; safetensors before pickles, the whole before shards.

    Raises FileError where there is none, or several of one kind.
    """
    names = sorted(names)
    if found := next((name for name in _FIRST if name in names), None):
        return found
    files = candidates(names)
    if len(files) == 1:
        return files[0]
    if not files and (shards := [name for name in names if _SHARD.match(name)]):
        raise FileError(
            f"{place} holds {len(shards)} shards ({shards[0]}, ...) without their index: download "
            "model.safetensors.index.json too"
        )
    found = ", ".join(files) or "no .pt or .safetensors file"
    raise FileError(f"{place} holds {found}: give the path of one checkpoint file")


def candidates(names: Iterable[str]) -> list[str]:
    """Checkpoint files among these, shards and what exports keep aside left out."""
    ours = lambda name: not name.endswith(CARRIED) and "-of-" not in name and "/" not in name
    return [name for name in sorted(names) if name.endswith(_ENDINGS) and ours(name)]


def shards_of(file: str, names: Iterable[str]) -> list[str]:
    """The shards beside an index; [] for a checkpoint in one file."""
    if not file.endswith(".index.json"):
        return []
    return [name for name in names if _SHARD.match(name)]


def series(name: str) -> str:
    """The same text for all shards of one checkpoint."""
    return _SHARD.sub(r"\1-of-\2", name)
