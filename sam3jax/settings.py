"""List the settings: `python -m sam3jax.settings [GROUP]`; docs/settings.md is its output."""

from __future__ import annotations

from collections.abc import Sequence

if __name__ == "__main__":
    from sam3jax.cli import door

    raise SystemExit(door("settings"))

from sam3jax.config.settings import page
from sam3jax.errors import exit_status
from sam3jax.options import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Print all settings, or those of one group; returns the exit status."""
    options = parse("settings", arguments)
    return exit_status(lambda: print(page(options.group), end=""))
