"""Parts of the model: live where a task asks for them, carried byte for byte where not."""

import jax
import numpy as np
import pytest

from convert import to_flax, to_torch
from convert.__main__ import main
from convert.weights import ConversionError
from sam3jax.config import ModelConfig, parse_config
from sam3jax.data.tokenizer import build_byte_tokenizer
from sam3jax.files import FileError
from sam3jax.model import Interactive
from sam3jax.model.init import init_params, parameter_shapes
from sam3jax.model.interactive import ROOTS
from sam3jax.training.rates import multipliers
from sam3jax.weights.lora import init_lora, linear_layers, merge_lora
from sam3jax.weights.model_folder import load_model_folder, open_model_folder, save_model_folder
from sam3jax.weights.names import (
    DEFAULT_PARTS,
    PARTS,
    carried_shapes,
    entries,
    parts_of,
    roots,
)
from sam3jax.weights.parts import leaf_shapes, official_name, torch_shapes
from sam3jax.weights.scope import CLICKS
from sam3jax.weights.tensor_file import Tensor, read_tensors, stream_tensors
from sam3jax.weights.trainable import merge, split
from sam3jax.weights.tree import flatten

TINY = ModelConfig(preset="tiny")
ALL = tuple(PARTS)
NECK_3 = "detector.backbone.vision_backbone.sam2_convs.3.conv_1x1.bias"


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """A whole tiny sam3.pt by published name: the parts, their dead tensors, some of the memory."""
    rng = np.random.default_rng(0)
    shapes = torch_shapes(TINY, ALL) | carried_shapes(TINY)
    shapes |= {
        NECK_3.removeprefix("detector."): (64,),
        "tracker.maskmem_tpos_enc": (7, 1, 1, 64),
        "tracker.obj_ptr_proj.layers.1.weight": (64, 64),
    }
    named = {n if n.startswith("tracker.") else f"detector.{n}": s for n, s in shapes.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in named.items()}


@pytest.fixture(scope="module")
def folder(arrays, tmp_path_factory):
    """The model folder that `convert` makes of it: the detector live, the rest carried."""
    path = tmp_path_factory.mktemp("parts")
    write(path / "sam3.safetensors", arrays)
    run("torch-to-jax", "--src", path / "sam3.safetensors", "--out", path / "model")
    return path / "model"


def run(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> bool:
    return got.keys() == want.keys() and all(np.array_equal(got[n], want[n]) for n in want)


def write(path, arrays: dict[str, np.ndarray]) -> None:
    stream_tensors(path, {name: Tensor.of(x) for name, x in arrays.items()})


def read(path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in read_tensors(path).items()}


def test_the_table_and_the_model_agree_on_the_parts():
    assert {part: set(names) for part, names in ROOTS.items()} == {
        part: roots(part) for part in ALL if part not in DEFAULT_PARTS
    }
    for part in ALL:
        paths = {e.path for e in entries(TINY, (part,))}
        assert paths == leaf_shapes(TINY, (part,)).keys()
    assert parts_of(["no_mem_embed", "vit", "tracker_neck"]) == ALL


def test_published_sizes():
    published = ModelConfig()
    sizes = {part: torch_shapes(published, (part,)) for part in ALL}
    total = {part: sum(int(np.prod(s)) for s in shapes.values()) for part, shapes in sizes.items()}
    assert len(sizes["second_neck"]) == 18  # and 4 that reach no output
    assert total["second_neck"] == 7_802_112 - 852_480
    assert len(sizes["interactive"]) == 17 + 131 + 1
    assert total["interactive"] == 6_476 + 4_215_109 + 256


def test_default_parts_are_what_they_were(folder, arrays):
    config, params, _ = load_model_folder(folder)
    assert set(params) == set(parameter_shapes(TINY))
    assert config == TINY


def test_parts_of_a_folder_are_made_live(folder, arrays):
    _, params, _ = load_model_folder(folder, parts=ALL)
    shapes = {k: v.shape for k, v in flatten(params).items()}
    assert shapes == leaf_shapes(TINY, ALL)
    decoder = params["mask_decoder"]
    name = "tracker.sam_mask_decoder.output_hypernetworks_mlps.2.layers.1.weight"
    kernel = decoder["output_hypernetworks_mlps"]["layers_1"]["kernel"]
    np.testing.assert_array_equal(kernel[2], arrays[name].T)
    name = "tracker.sam_prompt_encoder.point_embeddings.3.weight"
    np.testing.assert_array_equal(params["prompt_encoder"]["point_embed"][3], arrays[name][0])


@pytest.mark.parametrize("live", [DEFAULT_PARTS, ALL, ("detector", "interactive")])
@pytest.mark.parametrize("layout", ["official", "huggingface"])
def test_there_and_back_is_exact_whatever_is_live(tmp_path, folder, arrays, live, layout):
    """Folder with these parts live -> checkpoint -> folder -> checkpoint in the first layout."""
    source = open_model_folder(folder)
    _, params, _ = load_model_folder(folder, parts=live)
    tokenizer = build_byte_tokenizer()
    # Carried twins of live tensors are stale after a training: they must not come back.
    stale = {n: t for n, t in source.carried.items()}
    for name in torch_shapes(TINY, live).keys() & stale.keys():
        stale[name] = np.zeros(stale[name].shape, np.float32)
    save_model_folder(
        tmp_path / "live", TINY, params, tokenizer, carried=stale, source=source.source
    )
    out = tmp_path / "out.safetensors"
    run("jax-to-torch", "--src", tmp_path / "live", "--out", out, "--layout", layout)
    if layout == "huggingface":
        found = read(out)
        assert "tracker_model.mask_decoder.iou_prediction_head.layers.0.weight" in found
        assert found["tracker_model.prompt_encoder.point_embed.weight"].shape == (4, 64)
        run("torch-to-jax", "--src", out, "--out", tmp_path / "again")
        out = tmp_path / "back.safetensors"
        run("jax-to-torch", "--src", tmp_path / "again", "--out", out, "--layout", "official")
    found = {n: x for n, x in read(out).items() if not n.endswith("freqs_cis")}
    assert same(found, arrays)


def test_arrays_there_and_back_in_both_layouts(arrays):
    bare = {n.removeprefix("detector."): x for n, x in arrays.items()}
    params = to_flax(bare, TINY, parts=ALL)
    carried = {n: bare[n] for n in carried_shapes(TINY)}
    official = to_torch(params, TINY, carried=carried)
    live = {n: bare[n] for n in (*torch_shapes(TINY, ALL), *carried)}
    assert same(official, live)
    # The class position has no place in transformers.
    names = to_torch(params, TINY, layout="huggingface", carried=carried)
    again = to_flax(names, TINY, layout="huggingface", parts=ALL)
    params["vit"]["pos_embed"][:, 0] = 0
    assert same(flat(again), flat(params))


def flat(params) -> dict[str, np.ndarray]:
    return {"/".join(path): x for path, x in flatten(params).items()}


def test_a_saved_picture_model_holds_the_tracker_inside(tmp_path, arrays):
    """`Sam3Image` with clicks is saved with the tracker behind `inst_interactive_predictor.model.`."""
    inside = {
        n.replace("tracker.", "detector.inst_interactive_predictor.model.", 1): x
        for n, x in arrays.items()
    }
    write(tmp_path / "x.safetensors", inside)
    run("torch-to-jax", "--src", tmp_path / "x.safetensors", "--out", tmp_path / "model")
    _, params, _ = load_model_folder(tmp_path / "model", parts=ALL)
    np.testing.assert_array_equal(params["no_mem_embed"], arrays["tracker.no_mem_embed"])
    params["no_mem_embed"] = params["no_mem_embed"] + 1
    source = open_model_folder(tmp_path / "model")
    save_model_folder(
        tmp_path / "tuned", TINY, params, None, carried=source.carried, source=source.source
    )
    run("jax-to-torch", "--src", tmp_path / "tuned", "--out", tmp_path / "y.safetensors")
    found = {n: x for n, x in read(tmp_path / "y.safetensors").items() if "freqs_cis" not in n}
    assert found.keys() == inside.keys()
    name = "detector.inst_interactive_predictor.model.no_mem_embed"
    np.testing.assert_array_equal(found.pop(name), inside[name] + 1)
    assert all(np.array_equal(x, inside[n]) for n, x in found.items())
    assert official_name(name.removeprefix("detector.")) == "tracker.no_mem_embed"


def test_a_folder_without_heads_says_so(tmp_path):
    params = init_params(TINY, 0)
    save_model_folder(tmp_path / "model", TINY, params, build_byte_tokenizer())
    with pytest.raises(FileError, match=r"has no second neck.*Convert the whole"):
        load_model_folder(tmp_path / "model", parts=ALL)


def test_an_incomplete_or_misshapen_head_is_named(arrays):
    bare = {n.removeprefix("detector."): x for n, x in arrays.items()}
    del bare["tracker.no_mem_embed"]
    bare["tracker.sam_mask_decoder.iou_token.weight"] = np.zeros((2, 64), np.float32)
    with pytest.raises(
        ConversionError, match=r"2 tensors .*no_mem_embed is missing.*iou_token"
    ) as e:
        to_flax(bare, TINY, parts=ALL)
    assert "expected [1, 64]" in str(e.value)


def test_sizes_of_the_heads_are_read_from_their_shapes(tmp_path):
    odd = TINY.model_copy(
        update=dict(mask_decoder_ffn=96, mask_decoder_iou_hidden=24, mask_prompt_channels=8)
    )
    rng = np.random.default_rng(1)
    shapes = torch_shapes(odd, ALL)
    named = {n if n.startswith("tracker.") else f"detector.{n}": s for n, s in shapes.items()}
    write(
        tmp_path / "x.safetensors",
        {n: rng.normal(size=s).astype(np.float32) for n, s in named.items()},
    )
    run("torch-to-jax", "--src", tmp_path / "x.safetensors", "--out", tmp_path / "model")
    config, params, _ = load_model_folder(tmp_path / "model", parts=ALL)
    assert config == odd
    assert params["mask_decoder"]["transformer"]["layers_1"]["lin1"]["kernel"].shape == (64, 96)


def config(**changes):
    return parse_config({"task": "clicks", "model": {"preset": "tiny"}, **changes})


def test_training_everything_leaves_buffers_and_what_clicks_do_not_read():
    everything = config(train="all", lora={"enabled": False})
    params = init_params(TINY, 0, ALL)
    trainable, frozen = split(params, {}, {}, everything)
    buffer = {"prompt_encoder/frequencies"}
    read = {name for name in flat(params) if name.split("/")[0] in CLICKS.reads}
    assert flat(trainable["params"]).keys() == read - buffer
    assert flat(frozen["params"]).keys() == flat(params).keys() - read | buffer
    merged = merge(trainable, frozen)["params"]
    assert same(flat(merged), flat(params))
    rates = multipliers(trainable, frozen, everything)
    assert flatten(rates).keys() == flatten(trainable).keys()
    with pytest.raises(Exception, match="matches no layer"):
        split(params, {}, {}, config(trainable=["*.positional_encoding_gaussian_matrix"]))
    # Nothing of clicks passes through the detector's own decoder.
    with pytest.raises(Exception, match="matches no layer"):
        split(params, {}, {}, config(trainable=["transformer.decoder.*"]))


def test_adapters_reach_every_linear_layer_of_the_heads():
    """... and the merged weights equal the adapted layers, stacked hypernetworks included."""
    patterns = ["tracker.sam_mask_decoder.*"]
    adapted = config(lora={"targets": patterns, "rank": 2})
    layers = [e.layer for e in linear_layers(TINY, ALL) if e.layer.startswith("tracker.")]
    # Two blocks of 3 x 4 + 2, the last attention, four networks and two heads of three layers.
    assert len(layers) == 2 * 14 + 4 + 6 * 3
    params = init_params(TINY, 0, ALL)
    lora, scale = init_lora(jax.random.key(0), params, TINY, adapted.lora, CLICKS)
    assert lora["mask_decoder"]["output_hypernetworks_mlps"]["layers_0"]["a"].shape == (4, 64, 2)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: x + 0.03 * rng.normal(size=x.shape).astype(np.float32), lora)
    points, labels = np.full((3, 2, 2), 40.0), np.array([[1, 0], [1, -2], [2, 3]])
    features = jax.tree.map(
        lambda s: np.random.default_rng(0).normal(size=s.shape).astype(np.float32),
        jax.eval_shape(encode, params, np.zeros((1, 168, 168, 3), np.float32)),
    )
    decode = jax.jit(
        lambda variables: Interactive(TINY).apply(
            variables, features, np.zeros(3, int), points, labels, method="decode"
        )
    )
    got = decode({"params": params, "lora": lora, "lora_scale": scale})
    want = decode({"params": merge_lora(params, lora, scale)})
    plain = decode({"params": params})
    for a, b, c in zip(*map(jax.tree.leaves, (got, want, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
        assert np.abs(a - c).max() > 1e-2 * np.abs(c).max()


def encode(params, images):
    return Interactive(TINY).apply({"params": params}, images, method="encode_image")


def test_adapters_on_heads_are_not_written_for_peft():
    from convert.adapters import Adapter
    from convert.peft_folder import peft_adapter

    adapter = Adapter(np.ones((64, 2)), np.ones((2, 64)), np.float32(1))
    path = ("mask_decoder", "transformer", "final_attn_token_to_image", "q_proj")
    with pytest.raises(FileError, match="interactive have no place"):
        peft_adapter({path: adapter}, TINY)


def test_parts_do_not_change_each_others_random_weights():
    alone = flat(init_params(TINY, 3))
    together = flat(init_params(TINY, 3, ALL))
    assert all(np.array_equal(together[n], x) for n, x in alone.items())
    assert all(np.isfinite(x).all() for x in together.values())
