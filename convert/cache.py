"""Checkpoints that `init` names, each converted once into a cache, known again by content.

$SAM3JAX_CACHE, else $XDG_CACHE_HOME/sam3jax, else ~/.cache/sam3jax
    models/<digits of the content>/    model folders
    digests/<digits of a path>.json    size, time and digest of files that were read before
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from convert.reading import Reading, understand
from convert.torch_to_jax import write_folder
from sam3jax.errors import remark
from sam3jax.files import CACHE, FileError, cache_folder, make_folder, write_text
from sam3jax.weights.model_folder import TOKENIZER, is_model_folder

_VERSION = 1  # raised where a conversion writes something else of the same checkpoint
_SCRATCH = ".new-"


def converted(init: str | Path) -> Path:
    """The model folder of a checkpoint, a transformers folder, a peft folder or a hub id.

    Converted at the first time, which takes as long as `convert torch-to-jax`; said in one line.
    Raises FileError or ConversionError, after which nothing was written.
    """
    reading = understand(init)
    models = cache_folder() / "models"
    target = models / _content(reading, cache_folder() / "digests")
    if is_model_folder(target):
        return target
    make_folder(models)
    with _alone(models) as alone:
        if not is_model_folder(target):
            if alone:
                for left in models.glob(f"{_SCRATCH}*"):  # of a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
            _convert(init, reading, target)
    return target


def _convert(init: str | Path, reading: Reading, target: Path) -> None:
    size = reading.checkpoint.nbytes
    remark(f"{init} ({size:,} bytes) is converted once into {target}, later runs read it there; {CACHE} moves it")  # fmt: skip
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=target.parent))
    try:
        _, _, vocabulary, *notes = write_folder(reading, scratch / "model")
        if not (scratch / "model" / TOKENIZER).is_file():
            raise FileError(f"{init} comes without a vocabulary, {vocabulary.partition(': ')[2]}")
        for note in notes:
            remark(note)
        if not is_model_folder(target):  # damaged, if it is there at all
            shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was first: its folder is the same
            (scratch / "model").rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _alone(models: Path) -> Iterator[bool]:
    """Waits until no other process converts into this cache; False on a file system without locks."""
    with open(models / ".lock", "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                remark("another process converts a checkpoint into the cache: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _content(reading: Reading, notes: Path) -> str:
    """Digits that are equal where all files that a conversion reads are equal, wherever they lie."""
    digests = sorted({_digest(file, notes) for file in reading.files})
    text = "\n".join([f"version {_VERSION}", *digests])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _digest(file: Path, notes: Path) -> str:
    """The SHA-256 of a file, noted with its size and time, so that gigabytes are not read each time."""
    at = file.stat()
    known = {"file": str(file.resolve()), "size": at.st_size, "time": at.st_mtime_ns}
    note = notes / f"{hashlib.sha256(known['file'].encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError):
        found = json.loads(note.read_text())
        if known.items() <= found.items():
            return str(found["sha256"])
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    with contextlib.suppress(
        FileError, OSError
    ):  # a cache that cannot be written to may still be read
        write_text(make_folder(notes) / note.name, json.dumps({**known, "sha256": digest}))
    return digest
