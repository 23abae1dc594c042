"""What a checkpoint holds is checked before it is converted: every shape, every layer, every name."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are torch's")

from convert import to_torch
from convert.__main__ import main
from convert.files import read_checkpoint, to_torch_tensor
from convert.sizes import infer_config, rope_tables
from convert.torch_to_jax import find_tokenizer
from convert.weights import ConversionError, entries
from sam3jax.config import ModelConfig
from sam3jax.files import FileError
from sam3jax.weights.model_folder import open_model_folder
from sam3jax.weights.parts import leaf_shapes, torch_shape
from sam3jax.weights.tensor_file import Tensor, read_tensors
from sam3jax.weights.tree import unflatten

TINY = ModelConfig(preset="tiny")
VIT, TEXT = "backbone.vision_backbone.trunk", "backbone.language_backbone.encoder"
FUSION, DECODER = "transformer.encoder", "transformer.decoder"
POINTS = "tracker.sam_prompt_encoder.point_embeddings"
QUERY = "detr_decoder.layers.1.self_attn.q_proj.weight"
KEY = QUERY.replace("q_proj", "k_proj")


@pytest.fixture(scope="module")
def tensors() -> dict[str, "torch.Tensor"]:
    """A tiny detector's tensors by official name, RoPE tables included."""
    rng = np.random.default_rng(0)
    leaves = {p: rng.normal(size=s).astype(np.float32) for p, s in leaf_shapes(TINY).items()}
    arrays = to_torch(unflatten(leaves), TINY)
    arrays |= {name: table.read() for name, table in rope_tables(TINY).items()}
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory, tensors) -> Path:
    """The same as a folder of transformers, with its config.json."""
    folder = tmp_path_factory.mktemp("huggingface")
    torch.save(tensors, folder / "in.pt")
    run("torch-to-jax", "--src", folder / "in.pt", "--out", folder / "m")
    run("jax-to-torch", "--src", folder / "m", "--out", folder / "hf", "--layout", "huggingface")
    return folder / "hf"


def run(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def refused(capsys, content: dict | Path, tmp_path: Path, *settings: str) -> str:
    """The sentence that refuses a checkpoint; nothing was written, and `inspect` has no traceback."""
    src = content
    if isinstance(content, dict):
        src = tmp_path / "bad.pt"
        torch.save(content, src)
    capsys.readouterr()
    given = [word for setting in settings for word in ("--set", setting)]
    assert main(["torch-to-jax", "--src", str(src), "--out", str(tmp_path / "out"), *given]) == 2
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    main(["inspect", str(src), *given])
    return said


def accepted(capsys, content: dict | Path, tmp_path: Path) -> str:
    """What the command says of a checkpoint that it takes; the model folder is `tmp_path / "out"`."""
    src = content
    if isinstance(content, dict):
        src = tmp_path / "good.pt"
        torch.save(content, src)
    capsys.readouterr()
    run("torch-to-jax", "--src", src, "--out", tmp_path / "out")
    return capsys.readouterr().out


def changed(published: Path, folder: Path, edit=None, configure=None) -> Path:
    """A copy of a transformers folder: tensors edited in place, config.json too."""
    folder.mkdir()
    content = {
        n: to_torch_tensor(t.read())
        for n, t in read_tensors(published / "model.safetensors").items()
    }
    config = json.loads((published / "config.json").read_text())
    for function, value in ((edit, content), (configure, config)):
        if function:
            function(value)
    torch.save(content, folder / "model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_unequal_q_k_and_v_are_misshapen(published, tmp_path, capsys):
    """Their rows add up, so that a joined tensor alone would not show it."""

    def edit(content):
        content[QUERY] = torch.zeros(TINY.dim + 8, TINY.dim)
        content[KEY] = torch.zeros(TINY.dim - 8, TINY.dim)

    said = refused(capsys, changed(published, tmp_path / "hf", edit), tmp_path)
    assert "2 misshapen: " in said
    assert f"{KEY} is [{TINY.dim - 8}, {TINY.dim}], expected [{TINY.dim}, {TINY.dim}]" in said


@pytest.mark.parametrize(
    ("piece", "sentence"),
    [
        (torch.zeros(TINY.dim, 7), f"{KEY} is [{TINY.dim}, 7]"),
        (torch.zeros(()), f"{KEY} is []"),
        (torch.zeros(TINY.dim, TINY.dim, dtype=torch.int32), f"{KEY} is int32, expected a floating"),
        (None, f"1 missing: {KEY}."),
    ],
)  # fmt: skip
def test_problems_of_a_transformers_file_have_its_names(
    published, tmp_path, capsys, piece, sentence
):
    def edit(content):
        content[KEY] = piece
        if piece is None:
            del content[KEY]

    assert sentence in refused(capsys, changed(published, tmp_path / "hf", edit), tmp_path)
    assert "in_proj" not in capsys.readouterr().out


def test_q_k_and_v_of_different_dtypes_are_joined_exactly_and_announced(
    published, tmp_path, capsys
):
    def edit(content):
        content[QUERY] = content[QUERY].to(torch.bfloat16)
        content[KEY] = content[KEY].to(torch.float16)

    folder = changed(published, tmp_path / "hf", edit)
    said = accepted(capsys, folder, tmp_path)
    assert "q, k and v are of different dtypes" in said
    assert f"{DECODER}.layers.1.self_attn.in_proj_weight" in said
    run("jax-to-torch", "--src", tmp_path / "out", "--out", tmp_path / "again")
    before, after = (read_checkpoint(f).tensors for f in (folder, tmp_path / "again"))
    for name in (QUERY, KEY):
        np.testing.assert_array_equal(before[name].read().astype(np.float32), after[name].read())


def test_a_tensor_under_two_names_is_surplus_once(published, tmp_path, capsys):
    name = "text_encoder.text_model.final_layer_norm.weight"
    edit = lambda content: content.update({name.replace("text_model.", ""): content[name] + 1})
    said = refused(capsys, changed(published, tmp_path / "hf", edit), tmp_path)
    assert "1 surplus: text_encoder.final_layer_norm.weight." in said


PUBLISHED = {
    "decoder_layers": f"{DECODER}.layers.5.*",
    "fusion_layers": f"{FUSION}.layers.5.*",
    "geometry_layers": "geometry_encoder.encode.2.*",
    "text_layers": f"{TEXT}.transformer.resblocks.23.*",
    "vit_stages": f"{VIT}.blocks.31.*",
}


@pytest.mark.parametrize("key", PUBLISHED)
def test_a_file_of_published_widths_without_its_last_layer_is_refused(key):
    """Through the public function: a real file has 3.5 GB, its names and shapes are enough."""
    config, shapes = ModelConfig(), leaf_shapes(ModelConfig())
    live = {
        e.torch: Tensor(torch_shape(e, shapes[e.path][len(e.slot) :]), np.dtype(np.float32), None)
        for e in entries(config)
    }
    assert infer_config(live, {})[0] == config
    lost = PUBLISHED[key].removesuffix("*")
    cut = {name: tensor for name, tensor in live.items() if not name.startswith(lost)}
    with pytest.raises(ConversionError, match="missing: ") as error:
        infer_config(cut, {})
    assert PUBLISHED[key] in str(error.value)
    if key != "vit_stages":
        layers = getattr(config, key) - 1
        assert getattr(infer_config(cut, {}, overrides={key: layers})[0], key) == layers


@pytest.mark.parametrize(
    "lost",
    [
        "detr_decoder.layers.2.", "detr_encoder.layers.1.", "text_encoder.text_model.encoder.layers.1.",
        "vision_encoder.backbone.layers.5.",
    ],
)  # fmt: skip
def test_config_json_tells_that_the_last_layer_is_missing(published, tmp_path, capsys, lost):
    def edit(content):
        for name in [n for n in content if n.startswith(lost)]:
            del content[name]

    said = refused(capsys, changed(published, tmp_path / "hf", edit), tmp_path)
    assert "config.json says" in said
    assert f"missing: {lost}*" in said


def test_all_that_config_json_and_weights_contradict_in_is_listed(published, tmp_path, capsys):
    def configure(config):
        config["detr_decoder_config"]["num_layers"] = 9
        config["text_config"]["vocab_size"] = 1023

    said = refused(capsys, changed(published, tmp_path / "hf", None, configure), tmp_path)
    assert "decoder_layers: config.json says 9, the weights have 3" in said
    assert "vocab_size: config.json says 1023, the weights have 1024" in said


def test_the_layers_found_are_said(tensors, tmp_path, capsys):
    """Of a detector of other widths nothing tells how many there should be."""
    cut = {n: t for n, t in tensors.items() if not n.startswith(f"{DECODER}.layers.2.")}
    assert "fusion 2, decoder 2, geometry 1" in accepted(capsys, cut, tmp_path)


def test_missing_last_vit_blocks_are_named(tensors, tmp_path, capsys):
    cut = {n: t for n, t in tensors.items() if not n.startswith(f"{VIT}.blocks.5.")}
    said = refused(capsys, cut, tmp_path)
    assert "of 5 (0 to 4)" in said
    assert "missing from the file?" in said


def test_misshapen_tensors_that_reach_no_output_are_named(tensors, tmp_path, capsys):
    dead = "segmentation_head.pixel_decoder.conv_layers.2"
    broken = {
        **tensors, f"{dead}.bias": torch.zeros(7), f"{dead}.weight": torch.zeros(0, TINY.dim, 3, 3),
        f"{TEXT}.text_projection": torch.tensor(1.0), "geometry_encoder.points_pool_project.bias": torch.zeros(1, 2),
    }  # fmt: skip
    said = refused(capsys, broken, tmp_path)
    assert "4 misshapen: " in said
    assert f"{dead}.bias is [7], expected [{TINY.dim}]" in said


DIM, VIT_DIM, PATCH = TINY.dim, TINY.vit_dim, TINY.patch_size


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{TEXT}.positional_embedding", (0, TINY.text_dim)),
        (f"{TEXT}.token_embedding.weight", (0, TINY.text_dim)),
        (f"{VIT}.pos_embed", (1, VIT_DIM, 37)),
        (f"{VIT}.pos_embed", ()),
        (f"{VIT}.patch_embed.proj.weight", (PATCH, PATCH, 3, VIT_DIM)),
        (f"{VIT}.patch_embed.proj.weight", (0, 3, PATCH, PATCH)),
        (f"{VIT}.blocks.0.mlp.fc1.weight", (0, VIT_DIM)),
        (f"{TEXT.removesuffix('.encoder')}.resizer.weight", (0, TINY.text_dim)),
        (f"{FUSION}.layers.0.linear1.weight", (0, DIM)),
        (f"{DECODER}.query_embed.weight", (0, DIM)),
        (f"{DECODER}.boxRPB_embed_x.layers.1.weight", (0, DIM)),
    ],
)
def test_misshapen_tensors_that_tell_sizes_are_named(tensors, tmp_path, capsys, name, shape):
    said = refused(capsys, {**tensors, name: torch.zeros(shape)}, tmp_path)
    assert f"{name} is {list(shape)}, expected [" in said


@pytest.mark.parametrize("shape", [(36, VIT_DIM), ()])
def test_positions_of_transformers_of_another_rank_are_named(published, tmp_path, capsys, shape):
    name = "vision_encoder.backbone.embeddings.position_embeddings"
    folder = changed(
        published, tmp_path / "hf", lambda content: content.update({name: torch.zeros(shape)})
    )
    assert f"{name} is {list(shape)}, expected [" in refused(capsys, folder, tmp_path)


def test_a_missing_tensor_that_tells_a_size_does_not_hide_the_others(tensors, tmp_path, capsys):
    broken = dict(tensors)
    del broken[f"{DECODER}.query_embed.weight"], broken[f"{DECODER}.norm.weight"]
    broken[f"{VIT}.blocks.0.mlp.fc1.weight"] = torch.zeros(7, VIT_DIM)
    said = refused(capsys, broken, tmp_path)
    assert f"2 missing: {DECODER}.norm.weight, {DECODER}.query_embed.weight" in said
    assert "1 misshapen: " in said


def test_an_export_in_another_dtype_is_read_again(published, tmp_path):
    half = tmp_path / "half"
    model = published.parent / "m"
    run(
        "jax-to-torch", "--src", model, "--out", half, "--layout", "huggingface", "--dtype", "bfloat16"
    )  # fmt: skip
    run("torch-to-jax", "--src", half, "--out", tmp_path / "again")
    leaf = open_model_folder(tmp_path / "again").leaves["vit", "pos_embed"]
    first = open_model_folder(model).leaves["vit", "pos_embed"]
    assert leaf.dtype.name == "bfloat16"
    np.testing.assert_array_equal(leaf.read(), first.read().astype(leaf.dtype))


@pytest.mark.parametrize(
    "last", [torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(4), torch.zeros(2, 4)]
)
def test_point_embeddings_that_make_no_table_are_kept_beside(tensors, tmp_path, last):
    points = {f"{POINTS}.{i}.weight": torch.full((1, 4), float(i)) for i in range(3)}
    points[f"{POINTS}.3.weight"] = last
    state = {**{f"detector.{n}": t for n, t in tensors.items()}, **points}
    torch.save(state, tmp_path / "in.pt")
    run("torch-to-jax", "--src", tmp_path / "in.pt", "--out", tmp_path / "a")
    run("jax-to-torch", "--src", tmp_path / "a", "--out", tmp_path / "hf", "--layout=huggingface")
    run("torch-to-jax", "--src", tmp_path / "hf", "--out", tmp_path / "b")
    run("jax-to-torch", "--src", tmp_path / "b", "--out", tmp_path / "o.pt", "--layout=official")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    for name, tensor in points.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("vision_config",), "x", "vision_config is 'x', expected an object"),
        (("vision_config", "backbone_config", "num_attention_heads"), 0, "num_attention_heads is 0, expected a positive"),
        (("vision_config", "backbone_config", "global_attn_indexes"), 3, "global_attn_indexes is 3, expected a list"),
        (("vision_config", "backbone_config", "global_attn_indexes"), [2, 4], "global attention in ViT blocks [2, 4]"),
    ],
)  # fmt: skip
def test_a_damaged_config_json_is_named(published, tmp_path, capsys, place, value, sentence):
    def configure(config):
        for key in place[:-1]:
            config = config[key]
        config[place[-1]] = value

    folder = changed(published, tmp_path / "hf", None, configure)
    assert sentence in refused(capsys, folder, tmp_path)


@pytest.mark.parametrize("setting", ["vit_stage_blocks=0", "vit_stage_blocks=abc", "vit_heads=0"])
def test_settings_that_are_no_numbers_are_named(tensors, tmp_path, capsys, setting):
    assert "expected positive numbers" in refused(capsys, tensors, tmp_path, setting)


def test_a_setting_that_is_no_yaml_is_named(tensors, tmp_path, capsys):
    assert "not readable YAML" in refused(capsys, tensors, tmp_path, "image_size=[")


@pytest.mark.parametrize(
    ("prefix", "foreign"),
    [("model.", "epoch"), ("model.detector.", "criterion.w"), ("module.detector.", "tracker.x")],
)
def test_a_foreign_tensor_beside_wrapped_ones_is_surplus(
    tensors, tmp_path, capsys, prefix, foreign
):
    state = {prefix + n: t for n, t in tensors.items()} | {foreign: torch.zeros(1)}
    assert f"1 surplus: {foreign}." in refused(capsys, state, tmp_path)


@pytest.mark.parametrize("prefix", ["", "detector.", "model.detector."])
def test_an_interactive_predictor_comes_back(tensors, tmp_path, capsys, prefix):
    state = {**tensors, "inst_interactive_predictor.model.w": torch.arange(3.0)}
    state = {prefix + n: t for n, t in state.items()}
    accepted(capsys, state, tmp_path)
    run("jax-to-torch", "--src", tmp_path / "out", "--out", tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[n], t) for n, t in state.items())


@pytest.mark.parametrize(
    "edit",
    [
        {0: None}, {5: torch.zeros(140, 12, dtype=torch.complex64)}, {1: torch.zeros(())}, {1: torch.zeros(36 * 12)},
        {1: torch.zeros(0, 12)}, {6: torch.zeros(36, 12, dtype=torch.complex64)},
    ],
)  # fmt: skip
def test_rope_tables_are_computed_anew_where_they_are_absent_or_misshapen(
    tensors, tmp_path, capsys, edit
):
    state = dict(tensors)
    for block, table in edit.items():
        name = f"{VIT}.blocks.{block}.attn.freqs_cis"
        state.pop(name, None)
        state |= {} if table is None else {name: table}
    said = accepted(capsys, state, tmp_path)
    assert f"RoPE tables (freqs_cis) of ViT blocks {next(iter(edit))} are absent" in said
    assert open_model_folder(tmp_path / "out").config == TINY
    run("jax-to-torch", "--src", tmp_path / "out", "--out", tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor)


def test_the_vocabulary_found_is_said(tensors, tmp_path, capsys):
    longer = {**tensors, f"{TEXT}.token_embedding.weight": torch.zeros(1025, TINY.text_dim)}
    assert "1,025 tokens" in accepted(capsys, longer, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"model": 3}'])
def test_a_tokenizer_that_is_none_is_named(tmp_path, text):
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    with pytest.raises(FileError, match=r"tokenizer\.json holds no vocabulary"):
        find_tokenizer(ModelConfig(preset="tiny"), file)
