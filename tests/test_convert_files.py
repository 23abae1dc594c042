"""Files around a conversion: nothing that is not ours is replaced, damage and foreign kinds are named."""

import errno
import json
import os
import shutil
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are torch's")

from convert import to_torch
from convert.__main__ import main
from convert.files import read_checkpoint
from convert.folders import CARRIED
from sam3jax.config import ModelConfig
from sam3jax.data.tokenizer import build_byte_tokenizer
from sam3jax.files import FileError, whole
from sam3jax.weights.model_folder import load_model_folder, save_model_folder
from sam3jax.weights.parts import leaf_shapes
from sam3jax.weights.tensor_file import Tensor, read_tensors, to_dtype, write_tensors
from sam3jax.weights.tree import unflatten

TINY = ModelConfig(preset="tiny")
TRACKED = "tracker.maskmem_tpos_enc"


@pytest.fixture(scope="module")
def leaves() -> dict[tuple[str, ...], Tensor]:
    rng = np.random.default_rng(0)
    shapes = leaf_shapes(TINY).items()
    return {path: Tensor.of(rng.normal(size=shape).astype(np.float32)) for path, shape in shapes}


@pytest.fixture(scope="module")
def tensors(leaves) -> dict[str, "torch.Tensor"]:
    """A tiny detector's tensors by official name."""
    arrays = to_torch(unflatten({path: t.read() for path, t in leaves.items()}), TINY)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture
def checkpoint(tmp_path, tensors) -> Path:
    torch.save(tensors, tmp_path / "sam3.pt")
    return tmp_path / "sam3.pt"


@pytest.fixture
def folder(tmp_path, leaves) -> Path:
    """A model folder."""
    save_model_folder(tmp_path / "model", TINY, leaves, build_byte_tokenizer())
    return tmp_path / "model"


def run(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def refused(capsys, *arguments: object) -> str:
    """The sentence on stderr; the command must fail and leave nothing of its own."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


# What may be replaced


def test_a_folder_with_other_files_is_never_replaced(tmp_path, folder, checkpoint, capsys):
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text('{"my": "app"}')
    (project / "thesis.tex").write_text("x")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "config.json").write_text('{"my": "app"}')
    shutil.copytree(folder, tmp_path / "noted")
    shutil.copy(checkpoint, tmp_path / "noted" / "sam3.pt")
    before = content(tmp_path)
    for out in (project, tmp_path / "app", tmp_path / "noted", folder):
        said = refused(
            capsys, "jax-to-torch", "--src", folder, "--out", out, "--layout", "huggingface"
        )
        assert "give an" in said
    source = tmp_path / "noted" / "sam3.pt"
    said = refused(capsys, "torch-to-jax", "--src", source, "--out", tmp_path / "noted")
    assert "it holds sam3.pt" in said
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "out", ["model/model.safetensors", "model/x.pt", "other/model.safetensors"]
)
@pytest.mark.parametrize("layout", ["official", "huggingface"])
def test_an_export_never_goes_into_a_model_folder(tmp_path, folder, capsys, out, layout):
    shutil.copytree(folder, tmp_path / "other")
    before = content(tmp_path)
    refused(capsys, "jax-to-torch", "--src", folder, "--out", tmp_path / out, "--layout", layout)
    assert content(tmp_path) == before


def test_adapters_never_go_into_their_source(folder, capsys):
    command = ["jax-to-torch", "--src", folder, "--adapter", "--out"]
    for out in (folder, folder / "adapter", folder.parent):
        assert "lie in each other" in refused(capsys, *command, out)


def test_folders_of_ours_are_replaced(tmp_path, folder, checkpoint):
    run("torch-to-jax", "--src", checkpoint, "--out", folder)
    for _ in range(2):
        run("jax-to-torch", "--src", folder, "--out", tmp_path / "hf", "--layout", "huggingface")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "model", "sam3.pt"]


def test_a_link_to_a_model_folder_stays_a_link(tmp_path, folder, checkpoint):
    for name in ("model", "nowhere"):
        (tmp_path / "link").symlink_to(tmp_path / name)
        run("torch-to-jax", "--src", checkpoint, "--out", tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        load_model_folder(tmp_path / name)
        (tmp_path / "link").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "nowhere", "sam3.pt"]


# Places that cannot be written or read


def test_places_that_cannot_be_written_are_named(tmp_path, checkpoint, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "the folder you are in" in refused(
        capsys, "torch-to-jax", "--src", checkpoint, "--out", "."
    )
    for out, sentence in (
        (tmp_path / ("n" * 250), "File name too long"),
        (Path("/proc/xx/y"), "cannot write /proc/xx/y"),
        (checkpoint / "x", "cannot write"),
    ):
        assert sentence in refused(capsys, "torch-to-jax", "--src", checkpoint, "--out", out)
    said = refused(capsys, "torch-to-jax", "--src", tmp_path / ("n" * 300), "--out", tmp_path / "o")
    assert "File name too long" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "sam3.pt"]


def test_a_read_only_place_is_named_although_nothing_can_be_removed_there(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(FileError, match="Read-only file system"), whole(tmp_path / "x"):
        read_only()


def test_nothing_is_replaced_until_what_lies_beside_is_written(tmp_path):
    """A full disk at the second file leaves the first as it was."""
    from convert.files import write_checkpoint

    out = tmp_path / "o.safetensors"
    out.write_text("old")

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    full = Tensor((3,), np.dtype(np.float32), fail)
    with pytest.raises(FileError, match=r"disk is full .* while writing .*/o\.safetensors"):
        write_checkpoint(out, {"a": Tensor.of(np.ones(3))}, {"b": full})
    assert out.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["o.safetensors"]


def test_a_full_disk_is_said_of_the_folder_that_was_asked_for(tmp_path, leaves):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    carried = {"tracker.x": Tensor((3,), np.dtype(np.float32), fail)}
    with pytest.raises(FileError, match="while writing") as error:
        save_model_folder(tmp_path / "m", TINY, leaves, None, carried=carried)
    assert "partial" not in str(error.value)
    assert not list(tmp_path.iterdir())


# Damage


@pytest.mark.parametrize("cut", ["whole tensors", "views of one storage"])
def test_zeroed_bytes_in_an_archive_are_named(tmp_path, tensors, capsys, cut):
    state = dict(tensors)
    if cut == "views of one storage":
        buffer = torch.cat([t.flatten() for t in tensors.values()])
        parts = buffer.split([t.numel() for t in tensors.values()])
        state = {n: p.view(t.shape) for (n, t), p in zip(tensors.items(), parts, strict=True)}
    torch.save(state, tmp_path / "x.pt")
    run("torch-to-jax", "--src", tmp_path / "x.pt", "--out", tmp_path / "good")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 60_000] = bytes(60_000)
    (tmp_path / "x.pt").write_bytes(data)
    said = refused(capsys, "torch-to-jax", "--src", tmp_path / "x.pt", "--out", tmp_path / "out")
    assert "do not have the checksum" in said
    assert not (tmp_path / "out").exists()


def test_an_archive_without_checksums_is_read(tmp_path, tensors):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert zipfile.ZipFile(tmp_path / "x.pt").infolist()[0].CRC == 0
    run("torch-to-jax", "--src", tmp_path / "x.pt", "--out", tmp_path / "m")


def test_the_bytes_of_an_archive_are_read_once(checkpoint, monkeypatch):
    found = read_checkpoint(checkpoint).tensors
    counted = []
    fromfile = np.fromfile

    def count(*args, **options):
        array = fromfile(*args, **options)
        counted.append(array.nbytes)
        return array

    monkeypatch.setattr(np, "fromfile", count)
    for tensor in found.values():
        tensor.read()
    assert sum(counted) == sum(t.nbytes for t in found.values())


@pytest.mark.parametrize("change", ["missing", "misshapen", "surplus", "config"])
def test_a_model_folder_that_does_not_fit_its_config_is_named(folder, tmp_path, capsys, change):
    stored = read_tensors(folder / "model.safetensors")
    stored = {name: Tensor.of(t.read()) for name, t in stored.items()}
    if change == "missing":
        del stored["vit/pos_embed"]
    elif change == "misshapen":
        stored["vit/pos_embed"] = Tensor.of(np.zeros((3, 5), np.float32))
    elif change == "surplus":
        stored["vit/head/kernel"] = Tensor.of(np.zeros((3, 5), np.float32))
    else:
        config = json.loads((folder / "config.json").read_text())
        config["model"]["vit_stages"] += 1
        (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / "model.safetensors", stored)
    for command in (
        ["jax-to-torch", "--src", folder, "--out", tmp_path / "x.pt"],
        ["inspect", folder],
    ):
        said = refused(capsys, *command)
        assert "model.safetensors does not fit config.json" in said
        assert "vit/" in said


def test_a_version_that_is_no_number_is_named(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "version": "x"}))
    assert "is of version 'x'" in refused(capsys, "inspect", folder)


# Shards


def _sharded(folder: Path, shards: dict[str, list[str]], listed: dict[str, str]) -> Path:
    folder.mkdir()
    for shard, names in shards.items():
        write_tensors(folder / shard, {n: Tensor.of(np.zeros(3)) for n in names})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    return index


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("shards", "listed", "sentence"),
    [
        ({ONE: ["a", "c"], TWO: ["b"]}, {"a": ONE, "b": TWO}, f"c (in {ONE}; not listed)"),
        ({ONE: ["a", "b"], TWO: ["b"]}, {"a": ONE, "b": TWO}, f"b (in {ONE}; listed for {TWO})"),
        ({ONE: ["a"], TWO: ["b"]}, {"a": ONE}, f"does not list {TWO}"),
        ({ONE: ["a"]}, {"a": 3}, "no weight_map of tensor names"),
    ],
)
def test_shards_that_hold_more_than_their_index_says_are_named(
    tmp_path, capsys, shards, listed, sentence
):
    _sharded(tmp_path / "s", shards, listed)
    assert sentence in refused(capsys, "inspect", tmp_path / "s")


def test_shards_without_an_index_are_named(tmp_path, capsys):
    _sharded(tmp_path / "s", {ONE: ["a"], TWO: ["b"]}, {}).unlink()
    assert "2 shards" in refused(capsys, "inspect", tmp_path / "s")


# Kinds of content


def test_weights_beside_a_nest_are_not_dropped(tmp_path, tensors, capsys):
    torch.save({"model": tensors, "loss": torch.tensor(0.3)}, tmp_path / "x.pt")
    run("torch-to-jax", "--src", tmp_path / "x.pt", "--out", tmp_path / "m")
    torch.save({"model": tensors, TRACKED: torch.zeros(3)}, tmp_path / "x.pt")
    said = refused(capsys, "torch-to-jax", "--src", tmp_path / "x.pt", "--out", tmp_path / "out")
    assert f"1 beside it: {TRACKED}" in said


@pytest.mark.parametrize("nest", ["detector", "weights"])
def test_weights_in_the_only_dictionary_are_found(tmp_path, tensors, nest):
    torch.save({nest: tensors, "epoch": 3}, tmp_path / "x.pt")
    run("torch-to-jax", "--src", tmp_path / "x.pt", "--out", tmp_path / "m")


def test_a_number_beyond_float16_is_refused_by_name(tmp_path, tensors, leaves, capsys):
    big = {**tensors, "transformer.decoder.norm.weight": torch.full((TINY.dim,), 1e6)}
    torch.save(big, tmp_path / "x.pt")
    command = ["torch-to-jax", "--src", tmp_path / "x.pt", "--out"]
    said = refused(capsys, *command, tmp_path / "half", "--dtype", "float16")
    assert "tensor decoder/norm/scale: " in said
    assert f"{TINY.dim} of {TINY.dim} numbers, up to 1e+06, do not fit float16" in said
    run(*command, tmp_path / "m")
    for name in ("x.pt", "x.safetensors"):
        export = ["jax-to-torch", "--src", tmp_path / "m", "--out", tmp_path / "o" / name]
        said = refused(capsys, *export, "--dtype", "float16")
        assert "tensor transformer.decoder.norm.weight: " in said
    assert not list((tmp_path / "o").iterdir())
    with pytest.raises(FileError, match="do not fit float16"):
        load_model_folder(tmp_path / "m", dtype="float16")
    run(*command, tmp_path / "brain", "--dtype", "bfloat16")
    infinite = np.array([np.inf, 1.0], np.float32)
    np.testing.assert_array_equal(to_dtype(infinite, np.float16), infinite)
    with pytest.raises(FileError, match="1 of 2 numbers"):
        to_dtype(np.array([1e9, 1.0], np.float32), ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: torch.zeros(3, dtype=torch.complex128), "complex128, which a safetensors file"),
        (lambda: torch.zeros(3, dtype=torch.complex32), "torch.complex32"),
        (lambda: torch.zeros(3).to(torch.float8_e4m3fnuz), "torch.float8_e4m3fnuz"),
        (lambda: torch.ones(3).to(torch.float8_e8m0fnu), "torch.float8_e8m0fnu"),
        (lambda: torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.zeros(3, 3).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "torch.qint8"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_kinds_of_tensors_without_a_place_are_named(tmp_path, tensors, capsys, make, sentence):
    torch.save({**tensors, TRACKED: make()}, tmp_path / "x.pt")
    said = refused(capsys, "torch-to-jax", "--src", tmp_path / "x.pt", "--out", tmp_path / "out")
    assert f"tensor {TRACKED} is " in said
    assert sentence in said
    assert "damaged" not in said


def test_an_archive_named_safetensors_is_named(tmp_path, checkpoint, capsys):
    checkpoint.rename(tmp_path / "x.safetensors")
    assert "rename it to end in .pt" in refused(capsys, "inspect", tmp_path / "x.safetensors")


def test_a_torchscript_program_is_named(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("x/data.pkl", "x/constants.pkl", "x/code/__torch__.py"):
            archive.writestr(name, "")
    assert "TorchScript" in refused(capsys, "inspect", tmp_path / "x.pt")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_beside_a_published_checkpoint_is_somebody_elses(
    tmp_path, checkpoint, folder, capsys, text
):
    (tmp_path / "config.json").write_text(text)
    run("inspect", checkpoint)
    out = tmp_path / "hf"
    run("jax-to-torch", "--src", folder, "--out", out, "--layout", "huggingface")
    (out / "config.json").write_text(text)
    assert "config.json" in refused(capsys, "inspect", out)


def test_what_lies_beside_a_transformers_export_is_found_again(tmp_path, folder, tensors):
    carried = {"tracker.unheard_of": np.arange(3.0)}
    params = {
        p: t
        for p, t in (
            (tuple(n.split("/")), t) for n, t in read_tensors(folder / "model.safetensors").items()
        )
    }
    save_model_folder(tmp_path / "m", TINY, params, build_byte_tokenizer(), carried=carried)
    out = tmp_path / "hf"
    run("jax-to-torch", "--src", tmp_path / "m", "--out", out, "--layout", "huggingface")
    assert (out / f"model.safetensors{CARRIED}").is_file()
    found = read_checkpoint(out).carried["tracker.unheard_of"]
    np.testing.assert_array_equal(found.read(), carried["tracker.unheard_of"])
