"""What a run learned arrives elsewhere: opened with transformers and peft, nothing trained is lost."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are torch's")
transformers = pytest.importorskip("transformers", reason="exports are opened by transformers")
pytest.importorskip("sam3", reason="seeded weights come from the first oracle")
peft = pytest.importorskip("peft", reason="adapters are read by peft")
huggingface_hub = pytest.importorskip("huggingface_hub", reason="reads model cards")

from PIL import Image
from scipy.spatial.distance import directed_hausdorff

from convert.__main__ import main
from convert.differences import compared, destination, measured
from convert.model_card import model_card
from convert.sources import open_source
from sam3jax.config import load_config
from sam3jax.weights.lora import merge_lora
from sam3jax.weights.start import model_folder
from tests import torch_reference as reference
from tests.bridge import inputs
from tests.bridge import published as as_published
from tests.coco_folders import annotation, write
from tests.parity.test_convert import load, run, run_folder, small_vocabulary
from tests.parity.test_huggingface import close, compiled, example, ours, theirs

SIZE = reference.Size(vocabulary=1024, text_length=16)
DECODER, VISION = "transformer.decoder", "backbone.vision_backbone"
# One kernel that has an adapter too, one third of a fused tensor, owners of other tensors, a name that
# another module's name ends in.
TRAINABLE = [
    f"{DECODER}.query_embed.weight", f"{DECODER}.layers.0.linear1.weight", f"{DECODER}.layers.1.self_attn.q_proj.weight",
    f"{VISION}.trunk.pos_embed", "backbone.language_backbone.resizer.*", f"{VISION}.convs.1.*",
]  # fmt: skip
RUNS = {
    "LoRA": dict(lora={"rank": 3}),
    "LoRA and parameters": dict(lora={"rank": 3}, trainable=TRAINABLE),
    "everything": dict(train="all"),
    "bfloat16 base": dict(lora={"rank": 3}),
    "for transformers": dict(lora={"rank": 3}, destination="transformers"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Model folders of one seeded detector in float32 and in bfloat16, and transformers folders of them."""
    folder = tmp_path_factory.mktemp("bases")
    state = reference.detector(SIZE, seed=3).state_dict()
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()}
    for name, tensors in (("full", state), ("half", half)):
        torch.save(tensors, folder / f"{name}.pt")
        run("torch-to-jax", "--src", folder / f"{name}.pt", "--out", folder / name)
        run("jax-to-torch", "--src", folder / name, "--out", folder / f"{name}-hf", "--layout=huggingface")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, bases):
    """{kind: (run folder, its weights as our model reads them)}."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for kind, settings in RUNS.items():
        base = bases / ("half" if kind == "bfloat16 base" else "full")
        path = folder / kind.replace(" ", "-")
        variables = run_folder(path, base, **settings)
        params = variables["params"]
        if "lora" in variables:
            params = merge_lora(params, variables["lora"], variables["lora_scale"])
        found[kind] = path, {"params": params}
    return found


def config_of(run_path):
    """The model as transformers computes it; its norm epsilon it can be told."""
    config = load_config(run_path / "config.yaml").model
    return config.model_copy(update={"clamp_presence": True, "geometry_without_boxes": False})


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_opened_in_transformers_and_peft_answers_as_here(tmp_path, bases, tuned, kind):
    path, variables = tuned[kind]
    config = config_of(path)
    if kind == "for transformers":
        assert config == load_config(path / "config.yaml").model
    e = example(config, boxes=False)
    expected = ours(config, variables, e)
    run("jax-to-torch", "--src", path, "--out", tmp_path / "hf", "--layout", "huggingface")
    merged = transformers.Sam3Model.from_pretrained(tmp_path / "hf").eval()
    close(expected, theirs(merged, e))
    if kind == "everything":
        return
    run("jax-to-torch", "--src", path, "--out", tmp_path / "adapter", "--adapter")
    base = bases / ("half-hf" if kind == "bfloat16 base" else "full-hf")
    model = transformers.Sam3Model.from_pretrained(base, dtype=torch.float32)
    before = theirs(model.eval(), e)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    close(expected, theirs(adapted, e))
    assert np.abs(expected["pred_logits"] - before["pred_logits"]).max() > 0.1


@pytest.mark.parametrize("folder", ["hf", "adapter"])
def test_an_export_names_its_base_and_carries_a_card_of_the_hub(tmp_path, tuned, folder):
    path, _ = tuned["LoRA and parameters"]
    options = ["--adapter"] if folder == "adapter" else ["--layout", "huggingface"]
    run("jax-to-torch", "--src", path, "--out", tmp_path / folder, "--base", "a/b", *options)
    card = huggingface_hub.ModelCard.load(tmp_path / folder / "README.md")
    assert card.data.base_model == "a/b"
    assert card.data.library_name == ("peft" if folder == "adapter" else "transformers")
    assert "leaves the geometry encoder out" in card.text
    if folder == "adapter":
        run("jax-to-torch", "--src", path, "--out", tmp_path / folder, "--adapter")
        written = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == load_config(path / "config.yaml").init


def test_metrics_of_a_run_stand_in_its_card(bases, tuned):
    source = open_source(tuned["LoRA"][0])
    metrics = {"mask_AP": 0.25, "mask_AP50": float("nan"), "note": None}
    assert source.training
    found = dataclasses.replace(source.training.run, metrics=metrics)
    source = dataclasses.replace(source, training=dataclasses.replace(source.training, run=found))
    card = huggingface_hub.ModelCard(model_card(source, "a/b"))
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("mask_AP", 0.25)


def test_adapters_come_back_in_as_peft_merges_them(tmp_path, bases, tuned, capsys, monkeypatch):
    """From their folder beside a base, from one that names its base, and inside a model that nobody merged."""
    monkeypatch.setenv("SAM3JAX_CACHE", str(tmp_path / "cache"))
    path, base = tuned["LoRA and parameters"][0], bases / "full-hf"
    run("jax-to-torch", "--src", path, "--out", tmp_path / "a", "--adapter", "--base", base)
    model = transformers.Sam3Model.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "a")
    (tmp_path / "whole").mkdir()
    shutil.copy(tmp_path / "a" / "adapter_config.json", tmp_path / "whole")
    torch.save(adapted.state_dict(), tmp_path / "whole" / "model.pt")
    expected = adapted.merge_and_unload().state_dict()
    run("torch-to-jax", "--src", bases / "full.pt", "--adapter", tmp_path / "a", "--out", tmp_path / "0")  # fmt: skip
    run("torch-to-jax", "--src", tmp_path / "whole", "--out", tmp_path / "1")
    said = capsys.readouterr().out
    assert said.count(" LoRA adapters of ") == 2
    folders = [tmp_path / "0", tmp_path / "1", model_folder(tmp_path / "a")]
    for i, folder in enumerate(folders):
        run("jax-to-torch", "--src", folder, "--out", tmp_path / f"{i}.safetensors", "--layout=huggingface")  # fmt: skip
        found = load(tmp_path / f"{i}.safetensors")
        for name in found.keys() & expected.keys():
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
        assert len(found.keys() & expected.keys()) > 300


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ({"base_model_name_or_path": None}, "names none: give it: --src BASE --adapter"),
        ({"base_model_name_or_path": "nowhere/at/all"}, "there is no nowhere/at/all"),
        ({"use_dora": True}, "use_dora True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens [1, 2]"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"alpha_pattern": {"(": 1}}, "holds no patterns"),
    ],
)
def test_adapters_that_cannot_be_merged_are_named_with_the_remedy(tmp_path, bases, tuned, capsys, edit, sentence):  # fmt: skip
    run("jax-to-torch", "--src", tuned["LoRA"][0], "--out", tmp_path / "a", "--adapter", "--base", bases / "full-hf")  # fmt: skip
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    assert main(["torch-to-jax", "--src", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_what_was_trained_is_float32_and_asked_rounding_is_measured(tmp_path, bases, tuned, capsys):
    """The loss that the export says is the one that torch finds between the files."""
    path, _ = tuned["bfloat16 base"]
    before = load(bases / "half.pt")
    run("jax-to-torch", "--src", path, "--out", tmp_path / "wide.pt")
    capsys.readouterr()
    run("jax-to-torch", "--src", path, "--out", tmp_path / "narrow.pt", "--dtype", "bfloat16")
    said = capsys.readouterr().out
    wide, narrow = load(tmp_path / "wide.pt"), load(tmp_path / "narrow.pt")
    moved = [n for n, t in wide.items() if t.dtype != before[n].dtype]
    assert moved
    assert all(wide[n].dtype == torch.float32 for n in moved)
    assert all(torch.equal(wide[n], before[n]) for n in wide.keys() - set(moved))
    lost = sum(((narrow[n].double() - wide[n].double()) ** 2).sum() for n in moved)
    added = sum(((wide[n].double() - before[n].double()) ** 2).sum() for n in moved)
    assert f"the rounding is {(lost / added).sqrt():.2g} times what training changed" in said


def test_adapters_that_are_not_all_that_was_learned_are_refused(tmp_path, bases, tuned, capsys):
    path, _ = tuned["LoRA"]
    run_folder(tmp_path / "second", path, lora={"rank": 2})
    for source, sentence in (
        (tmp_path / "second", "was trained on top of"),
        (tuned["everything"][0], "no layer is adapted"),
        (bases / "full", "is no run"),
    ):
        out = tmp_path / "out"
        assert main(["jax-to-torch", "--src", str(source), "--out", str(out), "--adapter"]) == 2
        assert sentence in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.parametrize("kind", RUNS)
def test_an_official_export_opened_with_sam3_answers_as_here(tmp_path, tuned, kind):
    path, variables = tuned[kind]
    run(
        "jax-to-torch", "--src", path, "--out", tmp_path / "o.pt", "--prefix", "", "--detector-only"
    )
    detector = reference.detector(SIZE, seed=11)
    detector.load_state_dict(load(tmp_path / "o.pt"), strict=True)
    e = reference.example(SIZE, seed=5, images=3, prompts=1, box_prompts=2)
    with small_vocabulary(detector):
        out, _ = reference.forward(detector, e, train=False)
        images, tokens, prompts = inputs(detector, e)
    config = destination(load_config(path / "config.yaml").model, "official")
    found = as_published(compiled(config)(variables, images, tokens, prompts), False)
    for name, expected in reference.stacked(out).items():
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "layout", "warned"),
    [
        ("LoRA", "huggingface", "transformers leaves the geometry encoder out"),
        ("LoRA", "official", None),
        ("for transformers", "huggingface", None),
        ("for transformers", "official", "sam3 runs the geometry encoder"),
    ],
)
def test_an_export_says_where_answers_will_differ(tmp_path, tuned, capsys, kind, layout, warned):
    run(
        "jax-to-torch",
        "--src",
        tuned[kind][0],
        "--out",
        tmp_path / "x.safetensors",
        "--layout",
        layout,
    )
    said = capsys.readouterr().out
    assert ("WARNING" in said) == bool(warned)
    assert warned is None or warned in said


def write_data(folder):
    write(folder / "train", [annotation(1, 0, 1, (5, 5, 20, 20))], images=1)
    return folder


def test_the_difference_is_measured_on_pictures(tmp_path, tuned):
    """What is said of the scores is what the two models of transformers and of ours give."""
    path, variables = tuned["LoRA"]
    source = open_source(path)
    assert source.training
    found = dataclasses.replace(source.training.run, thresholds={"red circle": 0.5})
    source = dataclasses.replace(source, training=dataclasses.replace(source.training, run=found))
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "p.png")
    [said] = measured(source, "huggingface", [tmp_path / "p.png"])
    tokens = found.tokenizer(["red circle"]).astype(np.int64)
    images = (noise.transpose(2, 0, 1)[None] / 127.5 - 1).astype(np.float32)
    e = {**example(config_of(path), pairs=1, boxes=False), "images": images, "tokens": tokens}
    scores, masks = [], []
    for config in (load_config(path / "config.yaml").model, config_of(path)):
        out = ours(config, variables, e)
        sigmoid = lambda x: 1 / (1 + np.exp(-x))
        presence = sigmoid(np.ravel(out["presence_logit_dec"])[-1])
        scores.append(sigmoid(np.ravel(out["pred_logits"])) * presence)
        small = torch.tensor(out["pred_masks"].reshape(1, -1, *out["pred_masks"].shape[-2:]))
        large = torch.nn.functional.interpolate(small, (112, 112), mode="bilinear")[0].numpy()
        masks.append(large > 0)
    assert f"differ by up to {np.abs(scores[0] - scores[1]).max():.2g}" in said
    assert f"{scores[0].max():.3f} here and {scores[1].max():.3f} there" in said
    asked = {int(scores[0].argmax()), *np.flatnonzero(np.maximum(*scores) > 0.5).tolist()}
    edges = [
        max(directed_hausdorff(np.argwhere(x), np.argwhere(y))[0] for x, y in ((a, b), (b, a)))
        for a, b in ((masks[0][q], masks[1][q]) for q in asked)
    ]
    assert f"edges of {len(asked)} masks differ by up to {max(edges):.3g} pixels of 112" in said
    assert max(edges) > 0
    # Without pictures some of the run's own are taken, where they are there and answers will differ.
    data = found.config.data.model_copy(update={"train": str(write_data(tmp_path / "data"))})
    own = dataclasses.replace(found, config=found.config.model_copy(update={"data": data}))
    own = dataclasses.replace(source, training=dataclasses.replace(source.training, run=own))
    assert "measured on 1 pictures, 1 phrases" in compared(own, "huggingface")[-1]
    for other, layout, pictures in ((own, "huggingface", None), (own, "official", ()), (source, "huggingface", ())):  # fmt: skip
        assert not [line for line in compared(other, layout, pictures) if "measured on" in line]
    # With nothing between the two programs nothing differs; what an export rounds away is in the measure.
    [said] = measured(source, "official", [tmp_path / "p.png"], ["a"])
    assert "single scores differ by up to 0; edges of" in said
    assert "by up to 0 pixels" in said
    [said] = measured(source, "official", [tmp_path / "p.png"], ["a"], "bfloat16")
    assert "single scores differ by up to 0;" not in said
