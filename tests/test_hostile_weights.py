"""Damaged and hostile weight files: refused in words or read right, never a traceback, never run."""

import argparse
import collections
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are torch's")

from convert.files import read_checkpoint, write_checkpoint
from convert.names import sort_tensors
from convert.values import looked_at, value_notes
from convert.weights import ConversionError
from sam3jax.files import FileError
from sam3jax.weights.tensor_file import Tensor

GOOD = np.arange(6, dtype=np.float32).reshape(2, 3)
DATA = GOOD.tobytes()


def safetensors(header, data=DATA, length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(shape=(2, 3), offsets=(0, 24), dtype="F32", **others) -> dict:
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}, **others}


def row(begin, end, n=3) -> dict:
    return {"dtype": "F32", "shape": [n], "data_offsets": [begin, end]}


TWICE = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"a":{"dtype":"F32","shape":[3],"data_offsets":[12,24]}}'

SAFETENSORS = {
    "negative begin": (one(offsets=(-24, 0)), "whole numbers from 0"),
    "negative both": (one(offsets=(-48, -24)), "whole numbers from 0"),
    "end before begin": (one(offsets=(24, 0)), "-24 bytes"),
    "float offsets": (one(offsets=(0.0, 24.0)), "whole numbers from 0"),
    "text offsets": (one(offsets=("0", "24")), "whole numbers from 0"),
    "three offsets": (one(offsets=(0, 12, 24)), "unreadable header"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2, 3]}}, "data_offsets"),
    "offsets an object": ({"a": {"dtype": "F32", "shape": [6], "data_offsets": {}}}, "whole numbers"),
    "negative size": (one(shape=(-2, -3)), "whole numbers from 0"),
    "float size": (one(shape=(2.0, 3)), "whole numbers from 0"),
    "bool size": (one(shape=(True, 6)), "whole numbers from 0"),
    "huge size of nothing": (one(shape=(2**62, 0), offsets=(0, 24)), "24 bytes"),
    "huge size": (one(shape=(2**40, 2**40)), "bytes for float32"),
    "overlap": ({"a": row(0, 12), "b": row(8, 20), "c": row(20, 24, 1)}, "overlap"),
    "same range twice": ({"a": row(0, 12), "b": row(0, 12), "c": row(12, 24)}, "overlap"),
    "hole": ({"a": row(0, 12), "b": row(16, 24, 2)}, "leave a hole"),
    "hole at the beginning": ({"a": row(12, 24)}, "leave a hole"),
    "bytes behind": ({"a": row(0, 12)}, "12 bytes follow"),
    "bytes missing": (one(shape=(2, 4), offsets=(0, 32)), "cut short"),
    "fewer bytes than shape": (one(shape=(2, 4)), "24 bytes for float32"),
    "a name twice": (TWICE, "a stands in it twice"),
    "a key twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[6],"data_offsets":[0,24]}}', "twice"),
    "unknown dtype": (one(dtype="F128"), "F128"),
    "dtype a list": (one(dtype=["F32"]), "unreadable header"),
    "header a list": (b"[1]", "unreadable header"),
    "header a number": (b"3", "unreadable header"),
    "header no JSON": (b"{", "unreadable header"),
    "header not text": (b"{\xff\xfe}", "unreadable header"),
    "header nested": (b"{" + b'"a":[' * 100_000, "unreadable header"),
    "tensor a number": ({"a": 3}, "unreadable header"),
    "metadata a number": (one(__metadata__=3), "__metadata__"),
    "no tensors": ({}, "follow that belong to no tensor"),
}  # fmt: skip


def refuse(path) -> str:
    """The one sentence that refuses a file, when opened or read."""
    with pytest.raises(FileError) as error:
        [tensor.read() for tensor in read_checkpoint(path).tensors.values()]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_damaged_safetensors_file_is_refused(tmp_path, name):
    header, sentence = SAFETENSORS[name]
    (tmp_path / "x.safetensors").write_bytes(safetensors(header))
    said = refuse(tmp_path / "x.safetensors")
    assert sentence in said


@pytest.mark.parametrize("length", [2**63, 100_000_001, 10_000, 0])
def test_a_header_of_another_length_is_refused(tmp_path, length):
    (tmp_path / "x.safetensors").write_bytes(safetensors(one(), length=length))
    refuse(tmp_path / "x.safetensors")


# Archives


class Storage:
    def __init__(self, key="0", kind=torch.FloatStorage):
        self.pid = ("storage", kind, key, "cpu", 6)


class Call:
    """Pickled as a call of a function with these arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def tensor(storage=None, offset=0, shape=(2, 3), strides=(3, 1)) -> Call:
    storage = storage or Storage()
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, storage, offset, shape, strides, False, collections.OrderedDict())


def pickled(content) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return getattr(obj, "pid", None)

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(content)
    return out.getvalue()


def archive(content, data=DATA, **entries: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        text = content if isinstance(content, bytes) else pickled(content)
        file.writestr("x/data.pkl", text)
        if data is not None:
            file.writestr("x/data/0", data)
        for name, value in entries.items():
            file.writestr(f"x/{name}", value)
    return out.getvalue()


class _Pid:
    def __init__(self, pid):
        self.pid = pid


MARK = "/tmp/sam3jax_hostile_file_was_run"
INTO_ITSELF: dict = {}
INTO_ITSELF["model"] = INTO_ITSELF
ARCHIVES = {
    "storage shorter": ({"a": tensor(shape=(4, 3))}, "reaches to byte 48 of a storage of 24"),
    "offset beyond": ({"a": tensor(offset=2)}, "reaches to byte 32"),
    "stride beyond": ({"a": tensor(strides=(4, 1))}, "reaches to byte 28"),
    "strides of zero": ({"a": tensor(shape=(10**9,), strides=(0,))}, "by repeating a storage"),
    "strides of zero, 3 TB": ({"a": tensor(shape=(10**6, 10**6), strides=(0, 0))}, "by repeating"),
    "windows over one storage": ({"a": tensor(shape=(2, 10**9), strides=(3, 0))}, "by repeating"),
    "negative offset": ({"a": tensor(offset=-1)}, "where a size is expected"),
    "negative size": ({"a": tensor(shape=(-2, 3))}, "where a size is expected"),
    "negative stride": ({"a": tensor(strides=(-3, 1))}, "where a size is expected"),
    "float size": ({"a": tensor(shape=(2.0, 3))}, "where a size is expected"),
    "a size that is a list": ({"a": tensor(shape=([], 3))}, "where a size is expected"),
    "sizes a number": ({"a": tensor(shape=6, strides=1)}, "sizes that are no numbers"),
    "fewer strides": ({"a": tensor(strides=(1,))}, "2 sizes, 1 strides"),
    "no storage": ({"a": tensor(Storage("7"))}, "the storage of tensor a is not in it"),
    "storage elsewhere": ({"a": tensor(Storage("../../etc/passwd"))}, "is not in it"),
    "storage a number": ({"a": tensor(_Pid(("storage", torch.FloatStorage, 0, "cpu", 6)))}, "damaged"),
    "storage of no kind": ({"a": tensor(_Pid(("storage", 3, "0", "cpu", 6)))}, "damaged"),
    "another persistent id": ({"a": tensor(_Pid(("module", torch.FloatStorage, "0")))}, "damaged"),
    "persistent id a text": ({"a": tensor(_Pid("x"))}, "damaged"),
    "tensor of a text": ({"a": Call(torch._utils._rebuild_tensor_v2, "x", 0, (1,), (1,))}, "damaged"),
    "tensor of nothing": ({"a": Call(torch._utils._rebuild_tensor_v2)}, "damaged"),
    "os.system": ({"a": tensor(), "b": Call(os.system, f"touch {MARK}")}, "system"),
    "eval": ({"b": Call(eval, f"open({MARK!r}, 'w')")}, "eval"),
    "getattr": ({"b": Call(getattr, tensor(), "__class__")}, "getattr"),
    "a module": ({"b": torch.nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
    "a code of types": (b"\x80\x02ctypes\nFunctionType\n.", "types.FunctionType"),
    "numpy that loads": ({"b": Call(os.popen, f"touch {MARK}")}, "popen"),
    "a hidden import": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.", "os.system"),
    "an old instance": (f"(S'touch {MARK}'\nios\nsystem\n.".encode(), "os.system"),
    "an extension": (b"\x80\x02\x82\x01.", "damaged"),
    "a pickle cut short": (pickled({"a": tensor()})[:-9], "damaged"),
    "an empty pickle": (b"", "damaged"),
    "a pickle of noise": (b"\xff\x00noise", "damaged"),
    "a huge memo": (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "expected a dictionary"),
    "a huge string": (b"\x80\x04\x8d" + b"\xff" * 8 + b"abc.", "damaged"),
    "a list": ([tensor()], "expected a dictionary of tensors"),
    "a number": (3, "expected a dictionary of tensors"),
    "itself": (INTO_ITSELF, "expected a dictionary"),
    "no tensors": ({"epoch": 3}, "holds no tensors; found epoch"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_archive_is_refused(tmp_path, name):
    content, sentence = ARCHIVES[name]
    (tmp_path / "x.pt").write_bytes(archive(content))
    assert sentence in refuse(tmp_path / "x.pt")
    assert not pathlib.Path(MARK).exists()


def test_entries_of_an_archive_that_do_not_fit_are_refused(tmp_path):
    file = tmp_path / "x.pt"
    good = {"a": tensor()}
    file.write_bytes(archive(good, byteorder=b"big"))
    assert "another byte order" in refuse(file)
    file.write_bytes(archive(good, data=None))
    assert "is not in it" in refuse(file)
    file.write_bytes(archive(good, data=DATA[:16]))
    assert "storage of 16 bytes" in refuse(file)
    with pytest.warns(UserWarning, match="Duplicate"):
        file.write_bytes(archive(good, **{"data/0": DATA}))
    assert "twice" in refuse(file)
    file.write_bytes(archive(good, **{"y/data.pkl": b""}))
    assert "expected one data.pkl" in refuse(file)


HARMLESS = {
    "numpy scalar": np.float64(0.5), "numpy array": np.arange(3), "numpy dtype": np.dtype("int8"),
    "namespace": argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("/x")), "path": pathlib.PosixPath("/tmp"),
    "set": {1, 2}, "counter": collections.Counter("aab"), "size": torch.Size([1]), "device": torch.device("cpu"),
    "dtype": torch.bfloat16, "complex": 1j, "slice": slice(3), "defaultdict": collections.defaultdict(list, a=[1]),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_harmless_things_beside_the_weights_do_not_block_them(tmp_path, name, protocol):
    content = {"model": {"w.a": torch.from_numpy(GOOD)}, "beside": HARMLESS[name]}
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    found = read_checkpoint(tmp_path / "x.pt")
    np.testing.assert_array_equal(found.tensors["w.a"].read(), GOOD)
    assert found.ignored == ("beside",)


def test_parameters_and_conjugates_are_read_right(tmp_path):
    z = torch.complex(torch.arange(3.0), torch.ones(3))
    state = {
        "p": torch.nn.Parameter(torch.ones(2, 3)),
        "conj": z.conj(),
        "neg": z.clone().conj().imag,
    }
    torch.save(state, tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt").tensors
    for name, expected in state.items():
        np.testing.assert_array_equal(found[name].read(), expected.detach().resolve_conj().resolve_neg().numpy())  # fmt: skip


# Names and numbers

QUERY = "transformer.decoder.query_embed.weight"


@pytest.mark.parametrize(
    "name",
    [
        "transformer.decoder._orig_mod.query_embed.weight", "_orig_mod.transformer.decoder.query_embed.weight",
        "module._orig_mod.transformer.decoder.query_embed.weight",
        "transformer._fsdp_wrapped_module.decoder._checkpoint_wrapped_module.query_embed.weight",
        "detector._orig_mod.transformer.decoder.query_embed._fsdp_wrapped_module.weight",
    ],
)  # fmt: skip
def test_wrappers_are_dropped_anywhere_in_a_name(name):
    assert sort_tensors({name: Tensor.of(GOOD)}).live.keys() == {QUERY}


def test_one_tensor_under_a_wrapped_and_a_bare_name_is_refused():
    names = (QUERY, "transformer.decoder._orig_mod.query_embed.weight")
    with pytest.raises(FileError, match="under two names"):
        sort_tensors(dict.fromkeys(names, Tensor.of(GOOD)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_counted_by_name(dtype, value):
    array = np.ones((2, 3), np.float32)
    array[1, :2] = value
    live = {"a": Tensor.of(array.astype(dtype)), "b": Tensor.of(GOOD)}
    used, carried = looked_at(live, {})
    with pytest.raises(ConversionError, match=r"1 tensors hold NaN or infinity: a \(2\)"):
        used.refuse_broken()
    assert value_notes(used, carried) == ["PROBLEM: 1 tensors hold NaN or infinity: a (2)"]
    assert value_notes(*looked_at({}, live)) == ["carried, 1 tensors hold NaN or infinity: a (2)"]


def test_matrices_of_zeros_are_named_and_vectors_are_not():
    live = {"m": Tensor.of(np.zeros((2, 2))), "bias": Tensor.of(np.zeros(3)), "b": Tensor.of(GOOD)}
    assert value_notes(*looked_at(live, {})) == ["1 tensors are zeros only: m"]


def test_archives_are_read_without_torch_and_writing_one_names_the_extra(tmp_path, monkeypatch):
    torch.save({"w.a": torch.from_numpy(GOOD)}, tmp_path / "x.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "x.pt").tensors["w.a"].read(), GOOD)
    write_checkpoint(tmp_path / "y.safetensors", {"a": Tensor.of(GOOD)})
    with pytest.raises(FileError, match=r"pip install 'sam3jax\[convert\]'"):
        write_checkpoint(tmp_path / "y.pt", {"a": Tensor.of(GOOD)})
