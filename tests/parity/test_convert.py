"""Conversion through the command line: every tensor back bit for bit, in both layouts, behind every prefix."""

import contextlib
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are torch's")
pytest.importorskip("sam3", reason="the oracle needs the sam3 package")

import jax

from convert.__main__ import main
from sam3jax.config import parse_config
from sam3jax.weights.base import open_base
from sam3jax.weights.checkpoints import Checkpoints
from sam3jax.weights.model_folder import load_model_folder, open_model_folder
from sam3jax.weights.run_folder import open_run_folder
from sam3jax.weights.trainable import merge, start
from tests import torch_reference as reference
from tests.bridge import model_config

SIZE = reference.Size(vocabulary=600)
WIDE = reference.Size(
    image=168, window=6, vit_depth=6, vit_global=(2, 5), vit_dim=60, vit_heads=3, dim=64, heads=8, vocabulary=600
)  # fmt: skip


def tracker_tensors(dim: int, seed: int = 7) -> dict[str, "torch.Tensor"]:
    """A tracker's tensors under official names (made up sizes: nobody here looks inside)."""
    generator = torch.Generator().manual_seed(seed)
    names = (
        "maskmem_tpos_enc", "no_mem_embed", "transformer.encoder.layers.3.cross_attn_image.out_proj.weight",
        "transformer.encoder.norm.bias", "maskmem_backbone.mask_downsampler.encoder.10.weight",
        "maskmem_backbone.fuser.layers.1.gamma", "maskmem_backbone.fuser.layers.0.dwconv.weight",
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        *(f"sam_prompt_encoder.point_embeddings.{i}.weight" for i in range(4)),
        "sam_mask_decoder.transformer.layers.1.mlp.lin2.bias", "sam_mask_decoder.output_hypernetworks_mlps.2.layers.1.weight",
        "sam_mask_decoder.conv_s0.weight", "obj_ptr_proj.layers.2.bias",
    )  # fmt: skip
    tensors = {f"tracker.{n}": torch.randn(1, dim, generator=generator) for n in names}
    return tensors | {"tracker.steps": torch.tensor(7)}


def published(model) -> dict[str, "torch.Tensor"]:
    """The model's state dict with a second neck and a tracker, named as in sam3.pt."""
    state = model.state_dict()
    neck = {
        n.replace(".convs.", ".sam2_convs."): t.flip(0)
        for n, t in state.items()
        if ".vision_backbone.convs." in n
    }
    return {f"detector.{n}": t for n, t in (state | neck).items()} | tracker_tensors(4)


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    different = [
        n for n, t in expected.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)
    ]
    assert not different


def run(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def load(path: Path) -> dict[str, "torch.Tensor"]:
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        return pytest.importorskip("safetensors.torch").load_file(path)
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def detector():
    return reference.detector(SIZE, seed=3)


@pytest.mark.parametrize(
    "prefix", ["", "detector.", "module.", "model.detector.", "module.model.detector."]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_official_checkpoint_comes_back_bit_for_bit(tmp_path, detector, prefix, dtype):
    state = published(detector) if "detector." in prefix else detector.state_dict()
    wrapper = prefix.removesuffix("detector.")
    state = {wrapper + n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    torch.save(state, tmp_path / "in.pt")
    run("torch-to-jax", "--src", tmp_path / "in.pt", "--out", tmp_path / "folder")
    run("jax-to-torch", "--src", tmp_path / "folder", "--out", tmp_path / "out.pt")
    same(load(tmp_path / "out.pt"), state)


def test_the_export_loads_into_the_torch_detector_with_strict(tmp_path, detector):
    torch.save({"model": published(detector), "epoch": 3}, tmp_path / "in.pt")
    run("torch-to-jax", "--src", tmp_path / "in.pt", "--out", tmp_path / "folder")
    run(
        "jax-to-torch",
        "--src",
        tmp_path / "folder",
        "--out",
        tmp_path / "bare.pt",
        "--prefix",
        "",
        "--detector-only",
    )
    fresh = reference.detector(SIZE, seed=4)
    fresh.load_state_dict(load(tmp_path / "bare.pt"), strict=True)
    same(fresh.state_dict(), detector.state_dict())


@pytest.mark.parametrize("size", [SIZE, WIDE], ids=["small", "wide"])
def test_the_configuration_is_told_from_the_shapes(tmp_path, size):
    torch.save(reference.detector(size, seed=1).state_dict(), tmp_path / "in.pt")
    run("torch-to-jax", "--src", tmp_path / "in.pt", "--out", tmp_path / "folder")
    found = open_model_folder(tmp_path / "folder").config
    assert found == model_config(size, dropout=found.dropout, drop_path=found.drop_path)


@pytest.mark.parametrize("carry", [True, False], ids=["with tracker", "detector alone"])
def test_official_to_transformers_and_back_loses_nothing(tmp_path, detector, carry):
    state = published(detector) if carry else detector.state_dict()
    torch.save(state, tmp_path / "in.pt")
    run("torch-to-jax", "--src", tmp_path / "in.pt", "--out", tmp_path / "a")
    run(
        "jax-to-torch", "--src", tmp_path / "a", "--out", tmp_path / "hf", "--layout", "huggingface"
    )
    run("torch-to-jax", "--src", tmp_path / "hf", "--out", tmp_path / "b")
    run(
        "jax-to-torch",
        "--src",
        tmp_path / "b",
        "--out",
        tmp_path / "out.pt",
        "--layout",
        "official",
    )
    same(load(tmp_path / "out.pt"), state)
    kept_aside = load(tmp_path / "hf" / "model.safetensors.carried.safetensors").keys() - {
        "tracker.steps"
    }
    point_projections = {
        f"geometry_encoder.points_{n}_project.{p}"
        for n in ("direct", "pool", "pos_enc")
        for p in ("weight", "bias")
    }
    rope = {n for n in detector.state_dict() if n.endswith("freqs_cis")}
    assert kept_aside == point_projections | rope | {
        "backbone.vision_backbone.trunk.pos_embed.class_position"
    }


def test_other_picture_sizes_get_other_rope_tables(tmp_path, detector):
    torch.save(detector.state_dict(), tmp_path / "in.pt")
    run(
        "torch-to-jax",
        "--src",
        tmp_path / "in.pt",
        "--out",
        tmp_path / "folder",
        "--set",
        "image_size=168",
    )
    run("jax-to-torch", "--src", tmp_path / "folder", "--out", tmp_path / "out.pt")
    larger = reference.detector(reference.Size(image=168, vocabulary=600), seed=9)
    exported = load(tmp_path / "out.pt")
    for name, table in larger.state_dict().items():
        if name.endswith("freqs_cis"):
            torch.testing.assert_close(exported[name], table, rtol=0, atol=2e-6)
    larger.load_state_dict(exported, strict=True)


def test_dtype_is_as_stored_or_as_asked(tmp_path, detector):
    torch.save(detector.state_dict(), tmp_path / "in.pt")
    run(
        "torch-to-jax",
        "--src",
        tmp_path / "in.pt",
        "--out",
        tmp_path / "folder",
        "--dtype",
        "bfloat16",
    )
    _, params, _ = _load(tmp_path / "folder")
    assert params["vit"]["ln_pre"]["scale"].dtype.name == "bfloat16"
    run(
        "jax-to-torch",
        "--src",
        tmp_path / "folder",
        "--out",
        tmp_path / "out.safetensors",
        "--dtype",
        "float32",
    )
    for name, tensor in load(tmp_path / "out.safetensors").items():
        expected = detector.state_dict()[name]
        if expected.is_floating_point():
            expected = expected.to(torch.bfloat16).to(torch.float32)
        assert torch.equal(tensor, expected), name


def _load(folder: Path):
    from sam3jax.data.tokenizer import build_byte_tokenizer

    # These detectors' vocabulary is nobody's; any that fits will do.
    (folder / "tokenizer.json").write_text(build_byte_tokenizer(515), "utf-8")
    return load_model_folder(folder)


def test_a_sharded_checkpoint_equals_the_whole(tmp_path, detector):
    import json

    save_file = pytest.importorskip("safetensors.torch").save_file
    state = {n: t.contiguous() for n, t in detector.state_dict().items()}
    names = list(state)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    folder = tmp_path / "sharded"
    folder.mkdir()
    for file, part in shards.items():
        save_file({n: state[n] for n in part}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, part in shards.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    run("torch-to-jax", "--src", folder, "--out", tmp_path / "a")
    run("jax-to-torch", "--src", tmp_path / "a", "--out", tmp_path / "out.pt")
    same(load(tmp_path / "out.pt"), detector.state_dict())


@contextlib.contextmanager
def small_vocabulary(detector):
    """The detector reads phrases as made-up ids: its text tower knows fewer tokens than CLIP."""

    def tokenizer(texts, context_length):
        rows = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = torch.tensor([1 + ord(c) for c in text])
            row[: len(ids)] = ids
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector.backbone.language_backbone, "tokenizer", tokenizer)
        yield


def run_folder(path: Path, base: Path, **settings) -> dict:
    """A run folder as the trainer leaves it, what it trains moved at random; returns the variables."""
    config = parse_config({"init": str(base), "output": str(path), "steps": 1, **settings})
    started = open_base(config)
    weights = started.load()
    trainable, frozen = start(weights.params, started.config)
    rng = np.random.default_rng(8)
    moved = lambda x: np.asarray(x) + 0.05 * rng.normal(size=x.shape).astype(np.float32)
    trainable = jax.tree.map(moved, trainable)
    with open_run_folder(started.config, weights.fingerprint) as opened:
        saved = Checkpoints(path, keep=1)
        about = {"run": opened.id, "step": 0, "base": weights.fingerprint, "data": {}}
        saved.save(0, trainable, {"step": np.array(0)}, about)
        saved.close()
    return merge(trainable, frozen)


def test_a_runs_merged_export_changes_what_it_trained_alone(tmp_path):
    size = reference.Size(vocabulary=1024)
    before = published(reference.detector(size, seed=3))
    torch.save(before, tmp_path / "in.pt")
    run("torch-to-jax", "--src", tmp_path / "in.pt", "--out", tmp_path / "folder")
    trained = ["transformer.decoder.query_embed.weight", "backbone.vision_backbone.convs.0.*"]
    run_folder(tmp_path / "run", tmp_path / "folder", trainable=trained, lora={"rank": 3})
    run("jax-to-torch", "--src", tmp_path / "run", "--out", tmp_path / "out.pt")
    exported = load(tmp_path / "out.pt")
    assert exported.keys() == before.keys()
    changed = [n for n, t in exported.items() if not torch.equal(t, before[n])]
    places = (
        "transformer.",
        "backbone.vision_backbone.trunk.blocks.",
        "backbone.vision_backbone.convs.0.",
    )
    assert changed
    assert not [n for n in changed if not n.startswith(tuple(f"detector.{p}" for p in places))]

    run("jax-to-torch", "--src", tmp_path / "run", "--out", tmp_path / "adapter", "--adapter")
    names = load(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert {n.split(".")[2] for n in names} == {"vision_encoder", "detr_encoder", "detr_decoder"}
    run("inspect", tmp_path / "run")


def test_what_a_run_did_not_train_is_exported_bit_for_bit(tmp_path):
    """Also from a base in half precision, though the run computes in float32."""
    size = reference.Size(vocabulary=1024)
    before = {
        n: t.bfloat16() if t.is_floating_point() else t
        for n, t in published(reference.detector(size, seed=3)).items()
    }
    torch.save(before, tmp_path / "in.pt")
    run("torch-to-jax", "--src", tmp_path / "in.pt", "--out", tmp_path / "folder")
    lora = {"rank": 2, "targets": ["transformer.decoder.layers.1.*"]}
    run_folder(tmp_path / "first", tmp_path / "folder", lora=lora)
    run_folder(tmp_path / "second", tmp_path / "first", lora=lora)
    for source in ("first", "second"):
        run("jax-to-torch", "--src", tmp_path / source, "--out", tmp_path / f"{source}.pt")
        exported = load(tmp_path / f"{source}.pt")
        assert exported.keys() == before.keys()
        changed = {n for n, t in exported.items() if not torch.equal(t, before[n])}
        assert changed
        assert all(n.startswith("detector.transformer.decoder.layers.1.") for n in changed)
        wide = {n for n, t in exported.items() if t.dtype != before[n].dtype}
        assert wide == changed
        assert all(exported[n].dtype == torch.float32 for n in wide)
