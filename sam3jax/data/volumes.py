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
_ROBOFLOW = re.compile(r"\.rf\.[0-9A-Za-z]+$")  # img12_png.rf.8e3f.jpg


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
        columns, rows, slices = _extent(_nifti(file))
        return (columns, rows), slices
    found = _library("pydicom", file).dcmread(file, stop_before_pixels=True)
    return (int(found.Columns), int(found.Rows)), int(getattr(found, "NumberOfFrames", 1) or 1)


@_named
def read_slice(file: Path, number: int) -> np.ndarray:
    """One slice [Y, X], in the file's own numbers (Hounsfield units in CT). Errors as `shape`."""
    if file.name.lower().endswith(_NIFTI):
        columns, rows, slices = _extent(_nifti(file))
        values = _nifti(file).dataobj
        plane = values[:, :, number] if slices > 1 or len(values.shape) > 2 else values[...]
        return np.asarray(plane, np.float32).reshape(columns, rows).T  # first axis is x
    pydicom = _library("pydicom", file)
    found = pydicom.dcmread(file)
    pixels = found.pixel_array
    plane = pixels[number] if int(getattr(found, "NumberOfFrames", 1) or 1) > 1 else pixels
    plane = plane * float(getattr(found, "RescaleSlope", 1)) + float(getattr(found, "RescaleIntercept", 0))  # fmt: skip
    plane = plane.mean(-1) if plane.ndim == 3 else plane
    return -plane if getattr(found, "PhotometricInterpretation", "") == "MONOCHROME1" else plane


def _extent(volume: Any) -> tuple[int, int, int]:
    """Columns, rows and slices. Raises ValueError for what is no stack of grey slices."""
    columns, rows, slices, *more = (*volume.shape, 1, 1)
    if any(n != 1 for n in more):
        raise ValueError(f"it holds {max(more)} volumes: save each in a file of its own")
    if volume.get_data_dtype().fields:
        raise ValueError("its slices are in colour: save them as pictures")
    return int(columns), int(rows), int(slices)


def neighbours(file: Path) -> list[Path]:
    """The file before, itself, and the file after, among those of its folder that differ in their last
    number only; at the ends, and where several have the next number, the file itself."""
    match = _match(file.name)
    row = _series(file.parent).get(_key(file.name), {})
    if match is None or not row:
        return [file] * 3
    numbers, own = sorted(row), int(match[2])
    here = numbers.index(own)
    beside = [numbers[min(max(here + step, 0), len(numbers) - 1)] for step in (-1, 1)]
    found = [file.parent / row[n][0] if n != own and len(row[n]) == 1 else file for n in beside]
    # A link may lead out of the data folder; whoever reads one has allowed it.
    before, after = (f if file.is_symlink() or not f.is_symlink() else file for f in found)
    return [before, file, after]


@functools.lru_cache(maxsize=64)
def _series(folder: Path) -> dict[tuple[str, str], dict[int, list[str]]]:
    """Name without its last number -> number -> names."""
    found: dict[tuple[str, str], dict[int, list[str]]] = {}
    for name in os.listdir(folder):
        if (match := _match(name)) and not name.startswith("."):
            found.setdefault(_key(name), {}).setdefault(int(match[2]), []).append(name)
    return found


def _match(name: str) -> re.Match[str] | None:
    """What stands before, in and behind the last number, without the ending and what Roboflow adds."""
    return _NUMBER.match(_ROBOFLOW.sub("", Path(name).stem))


def _key(name: str) -> tuple[str, str]:
    match = _match(name)
    return (match[1], match[3] + Path(name).suffix) if match else (name, "")


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
