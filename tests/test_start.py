"""`init` names weights of any form: what is not a model folder is converted once; what is damaged is named."""

import json
import shutil
import threading

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are torch's")

from convert import cache, hub, torch_to_jax
from convert.__main__ import main
from sam3jax import train
from sam3jax.config import ModelConfig, load_config
from sam3jax.data.tokenizer import build_byte_tokenizer
from sam3jax.files import CACHE, FileError
from sam3jax.weights.base import open_base
from sam3jax.weights.model_folder import load_model_folder, open_model_folder, save_model_folder
from sam3jax.weights.parts import leaf_shapes
from sam3jax.weights.start import model_folder, open_start
from sam3jax.weights.tensor_file import Tensor
from tests.batches import DECODER
from tests.coco_folders import write_small_shapes
from tests.trainings import Killed, kill

TINY = ModelConfig(preset="tiny")
HUB_ID = "facebook/sam3"


def run(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One tiny model as a model folder, as files of both torch layouts, and in a hub's cache on the disk."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    draw = lambda shape: Tensor.of(rng.normal(0, 0.05, shape).astype(np.float32))
    leaves = {path: draw(shape) for path, shape in leaf_shapes(TINY).items()}
    save_model_folder(folder / "model", TINY, leaves, build_byte_tokenizer())
    for out, layout in (("sam3.pt", "official"), ("sam3.safetensors", "official"), ("hf", "huggingface")):  # fmt: skip
        run("jax-to-torch", "--src", folder / "model", "--out", folder / out, "--layout", layout)
    stored = folder / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(folder / "hf", stored / "snapshots" / "abc")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    return folder


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path, made):
    """A fresh cache of conversions, and the hub's cache of `made`."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def named(made, name: str) -> str:
    return name if name == HUB_ID else str(made / name)


@pytest.mark.parametrize("name", ["sam3.pt", "sam3.safetensors", "hf", HUB_ID])
def test_weights_of_any_form_are_converted_once_and_train_with_one_command(
    made, tmp_path, capsys, monkeypatch, name
):
    init = named(made, name)
    found = open_base(load_config(None, [f"init={init}", "data.train=shapes"]))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"note: {init} (")
    assert "is converted once into" in said[0]
    _, expected, tokenizer = load_model_folder(made / "model", dtype=np.float32)
    params = found.load().params
    if name in ("hf", HUB_ID):  # that layout has no row for it; nothing reads it
        for tree in (params, expected):
            tree["vit"]["pos_embed"] = tree["vit"]["pos_embed"][:, 1:]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))
    assert found.tokenizer.to_json() == tokenizer.to_json()

    monkeypatch.setattr(train, "make_train_step", lambda *_, **__: kill())
    data = write_small_shapes(tmp_path / "data", train=2)
    words = [f"init={init}", f"data.train={data}", f"lora.targets={list(DECODER)}", "batch_size=8"]
    with pytest.raises(Killed):
        train.main([*words, f"output={tmp_path / 'run'}"])
    assert "converted" not in capsys.readouterr().err
    assert load_config(tmp_path / "run" / "config.yaml").init == init


def test_a_run_computes_as_its_destination_does(made):
    for name, destination, without_boxes in (
        ("model", "transformers", False), ("hf", None, False), ("hf", "sam3", True), ("model", None, True),
    ):  # fmt: skip
        words = [f"init={made / name}", *([f"destination={destination}"] if destination else [])]
        model = open_base(load_config(None, words)).config.model
        assert (model.geometry_without_boxes, model.clamp_presence) == (
            without_boxes,
            not without_boxes,
        )
    own = open_base(load_config(None, [*words, "destination=transformers", "model.clamp_presence=false"])).config.model  # fmt: skip
    assert (own.geometry_without_boxes, own.clamp_presence) == (False, False)


def test_the_cache_knows_content_not_places(made, tmp_path):
    first = model_folder(made / "sam3.pt")
    shutil.copy(made / "sam3.pt", tmp_path / "other.pt")
    assert model_folder(tmp_path / "other.pt") == first
    content = torch.load(tmp_path / "other.pt", weights_only=True)
    content["transformer.decoder.norm.weight"] += 1
    torch.save(content, tmp_path / "other.pt")
    assert model_folder(tmp_path / "other.pt") != first


def test_two_at_once_convert_once(made, monkeypatch):
    begun, together = [], threading.Barrier(2)
    write = cache.write_folder
    monkeypatch.setattr(cache, "write_folder", lambda *a: begun.append(1) or write(*a))

    def ask():
        together.wait()
        found.append(model_folder(made / "sam3.pt"))

    found: list = []
    threads = [threading.Thread(target=ask) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert begun == [1]
    assert found[0] == found[1]


def test_nothing_half_written_is_taken_or_left(made, tmp_path, monkeypatch):
    models = tmp_path / "cache" / "models"
    (models / ".new-killed").mkdir(parents=True)
    content = torch.load(made / "sam3.pt", weights_only=True)
    content["transformer.decoder.norm.weight"][3] = np.nan
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=r"NaN or infinity: transformer\.decoder\.norm\.weight \(1\)"):  # fmt: skip
        model_folder(tmp_path / "nan.pt")
    assert [p.name for p in models.iterdir()] == [".lock"]
    good = model_folder(made / "sam3.pt")
    (good / "config.json").write_text("{")
    assert open_model_folder(model_folder(made / "sam3.pt")).path == good


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("facebook/sam9", "are not in the hub's cache, and the hub cannot be asked"),
        ("no/such/folder", "does not exist"),
        ("nothing.pt", "does not exist"),
    ],
)
def test_what_is_nowhere_is_named(name, sentence):
    with pytest.raises(FileError, match=sentence):
        open_start(name)


def test_a_gated_repository_names_the_remedy(monkeypatch):
    from huggingface_hub import HfApi, errors

    httpx = pytest.importorskip("httpx", reason="how huggingface_hub speaks, from 1.0 on")
    request = httpx.Request("GET", "https://huggingface.co")
    for kind, sentence in (
        (errors.GatedRepoError, "accept its licence at https://huggingface.co/facebook/sam9"),
        (errors.RepositoryNotFoundError, "the hub shows no repository of this name"),
    ):

        def refuse(*_, kind=kind):
            raise kind("no", response=httpx.Response(401, request=request))

        monkeypatch.setattr(HfApi, "list_repo_files", refuse)
        with pytest.raises(FileError, match=sentence):
            hub.fetch("facebook/sam9")


def test_clips_vocabulary_is_found_where_nothing_lies_beside(tmp_path, monkeypatch):
    """An installed package has it, else the hub's cache; nobody names a file."""
    published = ModelConfig()
    text, said = torch_to_jax.find_tokenizer(published, None)
    if text is None:
        pytest.skip("neither open_clip nor sam3 is installed")
    assert torch_to_jax.MERGES in said
    monkeypatch.setattr(torch_to_jax, "_installed_vocabulary", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert torch_to_jax.find_tokenizer(published, None)[0] is None
    stored = tmp_path / "models--openai--clip-vit-large-patch14"
    (stored / "snapshots" / "abc").mkdir(parents=True)
    (stored / "snapshots" / "abc" / "tokenizer.json").write_text(text)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    assert torch_to_jax.find_tokenizer(published, None)[0] == text


# What a folder says of itself


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_changed_byte_of_a_model_folder_is_found(made, tmp_path, file):
    folder = shutil.copytree(made / "model", tmp_path / "m")
    data = bytearray((folder / file).read_bytes())
    at = data.index(b'"dropout": 0.0') + 13 if file == "config.json" else len(data) // 2
    data[at] = ord("1") if file == "config.json" else data[at] ^ 1
    (folder / file).write_bytes(data)
    with pytest.raises(FileError, match=f"{file}"):
        load_model_folder(folder)
    assert main(["jax-to-torch", "--src", str(folder), "--out", str(tmp_path / "x.safetensors")]) == 2  # fmt: skip
    assert not (tmp_path / "x.safetensors").exists()


def test_an_array_or_a_vocabulary_that_is_gone_is_found(made, tmp_path):
    folder = shutil.copytree(made / "model", tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileError, match=r"tokenizer\.json changed"):
        open_model_folder(folder)
    params = {path: t for path, t in open_model_folder(made / "model").leaves.items()}
    save_model_folder(tmp_path / "n", TINY, params, None, carried={"tracker.x": np.ones(3)})
    (tmp_path / "n" / "carried.safetensors").unlink()
    with pytest.raises(FileError, match=r"carried\.safetensors changed"):
        open_model_folder(tmp_path / "n")


def test_a_model_folder_with_a_broken_config_is_known_as_one(made, tmp_path):
    folder = shutil.copytree(made / "model", tmp_path / "m")
    (folder / "config.json").write_text("{")
    with pytest.raises(FileError, match=r"arrays of a model folder whose config\.json"):
        open_start(folder)


def test_an_older_folder_without_checksums_is_said_once_and_read(made, tmp_path, capsys):
    folder = shutil.copytree(made / "model", tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    del content["checksums"], content["crc32"]
    (folder / "config.json").write_text(json.dumps(content))
    open_base(load_config(None, [f"init={folder}"])).load()
    assert capsys.readouterr().err.count("carries no checksums") == 1
    for text in ("", "{}", "[1]", (folder / "tokenizer.json").read_text()[:5000]):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(FileError, match=r"m/tokenizer\.json holds no vocabulary"):
            load_model_folder(folder)
    capsys.readouterr()
    open_base(load_config(None, [f"init={made / 'model'}"])).load()
    assert "checksums" not in capsys.readouterr().err
