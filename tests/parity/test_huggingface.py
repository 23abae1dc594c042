"""Against transformers' Sam3Model, an independent port: weights in, outputs, weights and adapters out."""

import functools
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are torch's")
transformers = pytest.importorskip(
    "transformers", reason="the second oracle is transformers' Sam3Model"
)
pytest.importorskip("sam3", reason="seeded weights come from the first oracle")

import jax
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from convert.adapters import adapters_of
from convert.huggingface_config import huggingface_config
from convert.peft_folder import write_adapter
from sam3jax.config import LoraConfig, ModelConfig
from sam3jax.model import Sam3
from sam3jax.types import Prompts
from sam3jax.weights.lora import init_lora, merge_lora
from sam3jax.weights.model_folder import load_model_folder
from tests import torch_reference as reference
from tests.bridge import published

SWITCHES = dict(vit_norm_eps=1e-6, geometry_without_boxes=False, clamp_presence=True)
SIZES = dict(
    patch_size=14, pretrain_image_size=56, window_size=4, vit_dim=48, vit_stages=2, vit_stage_blocks=2, vit_heads=4,
    vit_mlp_ratio=4.625, text_dim=32, text_layers=2, text_heads=4, vocab_size=1024, text_length=16, dim=32, ffn=64,
    heads=4, fusion_layers=2, decoder_layers=3, geometry_layers=2, queries=10,
)  # fmt: skip


def small(image_size: int = 112) -> ModelConfig:
    return ModelConfig(image_size=image_size, **SIZES, **SWITCHES)


def sam3_model(config: ModelConfig, seed: int = 1):
    """transformers' detector of this size, in evaluation, every weight drawn from the seed."""
    written = huggingface_config(config)
    del written["architectures"]
    model = transformers.Sam3Model(transformers.Sam3Config(**written)).eval()
    reference.fill(model, seed)
    return model


def example(
    config: ModelConfig, pairs: int = 3, boxes: bool = True, seed: int = 2, room: int = 2
) -> dict[str, np.ndarray]:
    """Random pictures, token rows and room for box exemplars; every prompt has one, or none has."""
    rng = np.random.default_rng(seed)
    edge = config.image_size
    tokens = np.zeros((pairs, config.text_length), np.int64)
    for row, length in zip(tokens, rng.integers(3, 9, pairs), strict=True):
        row[:length] = [1022, *rng.integers(1, 1000, length - 2), 1023]
    return {
        "images": rng.uniform(-1, 1, (pairs, 3, edge, edge)).astype(np.float32),
        "tokens": tokens,
        "boxes": np.concatenate(
            [rng.uniform(0.3, 0.7, (pairs, room, 2)), rng.uniform(0.1, 0.4, (pairs, room, 2))], -1
        ).astype(np.float32),
        "labels": rng.integers(0, 2, (pairs, room)),
        "valid": np.arange(room) < rng.integers(1, room + 1, (pairs, 1)) * boxes,
    }


def theirs(model, e: dict) -> dict[str, np.ndarray]:
    arguments = dict(
        pixel_values=torch.from_numpy(e["images"]),
        input_ids=torch.from_numpy(e["tokens"]),
        attention_mask=torch.from_numpy((e["tokens"] != 0).astype(np.int64)),
    )
    if e["valid"].any():  # transformers' own way to say that there are none: not to pass them
        labels = np.where(e["valid"], e["labels"], -10)
        arguments |= dict(
            input_boxes=torch.from_numpy(e["boxes"]), input_boxes_labels=torch.from_numpy(labels)
        )
    with torch.no_grad():
        out = model(**arguments)
    xyxy = out.pred_boxes.numpy()
    boxes = np.concatenate([(xyxy[..., :2] + xyxy[..., 2:]) / 2, xyxy[..., 2:] - xyxy[..., :2]], -1)
    return {
        "pred_logits": out.pred_logits.numpy()[..., None],
        "pred_boxes": boxes,
        "presence_logit_dec": out.presence_logits.numpy(),
        "pred_masks": out.pred_masks.numpy(),
        "semantic_seg": out.semantic_seg.numpy(),
    }


@functools.cache
def compiled(config: ModelConfig):
    return jax.jit(Sam3(config).apply)


def ours(config: ModelConfig, variables: dict, e: dict) -> dict[str, np.ndarray]:
    pairs = len(e["tokens"])
    prompts = Prompts(
        text_id=np.arange(pairs, dtype=np.int32)[:, None],
        valid=np.ones((pairs, 1), bool),
        boxes=e["boxes"][:, None],
        box_labels=e["labels"][:, None].astype(np.int32),
        box_valid=e["valid"][:, None],
    )
    images, tokens = e["images"].transpose(0, 2, 3, 1), e["tokens"].astype(np.int32)
    return published(compiled(config)(variables, images, tokens, prompts), train=False)


def close(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name].reshape(value.shape),
            value,
            rtol=1e-4,
            atol=1e-4 * np.abs(value).max(),
            err_msg=name,
        )


def run(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert not [
        n for n, t in expected.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)
    ]


@pytest.mark.parametrize(("image_size", "boxes"), [(112, False), (112, True), (168, True)])
def test_outputs_equal_those_of_transformers(tmp_path, image_size, boxes):
    config = small(image_size)
    model = sam3_model(config)
    model.save_pretrained(tmp_path / "hf")
    run("torch-to-jax", "--src", tmp_path / "hf", "--out", tmp_path / "folder")
    found, params, _ = load_model_folder(tmp_path / "folder")
    assert found == config
    e = example(config, boxes=boxes)
    close(ours(found, {"params": params}, e), theirs(model, e))


@pytest.mark.parametrize("prefix", ["", "detector_model.", "model."])
def test_a_transformers_checkpoint_comes_back_bit_for_bit(tmp_path, prefix):
    model = sam3_model(small())
    state = {prefix + n: t.contiguous() for n, t in model.state_dict().items()}
    # Older versions of transformers store this buffer.
    state[f"{prefix}text_encoder.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(state, tmp_path / "model.safetensors")
    run(
        "torch-to-jax",
        "--src",
        tmp_path / "model.safetensors",
        "--out",
        tmp_path / "folder",
        "--set",
        "window_size=4",
    )
    run("jax-to-torch", "--src", tmp_path / "folder", "--out", tmp_path / "out.safetensors")
    same(load_file(tmp_path / "out.safetensors"), state)


def test_a_video_checkpoint_comes_back_and_loads_into_both_models(tmp_path):
    written = huggingface_config(small())
    del written["architectures"]
    torch.manual_seed(0)
    video = transformers.Sam3VideoModel(transformers.Sam3VideoConfig(detector_config=written))
    reference.fill(video.detector_model, 3)
    video.save_pretrained(tmp_path / "hf")
    run("torch-to-jax", "--src", tmp_path / "hf", "--out", tmp_path / "folder")
    run("jax-to-torch", "--src", tmp_path / "folder", "--out", tmp_path / "out")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    same(load_file(tmp_path / "out" / "model.safetensors"), stored)
    again = transformers.Sam3VideoModel.from_pretrained(tmp_path / "out")
    same(again.state_dict(), video.state_dict())
    detector, report = transformers.Sam3Model.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    same(detector.state_dict(), video.detector_model.state_dict())

    # To the published layout and back: the tracker is translated. Kept aside is only the second copy of
    # the prompt encoder's frequencies, which is no copy in a model with random weights.
    # (This transformers writes the tracker's prefix twice; the published file has it once.)
    official, back = tmp_path / "official.pt", tmp_path / "back"
    run("jax-to-torch", "--src", tmp_path / "folder", "--out", official, "--layout", "official")
    run("torch-to-jax", "--src", official, "--out", tmp_path / "again")
    run("jax-to-torch", "--src", tmp_path / "again", "--out", back, "--layout", "huggingface")
    once = {
        n.replace("tracker_model.tracker_model.", "tracker_model."): t for n, t in stored.items()
    }
    same(load_file(back / "model.safetensors"), once)
    names = torch.load(official, weights_only=True).keys()
    assert {n.split(".")[0] for n in names} == {"detector", "tracker"}
    aside = load_file(tmp_path / "official.pt.carried.safetensors").keys()
    assert aside == {"tracker_model.shared_image_embedding.positional_embedding"}


def test_an_official_model_exported_to_transformers_computes_the_same(tmp_path):
    """Under the switches that transformers cannot be told; its norm epsilon it can."""
    size = reference.Size(vocabulary=1024, text_length=16)
    detector = reference.detector(size, seed=6)
    torch.save(detector.state_dict(), tmp_path / "in.pt")
    run("torch-to-jax", "--src", tmp_path / "in.pt", "--out", tmp_path / "folder")
    run(
        "jax-to-torch",
        "--src",
        tmp_path / "folder",
        "--out",
        tmp_path / "hf",
        "--layout",
        "huggingface",
    )
    model, report = transformers.Sam3Model.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    config, params, tokenizer = load_model_folder(tmp_path / "folder")
    processor = transformers.Sam3Processor.from_pretrained(tmp_path / "hf")
    read = processor(text=["red circle", "A dog!"], return_tensors="np")
    np.testing.assert_array_equal(
        np.where(read["attention_mask"], read["input_ids"], 0)[:, :16],
        tokenizer(["red circle", "A dog!"]),
    )
    assert processor.image_processor.size["height"] == config.image_size
    assert config.vit_norm_eps == 1e-5
    config = config.model_copy(update={"clamp_presence": True, "geometry_without_boxes": False})
    e = example(config)
    close(ours(config, {"params": params}, e), theirs(model.eval(), e))


TARGETS = (
    "backbone.vision_backbone.trunk.blocks.3.*", "backbone.vision_backbone.trunk.blocks.*.mlp.fc1",
    "backbone.language_backbone.*", "transformer.encoder.layers.*", "transformer.decoder.*",
    "geometry_encoder.encode.1.*", "dot_prod_scoring.*", "segmentation_head.*",
)  # fmt: skip


def test_adapters_through_peft_give_the_outputs_of_jax(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are read by peft")
    config = small()
    model = sam3_model(config)
    model.save_pretrained(tmp_path / "hf")
    run("torch-to-jax", "--src", tmp_path / "hf", "--out", tmp_path / "folder")
    _, params, _ = load_model_folder(tmp_path / "folder")
    lora, scale = init_lora(
        jax.random.key(0), params, config, LoraConfig(rank=3, alpha=7.0, targets=TARGETS)
    )
    rng = np.random.default_rng(4)
    lora = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), lora)

    write_adapter(tmp_path / "adapter", adapters_of(lora, scale), config, "facebook/sam3")
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"]) == (3, 7)
    e = example(config)
    before = theirs(model, e)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    placed = {n for n, _ in tuned.named_parameters() if "lora_" in n}
    stored = {
        n.replace(".weight", ".default.weight")
        for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    }
    assert placed == stored

    after = ours(config, {"params": merge_lora(params, lora, scale)}, e)
    assert np.abs(after["pred_logits"] - before["pred_logits"]).max() > 0.1
    close(after, theirs(tuned, e))
