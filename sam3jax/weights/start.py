"""What `init` may name beside a run: a model folder, or weights in torch's layouts, converted when asked for."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from sam3jax.errors import remark
from sam3jax.files import FileError, at_home
from sam3jax.weights.model_folder import SHIPPED, ModelFolder, is_model_folder, open_model_folder

_OWNER_AND_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(text: str | Path) -> bool:
    """Whether this is `owner/name` on the hub and no path: the folder that it would lie in does not exist."""
    path = Path(text)
    return (
        bool(_OWNER_AND_NAME.fullmatch(str(text)))
        and not path.exists()
        and not path.parent.is_dir()
    )


def open_start(init: str | Path) -> ModelFolder:
    """The model folder that `init` stands for, its tensors unread.

    Raises FileError, or ConversionError where a checkpoint does not fit.
    """
    folder = open_model_folder(model_folder(init))
    if not folder.checked:
        remark(
            f"{init} carries no checksums, an older sam3jax wrote it: it is read unchecked; convert it again to have them"
        )
    return folder


def model_folder(init: str | Path) -> str | Path:
    """The place of a model folder: `init` itself, or what its checkpoint, folder or hub id was converted into.

    The one place that reaches the package `convert`, by its name and only for such weights: nothing in
    sam3jax imports it, and training from a model folder does not need it.
    """
    init = at_home(str(init))
    if is_model_folder(init) or str(init).startswith(SHIPPED):
        return init
    if not (Path(init).exists() or is_hub_id(init)):
        raise FileError(
            f"{init} does not exist: expected a checkpoint, a folder of transformers, a model folder, a run folder, or "
            "a hub id such as facebook/sam3"
        )
    return importlib.import_module("convert.cache").converted(init)
