"""SAM 3.1 checkpoints: the detector is read as transformers computes it, all the rest comes back."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are torch's")
transformers = pytest.importorskip("transformers", reason="the oracle of SAM 3.1's detector")
pytest.importorskip("sam3", reason="seeded weights come from the first oracle")

from safetensors.torch import load_file, save_file

from convert.huggingface_config import huggingface_config
from sam3jax.config import ModelConfig
from sam3jax.weights.model_folder import load_params, open_model_folder
from sam3jax.weights.names import DETECTOR_PART, INTERACTIVE_PART, SECOND_NECK_PART, entries
from sam3jax.weights.parts import torch_shapes
from sam3jax.weights.tree import leaf
from tests import torch_reference as reference
from tests.parity.test_convert import load, run, run_folder, same
from tests.parity.test_huggingface import close, example, ours, theirs

SIZE = reference.Size(vocabulary=1024, text_length=16)
HEADS = ModelConfig(
    dim=32, heads=4, preset="tiny", mask_decoder_ffn=48, mask_decoder_iou_hidden=24
)  # of the clicking heads; their other sizes are the detector's
NECK = "backbone.vision_backbone"


def multiplex_name(name: str) -> str:
    """The name in SAM 3.1 of a tensor of SAM 3's clicking heads."""
    if name == "tracker.no_mem_embed":
        return "tracker.model.interactivity_no_mem_embed"
    return name.replace("tracker.", "tracker.model.interactive_", 1)


@pytest.fixture(scope="module")
def multiplex() -> dict[str, "torch.Tensor"]:
    """sam3.1_multiplex.pt at a tiny size, seeded: three necks of three levels, tables in two parts."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in reference.detector(SIZE, seed=3).state_dict().items():
        if f"{NECK}.convs.3." in name:
            continue
        if name.endswith("freqs_cis"):
            state |= {f"{name}_real": tensor.real.clone(), f"{name}_imag": tensor.imag.clone()}
            continue
        state[name] = tensor
        for neck in ("interactive_convs", "propagation_convs"):
            if f"{NECK}.convs." in name:
                state[name.replace(".convs.", f".{neck}.")] = draw(*tensor.shape)
    state["backbone.language_backbone.encoder.text_projection"] = draw(7, 3)
    state = {f"detector.{name}": tensor for name, tensor in state.items()}
    for name, shape in torch_shapes(HEADS, (INTERACTIVE_PART,)).items():
        state[multiplex_name(name)] = draw(*shape)
    # The memory has names of SAM 3's heads, and other shapes.
    state["tracker.model.sam_mask_decoder.iou_token.weight"] = draw(16, 32)
    state["tracker.model.maskmem_tpos_enc"] = draw(7, 1, 1, 8)
    state["tracker.model.output_valid_embed"] = draw(16, 32)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory, multiplex):
    """The model folder of it."""
    place = tmp_path_factory.mktemp("multiplex")
    torch.save(multiplex, place / "sam3.1_multiplex.pt")
    run("torch-to-jax", "--src", place / "sam3.1_multiplex.pt", "--out", place / "model")
    return place / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_checkpoint_comes_back_in_its_layout_bit_for_bit(tmp_path, multiplex, dtype):
    state = {n: t.to(dtype).contiguous() for n, t in multiplex.items()}
    save_file(state, tmp_path / "in.safetensors")
    run("torch-to-jax", "--src", tmp_path / "in.safetensors", "--out", tmp_path / "m")
    run("jax-to-torch", "--src", tmp_path / "m", "--out", tmp_path / "out.safetensors")
    same(load_file(tmp_path / "out.safetensors"), state)


def test_the_way_over_transformers_loses_nothing(tmp_path, folder, multiplex):
    run("jax-to-torch", "--src", folder, "--out", tmp_path / "hf", "--layout", "huggingface")
    run("torch-to-jax", "--src", tmp_path / "hf", "--out", tmp_path / "again")
    run("jax-to-torch", "--src", tmp_path / "again", "--out", tmp_path / "o.pt", "--layout=official")  # fmt: skip
    same(load(tmp_path / "o.pt"), multiplex)


def test_a_run_changes_what_it_trained_alone(tmp_path, folder, multiplex):
    run_folder(tmp_path / "run", folder, lora={"rank": 2, "targets": ["transformer.decoder.*"]})
    run("jax-to-torch", "--src", tmp_path / "run", "--out", tmp_path / "out.pt")
    tuned = load(tmp_path / "out.pt")
    assert tuned.keys() == multiplex.keys()
    changed = [n for n, t in tuned.items() if not torch.equal(t, multiplex[n])]
    assert changed
    assert all(name.startswith("detector.transformer.decoder.") for name in changed)


def test_the_detector_computes_what_transformers_does(tmp_path, folder, multiplex):
    """Its vision encoder has three levels too; behind it Sam3Model drops one, so that one is added."""
    found = open_model_folder(folder).config
    config = found.model_copy(update={"clamp_presence": True, "geometry_without_boxes": False})
    run("jax-to-torch", "--src", folder, "--out", tmp_path / "hf", "--layout", "huggingface")
    whole = transformers.Sam3Model.from_pretrained(tmp_path / "hf").eval()
    e = example(config)
    expected = theirs(whole, e)
    close(ours(config, {"params": load_params(open_model_folder(folder))}, e), expected)

    written = huggingface_config(config)
    del written["architectures"]
    written["vision_config"]["scale_factors"] = [4.0, 2.0, 1.0]
    three = transformers.Sam3Model(transformers.Sam3Config(**written)).eval()
    state = load_file(tmp_path / "hf" / "model.safetensors")
    state = {n.removeprefix("detector_model."): t for n, t in state.items()}
    report = three.load_state_dict(state, strict=False)
    assert not report.missing_keys
    assert {n.rsplit(".", 2)[0] for n in report.unexpected_keys} == {"vision_encoder.neck.fpn_layers.3"}  # fmt: skip
    images = torch.from_numpy(e["images"])
    with torch.no_grad():
        levels = three.vision_encoder(images).fpn_hidden_states
        beside = whole.vision_encoder(images).fpn_hidden_states
    assert len(levels) == 3
    assert all(torch.equal(a, b) for a, b in zip(levels, beside[:3], strict=True))


def test_the_clicking_heads_and_their_neck_are_live_parts(folder, multiplex):
    parts = (DETECTOR_PART, SECOND_NECK_PART, INTERACTIVE_PART)
    opened = open_model_folder(folder)
    assert (opened.config.mask_decoder_ffn, opened.config.mask_decoder_iou_hidden) == (48, 24)
    params = load_params(opened, parts=parts)
    for entry in entries(opened.config, parts[1:]):
        name = f"detector.{entry.torch.replace('sam2_convs', 'interactive_convs')}"
        stored = multiplex[multiplex_name(entry.torch) if "tracker." in entry.torch else name]
        np.testing.assert_array_equal(leaf(params, entry.path)[entry.slot], entry.read(stored.numpy()))  # fmt: skip


def test_tuned_clicking_heads_go_back_under_their_names(tmp_path, folder, multiplex):
    run_folder(tmp_path / "run", folder, task="clicks", train="all")
    run("jax-to-torch", "--src", tmp_path / "run", "--out", tmp_path / "out.pt")
    tuned = load(tmp_path / "out.pt")
    assert tuned.keys() == multiplex.keys()
    changed = {n for n, t in tuned.items() if not torch.equal(t, multiplex[n])}
    assert "tracker.model.interactivity_no_mem_embed" in changed
    assert f"detector.{NECK}.interactive_convs.2.conv_3x3.weight" in changed
    assert not [n for n in changed if "propagation" in n or n.startswith("tracker.model.sam_")]


def test_inspect_says_what_it_is(folder, multiplex, capsys):
    run("inspect", folder.parent / "sam3.1_multiplex.pt")
    said = capsys.readouterr().out
    assert "of SAM 3.1" in said
    assert "further necks 36" in said
    assert "unknown: 0 tensors" in said
