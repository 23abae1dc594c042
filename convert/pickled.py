"""What the pickle inside a `.pt` archive describes, without running anything that it names.

A pickle is a program that imports and calls. Here every name that it imports stands for one of a few
functions of this file, for an inert object that swallows whatever is done to it (numpy scalars, paths,
namespaces: harmless things that trainers save beside weights), or ends the reading with its name.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from typing import Any

import ml_dtypes
import numpy as np

from sam3jax.errors import UserError

_STORAGES: dict[str, Any] = {
    "Float": np.float32, "Double": np.float64, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16, "Long": np.int64,
    "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
    "ComplexFloat": np.complex64, "ComplexDouble": np.complex128,
}  # fmt: skip
# By torch's name of a dtype, of tensors whose storage has no kind of its own.
_DTYPES: dict[str, Any] = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2, "uint16": np.uint16,
    "uint32": np.uint32, "uint64": np.uint64,
}  # fmt: skip
_OTHER_DTYPES = {
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "complex32", "bits8", "bits16",
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
    "complex128", "qint8", "quint8", "qint32", "sparse_coo", "sparse_csr", "sparse_csc", "strided", "per_tensor_affine",
    "per_channel_affine", "sparse_bsr", "sparse_bsc", "contiguous_format", "preserve_format",
}  # fmt: skip
# Modules whose types hold values; nothing of them is imported.
_HARMLESS = {
    "numpy", "argparse", "pathlib", "datetime", "decimal", "fractions", "uuid", "types", "enum", "collections", "copyreg",
    "_codecs", "omegaconf", "yacs", "easydict", "addict",
}  # fmt: skip
_HARMLESS_NAMES = {
    *(f"builtins.{n}" for n in ("set", "frozenset", "slice", "complex", "bytearray", "range", "object", "dict", "list", "tuple", "int", "float", "str", "bool")),
    *(f"__builtin__.{n}" for n in ("set", "frozenset", "slice", "complex", "bytearray", "xrange", "object", "dict", "list", "tuple", "unicode", "long")),
    "torch.Size", "torch.device", "torch.torch_version.TorchVersion", "torch.serialization._get_layout",
    "types.SimpleNamespace",
}  # fmt: skip
_CODE_IN_HARMLESS = {"types.FunctionType", "types.CodeType", "types.LambdaType"}


class CarriesCode(UserError):
    """The pickle wants to import something that is not known to hold values only."""


class Inert:
    """An object that was not built. Whatever a pickle does to it has no effect."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return self

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    add = update = extend = append


class Record(dict):
    """A dictionary of any kind; attributes beside its entries are dropped."""

    def __setstate__(self, _: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes of an entry of the archive. dtype: None where the tensor says it; kind: torch's name of it."""

    key: str
    dtype: np.dtype | None
    kind: str


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as described. offset and strides in items. kind: torch's name of its dtype or layout.

    dtype: None where numpy has none, or where the tensor is no plain one.
    """

    storage: Storage | None
    kind: str
    dtype: np.dtype | None = None
    offset: int = 0
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    conjugate: bool = False
    negative: bool = False


def unpickle(data: bytes) -> Any:
    """The object, tensors as `Stored`. Raises CarriesCode, and any exception where the bytes are damaged."""
    return _Reader(io.BytesIO(data), encoding="utf-8").load()


# In Python rather than C: the C reader makes a table as long as the largest number that a file writes.
class _Reader(pickle._Unpickler):  # type: ignore[attr-defined]
    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole in _BUILDERS:
            return _BUILDERS[whole]
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            kind = name.removesuffix("Storage")
            dtype = _STORAGES.get(kind)
            return Storage("", None if dtype is None else np.dtype(dtype), f"torch.{kind.lower()}")
        if module == "torch" and name in _DTYPES.keys() | _OTHER_DTYPES:
            return _Kind(f"torch.{name}")
        top = module.partition(".")[0]
        if (top in _HARMLESS and whole not in _CODE_IN_HARMLESS) or whole in _HARMLESS_NAMES:
            return Inert
        raise CarriesCode(whole)

    def persistent_load(self, pid: Any) -> Storage:
        word, kind, key, *_ = pid
        if word != "storage" or not isinstance(kind, Storage) or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage is not described as torch does")
        return dataclasses.replace(kind, key=key)


class _Kind(str):
    """A dtype or layout of torch, by name."""

    def __call__(self, *_: Any) -> _Kind:
        return self


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, dtype: str | None = None
) -> Stored:
    """torch._utils._rebuild_tensor_v2; rest: gradients, hooks, and what the view does to its values."""
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    flags = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}
    kind, found = storage.kind, storage.dtype
    if dtype is not None:
        kind, given = dtype, _DTYPES.get(dtype.removeprefix("torch."))
        found = None if given is None else np.dtype(given)
    return Stored(
        storage, kind, found, _whole(offset), _sizes(shape), _sizes(strides), bool(flags.get("conj")),
        bool(flags.get("neg")),
    )  # fmt: skip


def _tensor_of_dtype(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Stored:
    return _tensor(storage, offset, shape, strides, dtype=str(dtype))


def _sizes(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, (tuple, list)):
        raise pickle.UnpicklingError("sizes that are no numbers")
    return tuple(map(_whole, sizes))


def _whole(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise pickle.UnpicklingError(f"{number!r:.40} where a size is expected")
    return number


def _first(data: Any, *_: Any) -> Any:
    return data


def _of_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    return function(*arguments)


def _other(kind: str) -> Any:
    return lambda *_: Stored(None, kind)


_BUILDERS: dict[str, Any] = {
    "collections.OrderedDict": Record,
    "collections.defaultdict": lambda *_: Record(),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_sparse_tensor": lambda layout, *_: Stored(None, str(layout)),
    "torch._utils._rebuild_sparse_csr_tensor": _other("torch.sparse_csr"),
    "torch._utils._rebuild_nested_tensor": _other("torch.nested"),
    "torch._utils._rebuild_qtensor": lambda storage, *_: Stored(
        None, storage.kind if isinstance(storage, Storage) else "quantized"
    ),
    "torch._utils._rebuild_meta_tensor_no_storage": _other("torch.meta"),
    "torch._utils._rebuild_device_tensor_from_numpy": _other("a device's own"),
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.nn.parameter.Parameter": _first,
    "torch.serialization._get_layout": lambda name, *_: str(name),
}
