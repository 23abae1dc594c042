"""Files and folders on the disk: written whole or not at all, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sam3jax.errors import DISK_FULL, UserError

CACHE = "SAM3JAX_CACHE"


class FileError(UserError):
    """A file cannot be read or written; the message says what was found and what to do."""


def cache_folder() -> Path:
    """Where what can be made again is kept: $SAM3JAX_CACHE, else $XDG_CACHE_HOME/sam3jax, else ~/.cache/sam3jax."""
    if place := os.environ.get(CACHE):
        return Path(place).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "sam3jax"


def at_home(word: str) -> str:
    """`~/x` and `--option=~/x` with the home folder in it: a shell expands neither inside quotes, nor YAML."""
    return re.sub(r"^(--[\w-]+=)?~(?=/)", lambda m: (m[1] or "") + os.path.expanduser("~"), word)


def make_folder(path: str | Path) -> Path:
    """The folder, made if need be. Raises FileError where there is a file, or no right to write."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "there is a file" if isinstance(error, FileExistsError) else error.strerror
        raise FileError(f"cannot write to {path}: {why}; give another folder") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise FileError(f"cannot write to {path}: Permission denied; give another folder")
    return Path(path)


def write_text(file: Path, text: str) -> None:
    """Whole or not at all, also where the machine loses its power. Raises FileError for a full disk."""
    part = file.with_name(file.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if error.errno in DISK_FULL:
            raise disk_full(file) from error
        raise


def disk_full(file: Path) -> FileError:
    """The sentence for a disk that was full when `file` was written."""
    return FileError(
        f"the disk is full: {file} could not be written. What was there before is intact; make room and run the "
        "same command again"
    )


def write_json(file: Path, content: Any) -> None:
    """Whole or not at all; indented where it is an object."""
    write_text(file, json.dumps(content, indent=1 if isinstance(content, dict) else None))


def refuse_foreign(path: Path) -> None:
    """Raises FileError where a file is, by its first bytes, what downloads leave instead of tensors."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise FileError(f"{path} is empty (0 bytes); download it again")
    if head.startswith(b"version https://git-lfs"):
        raise FileError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b'{"error')):
        raise FileError(
            f"{path} is a web page, not a checkpoint: the download needs access to the gated repository"
        )


def refuse_to_replace(folder: Path, names: Collection[str], what: str) -> None:
    """Raises FileError where something is at `folder` that is not made of `names` alone.

    what: the kind of folder that may be replaced, for the sentence.
    """
    if folder.is_file():
        raise FileError(f"{folder} is a file, expected the name of a folder: give another --out")
    if not folder.is_dir():
        return
    entries = list(folder.iterdir())
    foreign = sorted(p.name for p in entries if p.name not in names or p.is_dir())
    if foreign:
        raise FileError(
            f"{folder} exists and is no {what}: it holds {', '.join(foreign[:5])}; give another --out, or remove it"
        )


_CANNOT_WRITE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG,
    errno.EINVAL, errno.ELOOP,
)  # fmt: skip


@contextlib.contextmanager
def whole(path: str | Path, size: int = 0) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and renames it onto `path` when all went well.

    Works for files and folders (an existing folder is replaced); a link stays, and what it points to is
    replaced. Whatever goes wrong, nothing half written stays and an older file is kept.
    size: bytes about to be written, checked against the disk.
    Raises FileError where the disk is full or the place cannot be written to.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if Path.cwd().is_relative_to(target):
        raise FileError(f"{path} is the folder you are in or one above it: give another --out")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}; give another --out") from error
    if size > free:
        raise FileError(
            f"the disk is full: {path} needs {size:,} bytes, {free:,} are free in {target.parent}; nothing was written"
        )
    try:
        yield temporary
        if temporary.is_dir() and target.is_dir():
            _swap(temporary, target)
        else:
            os.replace(temporary, target)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise FileError(
                f"the disk is full ({error.strerror}) while writing {path}; nothing was kept, make room and run again"
            ) from error
        if error.errno in _CANNOT_WRITE:
            raise FileError(f"cannot write {path}: {error.strerror}; give another --out") from error
        raise
    finally:
        # What cannot be removed could not be written either; the error above says why.
        with contextlib.suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def _swap(temporary: Path, target: Path) -> None:
    """Put one folder in the place of another."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
