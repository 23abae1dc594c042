"""What all sections of the configuration share: strict types, no unknown keys, finite numbers."""

from __future__ import annotations

from typing import Annotated, dataclass_transform

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sam3jax.errors import UserError
from sam3jax.files import at_home

BILLION = 10**9  # more than any count of steps, pictures or pixels that a run could reach
SEEDS = 2**32 - 1  # what numpy, jax and grain all accept


class ConfigError(UserError):
    """A setting is wrong. The message names it, and says what was expected and what to do."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class _Meta(type(BaseModel)):
    """Tells type checkers what `frozen` in model_config does: sections can be hashed."""


class Section(BaseModel, metaclass=_Meta):
    """A group of settings: immutable and hashable, so that a jitted function may take it.

    Types are strict: `batch_size=True` and `steps="10"` are errors. Text from a file or a command line is
    read according to the type of its field before it comes here (`loading`).
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False
    )


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("expected some text")
    return text


def _a_place(text: str) -> str:
    if any(ord(letter) < 32 for letter in text):
        raise ValueError("expected a path without line breaks or control characters")
    return at_home(text)


Text = Annotated[str, AfterValidator(_not_blank)]
Place = Annotated[Text, AfterValidator(_a_place)]  # of a file or folder; `~/` is the home folder
