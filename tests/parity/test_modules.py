"""Every module of the detector, fed what the torch module was fed, gives what it gave."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3jax.model import Sam3

torch = pytest.importorskip("torch")
pytest.importorskip("sam3")
from tests import bridge
from tests import torch_reference as reference

TOLERANCE = 1e-5  # of the output's standard deviation

CASES = {
    "small": (reference.SMALL, dict(images=3, prompts=2, box_prompts=2)),
    "wide": (reference.WIDE, dict(images=1, prompts=3, box_prompts=1)),
    "narrow": (reference.NARROW, dict(images=5, prompts=1, box_prompts=3)),
}


def relative(got, want) -> float:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / want.std())


def array(tensor) -> np.ndarray:
    return tensor.detach().numpy()


def batch_first(tensor) -> np.ndarray:
    return array(tensor).swapaxes(0, 1)


def image_first(tensor, grid) -> np.ndarray:
    """[y * x, B, D] -> [B, y, x, D]."""
    x = batch_first(tensor)
    return x.reshape(len(x), grid, grid, -1)


def channels_last(tensor) -> np.ndarray:
    return array(tensor).transpose(0, 2, 3, 1)


class Case:
    """One torch detector run in train mode with everything its modules saw and said."""

    def __init__(self, size, options):
        self.size, self.config = size, bridge.model_config(size)
        self.torch = reference.detector(size, seed=3)
        self.example = reference.example(size, seed=4, **options)
        self.out, self.inside = reference.forward(self.torch, self.example, train=True)
        self.params = bridge.params(self.torch, size)
        self.images, self.tokens, self.prompts = bridge.inputs(self.torch, self.example)

    def run(self, method, *args):
        model = Sam3(self.config, train=True)

        def call(params, *args):
            return model.apply({"params": params}, *args, method=method)

        return jax.jit(call)(self.params, *args)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(*CASES[request.param])


def test_trunk(case):
    want = case.inside["backbone.vision_backbone.trunk"][2][-1]
    got = case.run(lambda m, x: m.vit(x), case.images)
    assert relative(got, channels_last(want)) < TOLERANCE


def test_neck(case):
    trunk = channels_last(case.inside["backbone.vision_backbone.trunk"][2][-1])
    want = [case.inside[f"backbone.vision_backbone.convs.{i}"][2] for i in range(3)]
    for got, level in zip(case.run(lambda m, x: m.neck(x), trunk), want, strict=True):
        assert relative(got, channels_last(level)) < TOLERANCE


def test_text_encoder(case):
    mask, features, _ = case.inside["backbone.language_backbone"][2]
    asked = case.tokens[: features.shape[1]]  # without the rows that fill up
    got = case.run("encode_text", asked)
    assert relative(got.features, batch_first(features)) < TOLERANCE
    assert (np.asarray(got.valid) == ~array(mask)).all()


def test_geometry_encoder(case):
    _, kwargs, (want, padding) = case.inside["geometry_encoder"]
    grid = case.config.grid
    image = image_first(kwargs["img_feats"][-1], grid)
    position = array(kwargs["img_pos_embeds"][-1])[:, 0]
    b = len(image)
    p = case.prompts
    boxes, labels, valid = (
        np.asarray(x).reshape(b, *np.shape(x)[2:]) for x in (p.boxes, p.box_labels, p.box_valid)
    )
    got, got_valid = case.run(
        lambda m, *args: m.geometry_encoder(*args), boxes, labels, valid, image, position
    )
    assert (np.asarray(got_valid).sum(1) == (~array(padding)).sum(1)).all()
    # Torch packs the class token behind the last valid box; ours stays at the end. Compare by token.
    want = batch_first(want)
    for row in range(b):
        n = int(valid[row].sum())
        ours = np.concatenate([got[row, :n], got[row, -1:]])
        assert relative(ours, want[row, : n + 1]) < TOLERANCE


def test_fusion_encoder(case):
    _, kwargs, want = case.inside["transformer.encoder"]
    want = want["memory"]
    image, position = (array(kwargs[k][0]) for k in ("src", "src_pos"))
    got = case.run(
        lambda m, *args: m.fusion_encoder(*args),
        image.swapaxes(0, 1), position[:, 0],
        batch_first(kwargs["prompt"]), ~array(kwargs["prompt_key_padding_mask"]),
    )  # fmt: skip
    assert relative(got, batch_first(want)) < TOLERANCE


def test_decoder(case):
    _, kwargs, (queries, references, presence, _) = case.inside["transformer.decoder"]
    memory = image_first(kwargs["memory"], case.config.grid)
    got = case.run(
        lambda m, *args: m.decoder(*args),
        memory, array(kwargs["pos"])[:, 0],
        batch_first(kwargs["memory_text"]), ~array(kwargs["text_attention_mask"]),
    )  # fmt: skip
    assert relative(got.queries, array(queries).swapaxes(1, 2)) < TOLERANCE
    assert (
        relative(got.presence_logits, array(presence)[..., 0, :].reshape(got.presence_logits.shape))
        < TOLERANCE
    )
    # What torch calls the reference of layer l + 1 is the box of layer l; the last is checked whole.
    assert relative(got.boxes[:-1], array(references)[1:].swapaxes(1, 2)) < TOLERANCE


def test_scoring(case):
    args, _, want = case.inside["dot_prod_scoring"]
    queries, prompt, padding = args
    got = case.run(
        lambda m, *args: m.scoring(*args), array(queries), batch_first(prompt), ~array(padding)
    )
    assert relative(got, array(want)[..., 0]) < TOLERANCE


def in_double(x):
    """Torch arguments, however nested, in float64."""
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, list | tuple):
        return type(x)(in_double(part) for part in x)
    return {k: in_double(v) for k, v in x.items()} if isinstance(x, dict) else x


def test_pixel_decoder_and_segmentation_head(case):
    """Against torch in float64: its own float32 rounding is as large as ours (8e-6 and 7e-6), and on some
    processors the two together pass the tolerance."""
    args, kwargs, _ = case.inside["segmentation_head"]
    with torch.no_grad():
        exact = copy.deepcopy(case.torch.segmentation_head).double()
        want = exact(*in_double(args), **in_double(kwargs))
    names = (
        "backbone_feats",
        "obj_queries",
        "image_ids",
        "encoder_hidden_states",
        "prompt",
        "prompt_mask",
    )
    kwargs = {**dict(zip(names, args)), **kwargs}
    grid = case.config.grid
    memory = image_first(kwargs["encoder_hidden_states"], grid)
    ids = np.asarray(case.example["image_of_pair"])
    levels = tuple(channels_last(level)[ids] for level in kwargs["backbone_feats"])
    queries = array(kwargs["obj_queries"])[-1]
    prompt = batch_first(kwargs["prompt"]), ~array(kwargs["prompt_mask"])

    def call(m, *args):
        embed, pixels, semantic = m.segmentation_head(*args)
        return jnp.einsum("bqd,byxd->bqyx", embed, pixels), semantic

    masks, semantic = case.run(call, memory, levels, queries, *prompt)
    assert relative(masks, array(want["pred_masks"])) < TOLERANCE
    assert relative(semantic, array(want["semantic_seg"])[:, 0]) < TOLERANCE


def test_gelu_equals_torch_in_value_and_gradient():
    import torch

    from sam3jax.model.layers import gelu

    x = np.linspace(-12, 12, 4801, dtype=np.float32)
    tensor = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.gelu(tensor)
    y.sum().backward()
    np.testing.assert_allclose(gelu(x), array(y), rtol=1e-6, atol=1e-6)
    slope = jax.vmap(jax.grad(gelu))(x)
    np.testing.assert_allclose(slope, tensor.grad, rtol=1e-6, atol=1e-6)
