"""What settings there are: the name, type, bounds, default and meaning of each, from the sections."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from sam3jax.config.model import PRESETS
from sam3jax.config.schema import Config
from sam3jax.config.section import ConfigError, Section

RUN = "run"  # the group of the settings that lie in no section
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting. name: as on the command line; default: as in YAML."""

    name: str
    field: FieldInfo
    default: str

    @property
    def line(self) -> str:
        """An entry of the list of settings, in Markdown."""
        kind = expected(self.field)
        return f"- `{self.name}` = `{self.default}` ({kind}). {self.field.description}"


def bare(annotation: Any) -> tuple[Any, bool]:
    """The type without Annotated, None and the words beside it, and whether None is allowed."""
    if get_origin(annotation) is Annotated:
        return bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [a for a in get_args(annotation) if a is not type(None)]
        return bare(inner[0])[0], type(None) in get_args(annotation)
    return annotation, False


def words_beside(annotation: Any) -> list[str]:
    """Words that a field takes in the place of its type: `auto` of `int | Literal["auto"]`."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return []
    _, *others = get_args(annotation)
    return [word for a in others if get_origin(a) is Literal for word in get_args(a)]


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    kind = bare(annotation)[0]
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def expected(field: FieldInfo) -> str:
    """What may be written, in words: "a whole number, 1 to 64, or null"."""
    kind, optional = bare(field.annotation)
    if get_origin(kind) is Literal:
        words = " or ".join(map(str, get_args(kind)))
    elif get_origin(kind) is tuple:
        count = 0 if ... in get_args(kind) else len(get_args(kind))
        words = f"a list of {count} numbers" if count else "a list of texts"
        if get_origin(get_args(kind)[0]) is Literal:
            words = f"a list of {' or '.join(get_args(get_args(kind)[0]))}"
    elif get_origin(kind) is dict:
        words = "a mapping of text to text"
    elif section_of(kind):
        words = "a section of `key: value` lines"
    else:
        words = ", ".join(filter(None, (_WORDS[kind], bounds(field))))
    for word in words_beside(field.annotation):
        words += f", {word}"
    return f"{words}{',' if ',' in words else ''} or null" if optional else words


def marks(field: FieldInfo) -> list[Any]:
    """What bounds a field, or the number among its alternatives."""
    first = next(iter(get_args(field.annotation)), None)
    inner = get_args(first)[1:] if get_origin(first) is Annotated else ()
    return [
        *field.metadata,
        *(mark for known in inner for mark in getattr(known, "metadata", [known])),
    ]


def bounds(field: FieldInfo) -> str:
    """The smallest and largest allowed number, in words; "" for other fields."""
    limits = {
        name: getattr(mark, name)
        for mark in marks(field)
        for name in ("ge", "gt", "le", "lt")
        if hasattr(mark, name)
    }
    if limits.keys() == {"ge", "le"}:
        return f"{_number(limits['ge'])} to {_number(limits['le'])}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return ", ".join(f"{words[name]} {_number(limit)}" for name, limit in limits.items())


def settings(section: type[Section] = Config, start: str = "") -> Iterator[Setting]:
    """All settings, those of the sections behind those of the run."""
    inner = []
    for name, field in section.model_fields.items():
        if found := section_of(field.annotation):
            inner.append((found, f"{start}{name}."))
        else:
            yield Setting(f"{start}{name}", field, _as_yaml(field.get_default()))
    for found, place in inner:
        yield from settings(found, place)


def groups() -> dict[str, list[Setting]]:
    """{group: its settings}."""
    found: dict[str, list[Setting]] = {}
    for setting in settings():
        group = setting.name.rpartition(".")[0] or RUN
        found.setdefault(group, []).append(setting)
    return found


def page(group: str | None = None) -> str:
    """The settings as a Markdown page, of one group or of all. Raises ConfigError."""
    found = groups()
    if group is not None and group not in found:
        raise ConfigError(f"no group of settings {group!r}: expected one of {', '.join(found)}")
    lines = [
        "# Settings",
        "",
        "Write them into a YAML file, or as `key=value` on the command line. `sam3jax settings GROUP` prints one",
        "group. After each name stand its default and, in brackets, what may be written.",
    ]
    for name in [group] if group else found:
        lines += ["", f"## {name}", ""]
        if name != RUN:
            lines += [f"{_about(name)}", ""]
        lines += [setting.line for setting in found[name]]
        if name == "model":
            lines += [
                "",
                f"`model.preset=tiny` stands for {', '.join(f'{k}={v}' for k, v in PRESETS['tiny'].items())}.",
            ]
    return "\n".join(lines) + "\n"


def _about(group: str) -> str:
    section: type[Section] = Config
    for part in group.split("."):
        section = section_of(section.model_fields[part].annotation) or section
    return (section.__doc__ or "").strip().splitlines()[0]


def _as_yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"
