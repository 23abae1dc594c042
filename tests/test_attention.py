"""Attention block by block equals attention at once, in value and gradient; dropout is what it says."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sam3jax.model import attention as module
from sam3jax.model import blockwise as by_blocks
from sam3jax.model.layers import Mlp
from sam3jax.training.mesh import make_mesh


def problem(seed, b=3, n=12, s=10, h=2, k=8, bias=False, mask=None):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    inputs = {"q": draw(b, n, h, k), "k": draw(b, s, h, k), "v": draw(b, s, h, k)}
    if bias:
        inputs["bias"] = draw(b, h, n, s)
    masks = {
        None: None,
        "keys": rng.random((b, 1, 1, s)) < 0.7,
        "causal": np.tril(np.ones((n, s), bool)),
        "nothing seen": np.zeros((b, 1, 1, s), bool),
    }
    return inputs, masks[mask], draw(b, n, h, k)


def value_and_gradients(inputs, mask, weight, **options):
    def loss(inputs):
        y = module.attention(**inputs, mask=mask, **options)
        return (y * weight).sum(), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    return {"y": y, **gradients}


@pytest.mark.parametrize("mask", [None, "keys", "causal", "nothing seen"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("block", [1, 60, 1000])  # rows of a block: 1, 2, all 12
def test_blocks_change_nothing(monkeypatch, mask, bias, rate, block):
    inputs, mask, weight = problem(0, bias=bias, mask=mask)
    options = dict(dropout_rate=rate, dropout_key=jax.random.key(7) if rate else None)
    whole = value_and_gradients(inputs, mask, weight, **options)
    monkeypatch.setattr(by_blocks, "BLOCK", block if block < 1000 else 719)  # of 720 scores
    blocks = value_and_gradients(inputs, mask, weight, **options)
    for name, want in whole.items():
        np.testing.assert_allclose(blocks[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("mask", [None, "keys", "causal"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
# Of three batches: two rows of a head, a whole head, two of four heads.
@pytest.mark.parametrize("block", [60, 360, 720])
def test_blocks_of_an_accelerator_change_nothing(monkeypatch, mask, rate, block):
    inputs, mask, weight = problem(4, h=4, bias=True, mask=mask)
    options = dict(dropout_rate=rate, dropout_key=jax.random.key(7) if rate else None)
    whole = value_and_gradients(inputs, mask, weight, **options)
    monkeypatch.setattr(by_blocks, "ACCELERATOR_BLOCK", block)
    blocks = value_and_gradients(inputs, mask, weight, backend="gpu", **options)
    for name, want in whole.items():
        np.testing.assert_allclose(blocks[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("scores", "together"), [(360, 2), (100, 4), (719, 1), (9999, 1), (240, 2)]
)
def test_heads_of_a_block_divide_them_all(scores, together):
    assert by_blocks._heads_together(4, scores, 720) == together


GLOBAL, WINDOWS = (1, 5184, 16, 64), (9, 576, 16, 64)


@pytest.mark.parametrize(
    ("platform", "dtype", "q", "keys", "given", "want"),
    [
        # The trunk: never all scores at once, fused where that is wanted and can be.
        ("cpu", "float32", GLOBAL, 5184, {}, "blockwise"),
        ("gpu", "float32", GLOBAL, 5184, {}, "blockwise"),
        ("tpu", "bfloat16", GLOBAL, 5184, {}, "blockwise"),
        ("gpu", "bfloat16", GLOBAL, 5184, {}, "blockwise"),
        ("gpu", "bfloat16", GLOBAL, 5184, {"fused": True}, "fused"),
        ("gpu", "bfloat16", WINDOWS, 576, {"fused": True}, "fused"),
        ("gpu", "bfloat16", WINDOWS, 576, {}, "blockwise"),
        # What cuDNN cannot do, gets wrong, or does in a way of its own.
        ("gpu", "float32", GLOBAL, 5184, {"fused": True}, "blockwise"),
        ("gpu", "float16", GLOBAL, 5184, {"fused": True}, "blockwise"),
        ("tpu", "bfloat16", GLOBAL, 5184, {"fused": True}, "blockwise"),
        ("cpu", "bfloat16", GLOBAL, 5184, {"fused": True}, "blockwise"),
        ("gpu", "bfloat16", GLOBAL, 5184, {"fused": True, "mask": True}, "blockwise"),
        ("gpu", "bfloat16", GLOBAL, 5184, {"fused": True, "bias": True}, "blockwise"),
        ("gpu", "bfloat16", GLOBAL, 5184, {"fused": True, "dropout": True}, "blockwise"),
        ("gpu", "bfloat16", (4, 401, 16, 64), 5184, {"fused": True}, "blockwise"),
        ("gpu", "bfloat16", (1, 5184, 16, 60), 5184, {"fused": True}, "blockwise"),
        ("gpu", "bfloat16", (1, 5184, 4, 256), 5184, {"fused": True}, "blockwise"),
        # Small ones: the queries among themselves, the phrase.
        ("cpu", "float32", (1, 401, 8, 32), 401, {}, "plain"),
        ("gpu", "bfloat16", (4, 401, 8, 32), 401, {"mask": True}, "plain"),
        ("tpu", "bfloat16", (4, 5184, 8, 32), 33, {"mask": True}, "plain"),
        ("tpu", "bfloat16", (4, 5184, 8, 32), 5184, {"dropout": True}, "blockwise"),
    ],
)  # fmt: skip
def test_the_branch_of_each_problem(platform, dtype, q, keys, given, want):
    assert module.branch(platform, dtype, q, keys, **given) == want


def test_attention_equals_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    inputs, mask, weight = problem(1, bias=True, mask="keys")
    tensors = {k: torch.tensor(np.asarray(v), requires_grad=True) for k, v in inputs.items()}
    heads_first = [tensors[k].transpose(1, 2) for k in "qkv"]
    seen = torch.where(torch.tensor(mask), tensors["bias"], -torch.inf)
    y = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=seen)
    (y.transpose(1, 2) * torch.tensor(np.asarray(weight))).sum().backward()
    for block in (10**6, 60):
        monkeypatch.setattr(by_blocks, "BLOCK", block)
        got = value_and_gradients(inputs, mask, weight)
        np.testing.assert_allclose(got["y"], y.transpose(1, 2).detach(), rtol=1e-5, atol=1e-5)
        for name, tensor in tensors.items():
            np.testing.assert_allclose(got[name], tensor.grad, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("n", "rows"), [(401, 401), (12, 12), (5184, 648), (10, 10)])
def test_blocks_are_neither_tiny_nor_huge(n, rows):
    assert by_blocks._block_rows((1, n), 5184, by_blocks.BLOCK) == rows


def test_a_rematerialised_layer_forms_its_scores_twice_and_not_three_times(monkeypatch):
    """Forward, and once for the gradient: what attention returned is kept, not recomputed."""
    monkeypatch.setattr(by_blocks, "BLOCK", 60)
    inputs, _, _ = problem(2)

    class Layer(module.nn.Module):
        @module.nn.compact
        def __call__(self, x):
            return module.MultiHeadAttention(2, name="attend")(x, x, x)

    def exponentials(wrap):
        layer = wrap(Layer)()
        x = inputs["q"].reshape(3, 12, 16)
        variables = layer.init(jax.random.key(0), x)
        program = jax.make_jaxpr(jax.grad(lambda v: layer.apply(v, x).sum()))(variables)
        return str(program).count("exp ")

    assert exponentials(functools.partial(module.remat, wanted=True)) == 2
    assert exponentials(module.nn.remat) == 3


def test_what_linear_layers_returned_is_kept_on_request():
    """One product forward, one for each of the two gradients; recomputed, the inner one once more."""

    class Layer(module.nn.Module):
        @module.nn.compact
        def __call__(self, x):
            return Mlp((32, 16), name="mlp")(x)

    x = jax.random.normal(jax.random.key(1), (3, 16))
    plain = Layer()
    variables = plain.init(jax.random.key(0), x)
    want = jax.grad(lambda v: (plain.apply(v, x) ** 2).sum())(variables)

    def products(wanted):
        layer = module.remat(Layer, wanted)()
        gradient = jax.grad(lambda v: (layer.apply(v, x) ** 2).sum())
        chex.assert_trees_all_close(gradient(variables), want, rtol=1e-6)
        return str(jax.make_jaxpr(gradient)(variables)).count("dot_general[")

    assert products(False) == products("products") == 5
    assert products(True) == 6


@pytest.mark.parametrize(
    ("varying", "backend"),
    [("q", "cpu"), ("k", "cpu"), ("all", "cpu"), ("k", "gpu"), ("all", "gpu")],
)
def test_blocks_under_shard_map(monkeypatch, varying, backend):
    """Arguments that are the same on all devices may meet others that are not."""
    monkeypatch.setattr(by_blocks, "BLOCK", 60)
    monkeypatch.setattr(by_blocks, "ACCELERATOR_BLOCK", 240)  # two of four heads
    inputs, mask, weight = problem(3, b=8, h=4, bias=True, mask="causal")
    split = {name: varying in (name, "all") for name in inputs}
    inputs = {k: v if split[k] else jnp.broadcast_to(v[:1], v.shape) for k, v in inputs.items()}
    arguments = {k: v if split[k] else v[:1] for k, v in inputs.items()}

    @functools.partial(
        jax.shard_map, mesh=make_mesh(), out_specs=P(),
        in_specs=({k: P("data") if split[k] else P() for k in inputs}, P("data")),
    )  # fmt: skip
    def loss(inputs, weight):
        y = module.attention(**inputs, mask=mask, backend=backend)
        return jax.lax.psum((y * weight).sum(), "data")

    value, gradients = jax.jit(jax.value_and_grad(loss))(arguments, weight)
    want = value_and_gradients(inputs, mask, weight)
    np.testing.assert_allclose(value, (want["y"] * weight).sum(), rtol=1e-5)
    for name, got in gradients.items():
        whole = want[name] if split[name] else want[name].sum(0, keepdims=True)
        np.testing.assert_allclose(got, whole, rtol=1e-4, atol=1e-5, err_msg=name)


def test_dropout_drops_its_share_everywhere_and_keeps_the_mean():
    words = jax.random.bits(jax.random.key(0), (2, 500 + 400))
    noise = module.Noise(words[:, :500], words[:, 500:])
    dropped = np.asarray(noise.drop(jnp.ones((2, 500, 400)), 0.1))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.9)}
    gone = dropped == 0
    assert abs(gone.mean() - 0.1) < 0.002
    # By row, by column and by neighbours as independent draws: five standard deviations.
    for axis, count in ((1, 500), (2, 400)):
        assert np.abs(gone.mean(axis) - 0.1).max() < 5 * np.sqrt(0.09 / count)
    for a, b in (
        (gone[:, 1:], gone[:, :-1]),
        (gone[:, :, 1:], gone[:, :, :-1]),
        (gone[:1], gone[1:]),
    ):
        assert abs((a & b).mean() - 0.01) < 5 * np.sqrt(0.01 / a.size)
