"""Write report.html into a run folder: `python -m sam3jax.report RUN`."""

from __future__ import annotations

from collections.abc import Sequence

if __name__ == "__main__":  # before the heavy imports, so that --help answers at once
    from sam3jax.cli import door

    raise SystemExit(door("report"))

from sam3jax.errors import exit_status
from sam3jax.options import parse
from sam3jax.viewing.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print its path; returns the exit status."""
    options = parse("report", arguments)
    return exit_status(lambda: print(write_report(options.run)))
