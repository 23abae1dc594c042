"""Which weights a task is of: the parts of the model that are live, and what it reads of them.

The one table of this. Whatever reads weights for a run looks here by `config.task`, so that a run, its
resume, its report and its export hold the same arrays.
"""

from __future__ import annotations

from typing import NamedTuple

from sam3jax.config import Config
from sam3jax.weights.names import (
    DEFAULT_PARTS,
    INTERACTIVE_PART,
    SECOND_NECK_PART,
    Entry,
    entries,
    roots,
)


class Scope(NamedTuple):
    """parts: rows of the table of names that are leaves. reads: roots of the parameter tree that the
    task's model reads; None: all. What is not read is never trained, whatever the settings match.
    """

    parts: tuple[str, ...]
    reads: frozenset[str] | None = None

    def covers(self, entry: Entry) -> bool:
        """Whether a run of this scope may move a tensor; buffers never move."""
        return not entry.is_buffer and (self.reads is None or entry.path[0] in self.reads)


DETECTION = Scope(DEFAULT_PARTS)
CLICKS = Scope(
    (*DEFAULT_PARTS, SECOND_NECK_PART, INTERACTIVE_PART),
    frozenset({"vit", *roots(SECOND_NECK_PART), *roots(INTERACTIVE_PART)}),
)
SCOPES = {"detect": DETECTION, "clips": DETECTION, "clicks": CLICKS}


def scope_of(config: Config) -> Scope:
    """The scope of a run's task."""
    return SCOPES[config.task]


def live_entries(config: Config) -> list[Entry]:
    """Every tensor of the table of names that is a leaf in a run, trained or not."""
    return entries(config.model, scope_of(config).parts)
