"""Stacks of slices: NIfTI (through nibabel), DICOM (through pydicom), or a folder of pictures.

Both libraries are optional. A slice of a volume is one picture: `frame` of its entry says which.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from sam3jax.data.ledger import DataError

Result = TypeVar("Result")

_NIFTI, _DICOM = (".nii", ".nii.gz"), (".dcm", ".dicom")
_NUMBER = re.compile(r"^(.*?)(\d+)(\D*)$")


def is_volume(file: Path) -> bool:
    """Whether another library than Pillow reads the file."""
    return file.name.lower().endswith(_NIFTI + _DICOM)


def _named(read: Callable[..., Result]) -> Callable[..., Result]:
    """Turns what the libraries raise, errors of their own kinds, into a ValueError."""

    @functools.wraps(read)
    def reading(*arguments: Any) -> Result:
        try:
            return read(*arguments)
        except (DataError, FileNotFoundError):
            raise
        except Exception as error:
            raise ValueError(str(error)) from error

    return reading


@_named
def shape(file: Path) -> tuple[tuple[int, int], int]:
    """(width, height) of a slice, and the number of slices. Raises DataError, ValueError."""
    if file.name.lower().endswith(_NIFTI):
        size = (*_nifti(file).shape, 1, 1)
        return (int(size[0]), int(size[1])), int(size[2])
    found = _library("pydicom", file).dcmread(file, stop_before_pixels=True)
    return (int(found.Columns), int(found.Rows)), int(getattr(found, "NumberOfFrames", 1) or 1)


@_named
def read_slice(file: Path, number: int) -> np.ndarray:
    """One slice [Y, X], in the file's own numbers (Hounsfield units in CT). Errors as `shape`."""
    if file.name.lower().endswith(_NIFTI):
        values = _nifti(file).dataobj
        plane = values[..., number] if len(values.shape) == 3 else values[...]
        return np.asarray(plane, np.float32).T  # first axis is x
    pydicom = _library("pydicom", file)
    found = pydicom.dcmread(file)
    pixels = found.pixel_array
    plane = pixels[number] if int(getattr(found, "NumberOfFrames", 1) or 1) > 1 else pixels
    plane = plane * float(getattr(found, "RescaleSlope", 1)) + float(getattr(found, "RescaleIntercept", 0))  # fmt: skip
    plane = plane.mean(-1) if plane.ndim == 3 else plane
    return -plane if getattr(found, "PhotometricInterpretation", "") == "MONOCHROME1" else plane


def neighbours(file: Path) -> list[Path]:
    """The file before, itself, and the file after, among those of its folder that differ in their last
    number only; at the ends the file itself."""
    row = _series(file.parent).get(_key(file.name), [])
    names = [name for _, name in row]
    if file.name not in names:
        return [file] * 3
    here = names.index(file.name)
    steps = [min(max(here + step, 0), len(names) - 1) for step in (-1, 0, 1)]
    return [file.parent / names[step] for step in steps]


@functools.lru_cache(maxsize=64)
def _series(folder: Path) -> dict[tuple[str, str], list[tuple[int, str]]]:
    """Name without its last number -> (number, name), in order."""
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in os.listdir(folder):
        if (match := _NUMBER.match(name)) and not name.startswith("."):
            found.setdefault(_key(name), []).append((int(match[2]), name))
    return {key: sorted(names) for key, names in found.items()}


def _key(name: str) -> tuple[str, str]:
    match = _NUMBER.match(name)
    return (match[1], match[3]) if match else (name, "")


@functools.lru_cache(maxsize=8)
def _nifti(file: Path):
    return _library("nibabel", file).load(file)


def _library(name: str, file: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"picture {file} needs {name}: pip install {name}, or save its slices as PNG or TIFF"
        ) from error
