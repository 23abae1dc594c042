"""The command `sam3jax`: every door behind one name. A door is imported only when it is asked for."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from sam3jax.errors import USER_ERROR
from sam3jax.files import FileError, cache_folder, make_folder

# Command: the module whose `main` it is, and what it does.
DOORS = {
    "train": ("sam3jax.train", "train a detector on your pictures"),
    "evaluate": ("sam3jax.evaluate", "measure a run, and compare it with its base"),
    "predict": ("sam3jax.predict", "find phrases, or what is clicked on, in pictures and videos"),
    "app": ("sam3jax.app", "a page to click in, in the browser"),
    "doctor": ("sam3jax.doctor", "say what was read from a data set, and what is odd"),
    "plan": ("sam3jax.plan", "say whether a training fits a device, here or elsewhere"),
    "report": ("sam3jax.report", "write the report of a run again"),
    "export": ("sam3jax.export", "write a model as programs that need jax alone"),
    "demo": ("sam3jax.demo", "teach a tiny model five concepts, from beginning to end"),
    "convert": ("convert.__main__", "weights in, weights out, what is in a file"),
    "settings": ("sam3jax.settings", "list every setting with its meaning and bounds"),
}
_PROGRAMS = "JAX_COMPILATION_CACHE_DIR"  # jax's own name for where compiled programs are kept
# On a CPU two devices train the tiny model in three quarters of one's time. Always two: another number
# adds in another order, and the table differs a little. Accelerators are not concerned.
_ENVIRONMENT = {"demo": {"JAX_NUM_CPU_DEVICES": "2"}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sam3jax COMMAND ...`; returns the exit status, 2 for errors that the user can put right."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else USER_ERROR
    if words[0] in ("-V", "--version"):
        from sam3jax import __version__

        print(f"sam3jax {__version__}")
        return 0
    if words[0] not in DOORS:
        close = difflib.get_close_matches(words[0], DOORS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(DOORS)}"
        print(f"error: no command {words[0]!r}: {hint}", file=sys.stderr)
        return USER_ERROR
    return _open(words[0], words[1:], f"sam3jax {words[0]}")


def door(command: str) -> int:
    """Run `python -m sam3jax.COMMAND ...`; returns the exit status."""
    return _open(command, sys.argv[1:], f"python -m {DOORS[command][0].removesuffix('.__main__')}")


def _open(command: str, arguments: list[str], prog: str) -> int:
    module = DOORS[command][0]
    # Parsed here as well, before the heavy imports: --help and wrong options end the program at once.
    parser = importlib.import_module(f"{module.partition('.')[0]}.options")
    parser.parse(command, arguments, prog)
    for name, value in _ENVIRONMENT.get(command, {}).items():
        os.environ.setdefault(name, value)
    if _PROGRAMS not in os.environ:
        _keep_programs()
    return importlib.import_module(module).main(arguments)


def _keep_programs() -> None:
    """Let jax keep what it compiles for the next start of a command.

    A folder for each kind of processor: programs for one may not run on another that shares the home.
    """
    about = Path("/proc/cpuinfo")
    lines = about.read_text(errors="replace").splitlines() if about.is_file() else []
    kind = next((x for x in lines if x.startswith(("flags", "Features"))), platform.processor())
    name = f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    with contextlib.suppress(FileError):  # no home to write to: every start compiles
        os.environ[_PROGRAMS] = str(make_folder(cache_folder() / "programs" / name))


def _overview() -> str:
    lines = ["usage: sam3jax COMMAND ...", "", "Fine-tune SAM 3 in JAX.", ""]
    lines += [f"  {name:<10} {what}" for name, (_, what) in DOORS.items()]
    lines += [
        "",
        "`sam3jax COMMAND --help` shows what a command takes; `sam3jax --version` the version.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
