"""JSON files: read with errors for people, and told apart from other JSON without parsing them."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sam3jax.data.ledger import DataError, shown

SECTIONS = ("images", "annotations", "categories")
_LISTS = (  # tools that write a list of pictures
    ("Label Studio", ("annotations", "data")),
    ("Label Studio", ("image", "label")),
    ("CreateML", ("image", "annotations")),
    ("Labelbox", ("data_row", "projects")),
)
_DICTIONARIES = (
    ("VIA", ("_via_img_metadata",)),
    ("Datumaro", ("categories", "items")),
    ("SuperAnnotate", ("metadata", "instances")),
    ("Supervisely", ("classes", "tags")),
    ("Supervisely", ("objects", "size")),
    ("FiftyOne", ("samples",)),
    ("labelme", ("shapes", "imagePath")),
)
_MAGIC = ((b"PK\3\4", "an archive: unpack it"), (b"\x1f\x8b", "an archive: unpack it"),
          (b"\x89PNG", "a picture: give the folder"), (b"\xff\xd8\xff", "a picture: give the folder"))  # fmt: skip


def load_json(path: Path) -> Any:
    """The parsed file; DataError where it is not JSON, or where a section stands in it twice."""
    if not path.is_file():
        raise DataError(f"cannot read {path}: it is no regular file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not data.strip():
        raise DataError(f"{path} is not JSON (it is empty): export the annotations again")
    if what := next((what for magic, what in _MAGIC if data.startswith(magic)), None):
        raise DataError(f"{path} is {what}")
    # JSON allows a key twice, and the first one is lost in silence.
    twice = any(data.count(f'"{key}"'.encode()) > 1 for key in SECTIONS)
    try:
        with no_collection():
            return json.loads(data, object_pairs_hook=_once if twice else None)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except ValueError as error:  # bad syntax, bad encoding, a number of more than 4,300 digits
        raise DataError(f"{path} is not JSON ({error}): export the annotations again") from error
    except RecursionError as error:
        raise DataError(
            f"{path} is nested too deeply to be read: export the annotations again"
        ) from error


def looks_like_coco(path: Path) -> bool:
    """Whether the file has a COCO file's sections; found by their names, nothing is parsed."""
    try:
        data = path.read_bytes() if path.is_file() else b""
    except OSError:
        return False
    if b"\0" in data[:4]:  # UTF-16, UTF-32
        data = data.replace(b"\0", b"")
    return b'"images"' in data and (b'"annotations"' in data or b'"categories"' in data)


def sections(raw: Any, source: str) -> tuple[list, list, list]:
    """`images`, `annotations` and `categories`. Raises DataError where `raw` is something else."""
    if tool := _tool(raw):
        raise DataError(
            f"{source} is {tool}'s own format, not COCO: export the data set from there as COCO instance "
            f"annotations"
        )
    if isinstance(raw, list):
        raise DataError(
            f"{source} is a list, expected a COCO dictionary with `images`, `annotations` and "
            f"`categories`; a list is how predictions are stored: give the ground truth"
        )
    if isinstance(raw, dict) and "videos" in raw and "images" not in raw:
        raise DataError(
            f"{source} is video data (YouTube-VIS: `videos`), expected COCO pictures with `images`: "
            f"train on it with task=clips, or export its frames as a COCO data set"
        )
    if not isinstance(raw, dict):
        missing, found = list(SECTIONS), type(raw).__name__
    else:
        missing = [key for key in SECTIONS if not isinstance(raw.get(key), list)]
        found = ", ".join(shown(key)[1:-1] for key in list(raw)[:6])
    if missing:
        raise DataError(
            f"{source} is not COCO: no list `{'`, `'.join(missing)}` (found: {found or 'nothing'}); "
            f"export the data set as COCO instance annotations"
        )
    if not raw["categories"]:
        raise DataError(f"{source} has no categories: export COCO *instance* annotations")
    return raw["images"], raw["annotations"], raw["categories"]


def _tool(raw: Any) -> str | None:
    """Whose file it is, by the names of its fields; None for COCO and for what is not known."""
    entries = raw if isinstance(raw, list) else raw.values() if isinstance(raw, dict) else ()
    first = next(iter(entries), None)
    if isinstance(first, dict) and {"filename", "regions"} <= first.keys():
        return "VIA"
    fields, tools = (first, _LISTS) if isinstance(raw, list) else (raw, _DICTIONARIES)
    if not isinstance(fields, dict) or "images" in fields:
        return None
    return next((tool for tool, own in tools if set(own) <= fields.keys()), None)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: it looks at millions of new objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs if key in SECTIONS)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise DataError(f"the section `{twice[0]}` stands in it twice: join the two")
    return dict(pairs)
