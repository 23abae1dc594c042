"""Reading a configuration: a YAML file, `section.key=value` words, and errors in plain sentences."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sam3jax.config.schema import Config
from sam3jax.config.section import ConfigError, Section
from sam3jax.config.settings import bare, expected, section_of, words_beside

_NOTHING = ("", "~", "null", "Null", "NULL")
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_COMMA = re.compile(r",(?![^\[]*\])")  # `blocks.[0,1].*` is one pattern
S = TypeVar("S", bound=Section)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides.

    path: of the file, or the name of one that comes with sam3jax (`find_config`).
    Raises ConfigError naming the key, what was found and what was expected.
    """
    raw = _read_file(find_config(path)) if path is not None else {}
    return parse_config(read_settings(overrides, Config, raw), Config)


def check_config(config: Any) -> None:
    """Raises ConfigError for what is no Config, such as the path of one."""
    if not isinstance(config, Config):
        raise ConfigError(
            f"expected a Config, found {reprlib.repr(config)}: load_config(path, overrides) reads a file"
        )


def parse_config(raw: Mapping[str, Any], section: type[S] = Config) -> S:
    """Validate a mapping against a section, all errors in one ConfigError."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(explain(error, section))) from None


def with_settings(config: Config, words: Sequence[str], sections: Sequence[str]) -> Config:
    """A configuration with further settings, of these sections alone. Raises ConfigError."""
    for word in words:
        if word.partition("=")[0].partition(".")[0] not in sections:
            raise ConfigError(
                f"{word!r}: of a run that is there only settings of {' and '.join(sections)} can differ"
            )
    return parse_config(read_settings(words, Config, config.model_dump(mode="json")))


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to the same Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_settings(
    words: Iterable[str], section: type[Section], raw: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """{key: value} of `key=value` words, laid over `raw`; each value read as its field's type wants it.

    Raises ConfigError for a word that is not `key=value`. Values are not yet validated.
    """
    tree = dict(raw or {})
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"{word!r} is no setting: write section.key=value, for example optim.learning_rate=1e-4"
            )
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            inner = node.get(parent)
            if inner is not None and inner not in _NOTHING and not isinstance(inner, dict):
                raise ConfigError(f"setting {word!r}: {parent} is a value, not a section")
            # A copy: `raw` belongs to the caller.
            node[parent] = dict(inner) if isinstance(inner, dict) else {}
            node = node[parent]
        node[last] = _parse_value(word, value, field_at(key.split("."), section))
    try:
        return _typed_section(tree, section)
    except RecursionError:
        raise ConfigError(
            "the configuration contains itself (a YAML alias): write it out"
        ) from None


def field_at(path: Sequence[str], section: type[Section] = Config) -> FieldInfo | None:
    """The field at `section.key`, None where there is none."""
    inner: type[Section] | None = section
    field = None
    for part in path:
        field = inner.model_fields.get(part) if inner is not None else None
        inner = section_of(field.annotation) if field is not None else None
    return field


class _Plain(str):
    """A word that was written without quotes: a number, a switch, nothing, or text.

    YAML decides by the look of the word, so that a folder called 2024 becomes a number and 1e-4 becomes
    text. Here the type of the field decides.
    """


class _Loader(yaml.SafeLoader):
    """YAML in which a word without quotes stays as it was written, and no key comes twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return _Plain(node.value) if node.style is None else node.value
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [
            k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.value != "<<"
        ]
        if twice := sorted({k for k in keys if keys.count(k) > 1}):
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(twice)} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def find_config(path: str | Path) -> Path:
    """The file at `path`; for `demo`, `demo.yaml` or `configs/demo.yaml` the one that comes with sam3jax.

    A file of the user goes first. Raises ConfigError where there is neither.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    shipped = _shipped_configs()
    known = {f.stem: f for f in sorted(shipped.glob("*.yaml"))}
    if file.parent in (Path(), Path("configs")) and file.suffix in ("", ".yaml") and file.stem in known:  # fmt: skip
        return known[file.stem]
    raise ConfigError(
        f"no config file {path}: give the path of a YAML file, or one of {', '.join(known)}"
    )


def _shipped_configs() -> Path:
    """`configs` inside an installed package, beside it in a source tree."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _read_file(file: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(file.read_bytes(), _Loader) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file} is not readable YAML: {_first_lines(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds a {_kind_name(raw)}, expected `key: value` lines")
    return raw


def _parse_value(word: str, value: str, field: FieldInfo | None) -> Any:
    """The value of a `key=value` word. Text is taken as it stands, unless it is quoted or a list."""
    kind = bare(field.annotation)[0] if field is not None else None
    as_it_stands = kind is str or (get_origin(kind) is tuple and not value.strip().startswith("["))
    if as_it_stands and not value.strip().startswith(("'", '"')):
        return _Plain(value)
    try:
        found = yaml.load(value, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"setting {word!r}: the value is not readable YAML: {_first_lines(error)}"
        ) from error
    return _Plain("") if found is None else found


def _typed_section(raw: Mapping[Any, Any], section: type[Section]) -> dict[str, Any]:
    fields = section.model_fields
    return {
        str(key): _typed_field(value, fields[key]) if key in fields else _typed(value, str)
        for key, value in raw.items()
    }


def _typed_field(value: Any, field: FieldInfo) -> Any:
    kind, optional = bare(field.annotation)
    if isinstance(value, _Plain) and (value in _NOTHING or (optional and value == "None")):
        return (
            {} if section_of(kind) else [] if not optional and get_origin(kind) is tuple else None
        )
    return _typed(value, kind)


def _typed(value: Any, annotation: Any) -> Any:
    """A value as its type wants it. What does not fit stays as it is, for validation to refuse."""
    kind = bare(annotation)[0]
    if isinstance(value, dict):
        if inner := section_of(kind):
            return _typed_section(value, inner)
        return {str(k): _typed(v, str) for k, v in value.items()}
    if isinstance(value, list):
        inner = get_args(kind)[0] if get_origin(kind) is tuple else str
        return [_typed(v, inner) for v in value]
    if not isinstance(value, str):
        return value
    if get_origin(kind) is tuple:
        if isinstance(value, _Plain) and _COMMA.search(value):
            return str(value)  # several, or one with a comma in it: not guessed
        return [str(value)] if ... in get_args(kind) else str(value)
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == value), str(value))
    if kind is bool:
        return _SWITCH.get(value.lower(), str(value))
    return _read_number(value, kind) if kind in (int, float) else str(value)


def _read_number(text: str, kind: type) -> int | float | str:
    """1000, 1e3 and 1_000 are whole numbers; text that is no number stays text."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return str(text)
    return int(number) if kind is int and number.is_integer() else number


# Settings of earlier versions: what stands in their place.
_GONE = {
    "optim.accumulate": "batch_size now counts the pictures of one update, and micro_batch those that a device "
    "holds at once: batch_size 1 with accumulate 4 is batch_size=4 micro_batch=1, with a quarter of the steps",
}


def explain(error: ValidationError, section: type[Section]) -> list[str]:
    """The errors as sentences: the key, what was expected, what was found."""
    # A field of several types makes an error of each, with the same sentence.
    return list(dict.fromkeys(_explain(dict(e), section) for e in error.errors()))


def _explain(error: Mapping[str, Any], section: type[Section]) -> str:
    path = [str(part) for part in error["loc"] if part != "[key]"]
    if len(path) > 1 and (above := field_at(path[:-1], section)) and words_beside(above.annotation):
        path.pop()  # the type among several, which is no key
    name = ".".join(path) or "config"
    if name in _GONE:
        return f"config key {name} is gone: {_GONE[name]}"
    if error["type"] == "extra_forbidden":
        holder = field_at(path[:-1], section) if len(path) > 1 else None
        inner = (section_of(holder.annotation) if holder else None) or section
        close = difflib.get_close_matches(path[-1], inner.model_fields, n=1)
        hint = (
            f", did you mean {close[0]}?"
            if close
            else f"; known keys: {', '.join(inner.model_fields)}"
        )
        return f"unknown config key {name}{hint}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict) and error["type"] == "value_error":
        # About several keys, which it names.
        return f"config key {name}: {message}" if path else message
    if error["type"] != "value_error":
        field, kind = field_at(path, section), None
        if field is None and len(path) > 1:  # an element of a list or a mapping
            field = field_at(path[:-1], section)
            kind = get_args(bare(field.annotation)[0])[0] if field else None
        message = f"expected {expected(field) if field else 'text'}"
        if field and kind is None:
            kind = bare(field.annotation)[0]
            if isinstance(error["input"], str) and get_args(kind)[1:] == (...,):
                message += ", such as [a, b], or ['a, b'] for one that holds a comma"
        if get_origin(kind) is Literal:
            close = difflib.get_close_matches(str(error["input"]), map(str, get_args(kind)), n=1)
            message += f"; did you mean {close[0]}?" if close else ""
    return f"config key {name}: {message} (found {reprlib.repr(error['input'])})"


def _first_lines(error: Exception) -> str:
    """The error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _kind_name(value: Any) -> str:
    return "list" if isinstance(value, list) else "text"
