"""Errors that a person can put right, and what a command does about them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

USER_ERROR = 2  # argparse uses the same status for options it does not know
STOPPED = 130  # what shells expect after Ctrl-C
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """The user can put this right. The message says what was found, what was expected, what to do.

    Every error that sam3jax or convert raises on purpose is a subclass. Any other exception is a
    defect and keeps its traceback.
    """


def plain(text: object) -> str:
    """Text for a terminal: control characters, which could move the cursor or hide lines, as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def remark(text: object) -> None:
    """One line on stderr: nothing is wrong enough to stop, and still the user should know."""
    print(f"note: {plain(text)}", file=sys.stderr)


class Stopped(Exception):
    """A signal ended a command in good order. The message says how to go on; status: of the exit."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command. Returns its own status (0 for None), or 2 after one sentence on stderr."""
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return USER_ERROR
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.status
    except BrokenPipeError:
        # The reader, such as `head`, has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except OSError as error:
        if error.errno in DISK_FULL:
            remedy = "make room and run again"
        elif error.filename is not None:
            remedy = "check the path, and the rights to read and write there"
        else:
            raise
        what = error.filename or "the disk"
        why = error.strerror or type(error).__name__
        print(f"error: cannot use {what}: {why}; {remedy}", file=sys.stderr)
        return USER_ERROR
