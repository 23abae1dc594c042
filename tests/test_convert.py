"""Damaged and foreign checkpoints are named, nothing half-written stays, nothing in a file is run."""

import json
import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are torch's")

import jax

from convert import to_flax, to_torch
from convert.__main__ import main
from convert.files import read_checkpoint, to_torch_tensor
from convert.sizes import HUGGINGFACE_SWITCHES
from convert.weights import ConversionError
from sam3jax.config import ModelConfig
from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer
from sam3jax.files import FileError
from sam3jax.weights.model_folder import load_model_folder, save_model_folder
from sam3jax.weights.names import carried_shapes, entries
from sam3jax.weights.parts import leaf_shapes
from sam3jax.weights.tensor_file import Tensor, read_header, write_tensors
from sam3jax.weights.tree import unflatten

TINY = ModelConfig(preset="tiny")


@pytest.fixture(scope="module")
def tensors() -> dict[str, "torch.Tensor"]:
    """A tiny detector's tensors by official name."""
    rng = np.random.default_rng(0)
    leaves = {
        path: rng.normal(size=shape).astype(np.float32) for path, shape in leaf_shapes(TINY).items()
    }
    return {
        name: torch.from_numpy(array) for name, array in to_torch(unflatten(leaves), TINY).items()
    }


@pytest.fixture
def checkpoint(tmp_path, tensors) -> Path:
    torch.save(tensors, tmp_path / "sam3.pt")
    return tmp_path / "sam3.pt"


def refused(capsys, *arguments: object) -> str:
    """The sentence on stderr; the command must fail and say nothing of a traceback."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


def convert(capsys, src: Path, out: Path) -> str:
    said = refused(capsys, "torch-to-jax", "--src", src, "--out", out)
    assert not out.exists()
    assert not [p for p in out.parent.iterdir() if "partial" in p.name]
    return said


class Evil:
    ran = False

    def __reduce__(self):
        return os.system, ("touch /tmp/sam3jax_pickle_was_run",)


def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path, tensors, capsys):
    torch.save({**tensors, "extra": Evil()}, tmp_path / "evil.pt")
    said = convert(capsys, tmp_path / "evil.pt", tmp_path / "out")
    assert "carries code" in said
    assert "system" in said
    assert not Path("/tmp/sam3jax_pickle_was_run").exists()


def test_a_bare_pickle_is_not_even_opened(tmp_path, capsys):
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil()))
    said = convert(capsys, tmp_path / "old.pt", tmp_path / "out")
    assert "bare pickle" in said
    assert not Path("/tmp/sam3jax_pickle_was_run").exists()


@pytest.mark.parametrize("part", [0.001, 0.3, 0.98])
def test_a_truncated_archive_is_named(checkpoint, tmp_path, capsys, part):
    data = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * part)])
    assert "cut short" in convert(capsys, tmp_path / "cut.pt", tmp_path / "out")


@pytest.mark.parametrize("part", [0.0001, 0.3, 0.999])
def test_a_truncated_safetensors_file_is_named(tmp_path, tensors, capsys, part):
    write_tensors(tmp_path / "m.safetensors", {n: Tensor.of(t.numpy()) for n, t in tensors.items()})
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: int(len(data) * part)])
    assert "cut short" in convert(capsys, tmp_path / "cut.safetensors", tmp_path / "out")


NO_WEIGHTS = [
    (b"", "empty"),
    (b"<!DOCTYPE html><html>log in</html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        *(("x.pt", *case) for case in NO_WEIGHTS),
        ("x.pt", b"PNG and more of it, no archive", "no zip archive"),
        *(("x.safetensors", *case) for case in NO_WEIGHTS),
        (
            "x.safetensors",
            b"a text of somebody else",
            "not a safetensors file: it begins with no header",
        ),
    ],
)
def test_files_that_hold_no_weights_are_named(tmp_path, capsys, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    assert sentence in convert(capsys, tmp_path / name, tmp_path / "out")


def test_other_archives_and_folders_are_named(tmp_path, capsys, checkpoint):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "no data.pkl" in convert(capsys, tmp_path / "x.pt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "no .pt or .safetensors file" in convert(capsys, tmp_path / "empty", tmp_path / "out")
    assert "there is no" in convert(capsys, tmp_path / "nowhere.pt", tmp_path / "out")
    for name in ("a.pt", "b.pt"):
        shutil.copy(checkpoint, tmp_path / "empty" / name)
    assert "a.pt, b.pt" in convert(capsys, tmp_path / "empty", tmp_path / "out")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    assert "expected a dictionary of tensors" in convert(
        capsys, tmp_path / "list.pt", tmp_path / "out"
    )


def test_absent_shards_are_listed(tmp_path, capsys):
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tensors(tmp_path / "one.safetensors", {"a": Tensor.of(np.zeros(3))})
    said = convert(capsys, tmp_path / "model.safetensors.index.json", tmp_path / "out")
    assert "1 of 2 shards" in said
    assert "two.safetensors" in said


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("image_encoder.trunk.blocks.0.norm1.weight", "sam_mask_decoder.iou_token.weight"), "SAM 2 checkpoint"),
        (("vision_encoder.backbone.blocks.0.attn.qkv.weight", "mask_decoder.iou_token.weight"), "SAM 2 checkpoint"),
        (("image_encoder.blocks.0.norm1.weight", "prompt_encoder.x"), "SAM 1 checkpoint"),
        (("tracker.no_mem_embed", "tracker.obj_ptr_proj.layers.0.weight"), "tracker without its detector"),
        (("base_model.model.detr_encoder.layers.0.mlp.fc1.lora_A.weight",), "LoRA adapters"),
        (("layer1.conv.weight",), "no SAM 3 detector"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_other_models_are_recognised(tmp_path, capsys, names, sentence, wrapper):
    torch.save({"model": {wrapper + n: torch.zeros(2) for n in names}}, tmp_path / "x.pt")
    assert sentence in convert(capsys, tmp_path / "x.pt", tmp_path / "out")


def test_missing_surplus_and_misshapen_tensors_are_all_named_at_once(tmp_path, tensors, capsys):
    broken = dict(tensors)
    del broken["transformer.decoder.norm.weight"], broken["dot_prod_scoring.hs_proj.bias"]
    broken["segmentation_head.cross_attn_norm.weight"] = torch.zeros(7)
    broken["transformer.encoder.layers.0.linear2.weight"] = torch.zeros(TINY.ffn, TINY.dim)
    broken["backbone.vision_backbone.trunk.ln_pre.bias"] = torch.zeros(
        TINY.vit_dim, dtype=torch.int8
    )
    broken["transformer.decoder.layers.0.adapter.weight"] = torch.zeros(1)
    torch.save(broken, tmp_path / "x.pt")
    said = convert(capsys, tmp_path / "x.pt", tmp_path / "out")
    assert "6 tensors do not fit" in said
    assert "2 missing: " in said
    assert "3 misshapen: " in said
    assert "1 surplus: transformer.decoder.layers.0.adapter.weight" in said
    assert f"segmentation_head.cross_attn_norm.weight is [7], expected [{TINY.dim}]" in said
    assert "expected a floating dtype" in said
    assert main(["inspect", str(tmp_path / "x.pt")]) == 0
    said = capsys.readouterr().out
    assert "unknown: 1 tensors: transformer.decoder.layers.0.adapter.weight" in said
    assert (
        "missing: 2 tensors: transformer.decoder.norm.weight, dot_prod_scoring.hs_proj.bias" in said
    )


def test_a_full_disk_leaves_nothing_behind(checkpoint, tmp_path, capsys):
    """The limit on a file's size stands in for the end of the disk."""
    assert main(["torch-to-jax", "--src", str(checkpoint), "--out", str(tmp_path / "good")]) == 0
    before = (tmp_path / "good" / "model.safetensors").read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, old[1]))
    try:
        said = convert(capsys, checkpoint, tmp_path / "out")
        assert "disk is full" in said
        over = refused(capsys, "torch-to-jax", "--src", checkpoint, "--out", tmp_path / "good")
        exported = refused(
            capsys, "jax-to-torch", "--src", tmp_path / "good", "--out", tmp_path / "x.pt"
        )
        other = refused(
            capsys, "jax-to-torch", "--src", tmp_path / "good", "--out", tmp_path / "x.safetensors"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "disk is full" in over
    assert "disk is full" in exported
    assert "disk is full" in other
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "sam3.pt"]
    assert (tmp_path / "good" / "model.safetensors").read_bytes() == before


def test_tensors_are_read_whatever_their_layout_in_the_file(tmp_path):
    """Transposed, sliced, shared, empty and zero-dimensional ones, and archives packed by others."""
    base = torch.arange(60.0).view(5, 12)
    state = {
        "whole": base, "transposed": base.T, "slice": base[1:4, 2:9:3], "shared": base[2], "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4), "half": torch.arange(7, dtype=torch.bfloat16) / 3, "flag": torch.tensor([True, False]),
        "expanded": torch.ones(3, 1).expand(3, 4), "complex": torch.complex(base, -base), "long": torch.arange(5),
    }  # fmt: skip
    torch.save(state, tmp_path / "a.pt")
    for name, kind in (("stored.pt", zipfile.ZIP_STORED), ("deflated.pt", zipfile.ZIP_DEFLATED)):
        with (
            zipfile.ZipFile(tmp_path / "a.pt") as old,
            zipfile.ZipFile(tmp_path / name, "w", kind) as new,
        ):
            for info in old.infolist():
                new.writestr(info.filename, old.read(info))
    for file in ("a.pt", "stored.pt"):
        found = read_checkpoint(tmp_path / file).tensors
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            array = found[name].read()
            assert array.shape == found[name].shape == tuple(tensor.shape)
            assert torch.equal(to_torch_tensor(array), tensor), name
    with pytest.raises(FileError, match="packed again with compression"):
        read_checkpoint(tmp_path / "deflated.pt")


def test_too_little_room_is_said_before_writing(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    said = convert(capsys, checkpoint, tmp_path / "out")
    assert "1,000 are free" in said


def test_a_folder_of_something_else_is_never_replaced(checkpoint, tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    assert "no model folder" in refused(
        capsys, "torch-to-jax", "--src", checkpoint, "--out", tmp_path / "precious"
    )
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "x"


def test_a_vocabulary_of_another_model_is_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text(build_byte_tokenizer(1025))
    said = convert(capsys, checkpoint, tmp_path / "out")
    assert "1,025 tokens" in said


def test_the_tree_and_the_names_are_each_others_inverse(tensors):
    arrays = {name: t.numpy() for name, t in tensors.items()}
    params = to_flax(arrays, TINY)
    carried = {name: arrays[name] for name in carried_shapes(TINY)}
    for layout in ("official", "huggingface"):
        there = to_torch(params, TINY, layout=layout, carried=carried)
        again = to_torch(to_flax(there, TINY, layout=layout), TINY, carried=carried)
        for name, array in arrays.items():
            if name.endswith("pos_embed") and layout == "huggingface":
                array = np.concatenate([np.zeros_like(array[:, :1]), array[:, 1:]], 1)
            np.testing.assert_array_equal(again[name], array, err_msg=name)
    assert {e.torch for e in entries(TINY)} | set(carried) == set(arrays)


def test_to_flax_names_everything_that_does_not_fit(tensors):
    arrays = {name: t.numpy() for name, t in tensors.items() if "presence_token" not in name}
    with pytest.raises(ConversionError, match="9 missing") as error:
        to_flax({**arrays, "head.weight": np.zeros(3)}, TINY)
    assert "1 surplus: head.weight" in str(error.value)


def test_files_are_what_the_safetensors_package_writes(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(1)
    arrays = {
        "b": rng.normal(size=(3, 5)).astype(np.float32), "a": rng.integers(0, 9, (2, 2, 2)), "scalar": np.float64(3.0),
        "empty": np.zeros((0, 4), np.float16), "flag": np.array([True, False]),
    }  # fmt: skip
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    write_tensors(
        tmp_path / "ours.safetensors", {n: Tensor.of(x) for n, x in arrays.items()}, {"k": "v"}
    )
    numpy.save_file(arrays, tmp_path / "theirs.safetensors")
    for name, array in numpy.load_file(tmp_path / "ours.safetensors").items():
        np.testing.assert_array_equal(array, arrays[name])
    tensors, metadata = read_header(tmp_path / "ours.safetensors")
    assert metadata == {"k": "v"}
    for source in (tensors, read_header(tmp_path / "theirs.safetensors")[0]):
        for name, tensor in source.items():
            np.testing.assert_array_equal(tensor.read(), arrays[name])
            assert tensor.dtype == arrays[name].dtype
    np.testing.assert_array_equal(tensors["a"].read((1, 0)), arrays["a"][1, 0])


def test_a_model_folder_keeps_params_config_and_phrases(tmp_path, tensors):
    params = to_flax({n: t.numpy() for n, t in tensors.items()}, TINY)
    tokenizer = Tokenizer(build_byte_tokenizer(), TINY.text_length)
    save_model_folder(tmp_path / "m", TINY, params, tokenizer, carried={"tracker.x": np.ones(3)})
    config, again, vocabulary = load_model_folder(tmp_path / "m")
    assert config == TINY
    np.testing.assert_array_equal(vocabulary(["red circle"]), tokenizer(["red circle"]))
    np.testing.assert_array_equal(
        again["vit"]["stages"]["windows"]["attn"]["qkv"]["kernel"],
        params["vit"]["stages"]["windows"]["attn"]["qkv"]["kernel"],
    )
    _, halves, _ = load_model_folder(tmp_path / "m", dtype="float16")
    assert halves["vit"]["pos_embed"].dtype == np.float16


def test_layers_of_different_dtypes_keep_theirs(tmp_path, tensors):
    """Layers of a stack share one array; what they were stored as is not lost."""
    half = {"transformer.encoder.layers.1.norm1.weight": torch.bfloat16, "backbone.vision_backbone.trunk.blocks.1.attn.qkv.bias": torch.float16}  # fmt: skip
    state = {name: t.to(half.get(name, t.dtype)) for name, t in tensors.items()}
    torch.save(state, tmp_path / "in.pt")
    assert (
        main(["torch-to-jax", "--src", str(tmp_path / "in.pt"), "--out", str(tmp_path / "m")]) == 0
    )
    assert (
        main(["jax-to-torch", "--src", str(tmp_path / "m"), "--out", str(tmp_path / "out.pt")]) == 0
    )
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("layout", ["official", "huggingface"])
def test_a_model_born_here_comes_back_with_its_settings(tmp_path, tensors, layout):
    """Its heads and dropout show in no tensor; the preset of these sizes tells them."""
    params = to_flax({n: t.numpy() for n, t in tensors.items()}, TINY)
    save_model_folder(tmp_path / "m", TINY, params, build_byte_tokenizer())
    out = tmp_path / ("out.pt" if layout == "official" else "out")
    assert (
        main(["jax-to-torch", "--src", str(tmp_path / "m"), "--out", str(out), "--layout", layout])
        == 0
    )
    assert main(["torch-to-jax", "--src", str(out), "--out", str(tmp_path / "again")]) == 0
    config, again, _ = load_model_folder(tmp_path / "again")
    switches = HUGGINGFACE_SWITCHES if layout == "huggingface" else {}
    assert config == TINY.model_copy(update={**switches, "vit_norm_eps": TINY.vit_norm_eps})
    positions = again["vit"].pop("pos_embed"), params["vit"].pop("pos_embed")
    np.testing.assert_array_equal(positions[0][:, 1:], positions[1][:, 1:])
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_a_damaged_model_folder_is_named(tmp_path, tensors):
    params = to_flax({n: t.numpy() for n, t in tensors.items()}, TINY)
    with pytest.raises(FileError, match="does not exist"):
        load_model_folder(tmp_path / "m")
    save_model_folder(tmp_path / "m", TINY, params, None)
    with pytest.raises(FileError, match=r"no tokenizer\.json"):
        load_model_folder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(FileError, match=r"no model\.safetensors"):
        load_model_folder(tmp_path / "m")
