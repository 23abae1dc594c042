"""The whole detector and its whole loss equal torch, in value and in gradient, over many seeds.

Sizes differ in depth, widths, heads, windows, queries; batches in pictures, prompts, exemplars and
targets (none, one, as many as there is room for). Weights and batches are drawn anew per seed.
"""

import functools

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sam3")
from convert import to_torch
from sam3jax.config import LossConfig
from sam3jax.losses import compute_losses
from sam3jax.model import Sam3
from sam3jax.weights.names import carried_shapes, entries
from tests import bridge
from tests import torch_reference as reference

pytestmark = pytest.mark.slow

LOSS = LossConfig(scale_by_find_batch_size=False)
TERM, WHOLE, GRADIENT = 1e-5, 1e-4, 1e-3

# size, options of the batch, seeds: 18 + 16 + 18 = 52 draws
CASES = {
    "small": (reference.SMALL, dict(images=3, prompts=2, box_prompts=2, max_targets=4), 18),
    "wide": (reference.WIDE, dict(images=1, prompts=3, box_prompts=1, max_targets=12), 16),
    "narrow": (reference.NARROW, dict(images=5, prompts=1, box_prompts=0, max_targets=7), 18),
}
SEEDS = [(name, seed) for name, (_, _, seeds) in CASES.items() for seed in range(seeds)]


@functools.cache
def step(config, train=True):
    @jax.jit
    def run(params, images, tokens, prompts, targets):
        def loss(params):
            out = Sam3(config, train).apply({"params": params}, images, tokens, prompts)
            total, terms = compute_losses(out, targets, prompts.valid, LOSS)
            return total, (terms, out)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return run


def draw(name: str, seed: int):
    size, options, _ = CASES[name]
    model = reference.detector(size, seed=seed)
    example = reference.example(size, seed=100 + seed, **options)
    if seed == 1:
        example["num_targets"][:] = 0  # nothing to find anywhere
    if seed == 2:
        example["num_targets"][:] = options["max_targets"]
        real = np.random.default_rng(seed).uniform(0.2, 0.5, example["boxes"].shape)
        example["boxes"] = real.astype(np.float32)
    if seed == 3:
        # Two targets in one place: a one-to-many query then answers both.
        example["num_targets"][:] = 2
        box = np.array([0.5, 0.5, 0.4, 0.4], np.float32)
        example["boxes"][:, :2] = box + np.array([[0] * 4, [0.005] * 4], np.float32)
    return size, model, example


def relative(got, want) -> float:
    """Largest difference over the standard deviation; over the size of values that are all alike."""
    assert got.shape == want.shape
    spread, size = want.std(), np.abs(want).max()
    return float(np.abs(got - want).max() / (spread if spread > 1e-5 * size else max(size, 1e-12)))


@pytest.mark.parametrize(("name", "seed"), SEEDS)
def test_training_outputs_loss_and_gradients_equal_torch(name, seed):
    size, model, example = draw(name, seed)
    config = bridge.model_config(size)
    want_terms, want_grads, want_out = reference.train_step(model, example)
    images, tokens, prompts = bridge.inputs(model, example)
    (total, (terms, out)), grads = step(config)(
        bridge.params(model, size), images, tokens, prompts, bridge.targets(example)
    )

    got_out = bridge.published(out, train=True)
    for key, want in reference.stacked(want_out).items():
        assert relative(got_out[key], want) < WHOLE, key

    compared = 0
    for key, want in want_terms.items():
        if key.endswith(("_o2m",)) and key.startswith("presence"):
            continue  # constant zeros in torch
        if "f1" in key or "acc" in key:
            continue  # counts, compared with the loss's own tests
        got = float(terms[key])
        assert abs(got - want) <= TERM * max(abs(want), 1e-3), (key, got, want)
        compared += 1
    assert compared == 7 * config.decoder_layers + 5  # o2o 4 and o2m 3 a layer, masks 4, total
    assert abs(float(total) - want_terms["core_loss"]) <= TERM * want_terms["core_loss"]

    got_grads = to_torch(jax.device_get(grads), config)
    scale = max(np.abs(g).max() for g in want_grads.values())
    for key in {entry.torch for entry in entries(config)}:
        want = want_grads.get(key)
        got = got_grads[key]
        if want is None or np.abs(want).max() < 1e-7 * scale:
            # No gradient in torch, or one that cancels (see the test of dead tensors).
            assert np.abs(got).max() < 1e-6 * scale, key
            continue
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < GRADIENT, (key, error)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [20, 21, 22])
def test_evaluation_outputs_equal_torch(name, seed):
    size, model, example = draw(name, seed)
    want_out, _ = reference.forward(model, example, train=False)
    run = bridge.detector(bridge.model_config(size), train=False)
    out, _ = run(bridge.params(model, size), *bridge.inputs(model, example))
    got = bridge.published(out, train=False)
    for key, want in reference.stacked(want_out).items():
        assert relative(got[key], want) < WHOLE, key


def test_exemplars_matter_and_padding_does_not():
    size, model, example = draw("small", 30)
    example["prompt_valid"][:] = [True, False]
    run = bridge.detector(bridge.model_config(size), train=False)
    weights = bridge.params(model, size)

    def scores():
        out, _ = run(weights, *bridge.inputs(model, example))
        return np.asarray(out.o2o.logits)

    before = scores()
    example["prompt_boxes"][:, 1] = 0.9  # padding
    np.testing.assert_allclose(scores(), before, rtol=0, atol=1e-6)
    example["prompt_boxes"][:, 0] = [0.2, 0.2, 0.3, 0.3]
    assert np.abs(scores() - before).max() > 1e-2


# Live tensors that nevertheless cannot move an output: constants over the keys of a softmax.
CANCELLED = {
    "transformer.decoder.boxRPB_embed_x.layers.1.bias",
    "transformer.decoder.boxRPB_embed_y.layers.1.bias",
}


def test_every_live_tensor_moves_an_output_and_the_dead_are_known():
    """5 % on any tensor moves some output by more than ten times the tolerance of the parity test."""
    size, model, example = draw("small", 40)
    example["prompt_valid"][:] = True
    config = bridge.model_config(size)
    run = bridge.detector(config, train=True)
    inputs = bridge.inputs(model, example)
    params = bridge.params(model, size)

    def compared(params):
        """Every output with its tolerance, and what the geometry encoder says, with a module's."""
        out, inside = run(params, *inputs)
        arrays = {k: (v, WHOLE) for k, v in bridge.published(out, train=True).items()}
        return {
            **arrays,
            "geometry": (np.asarray(inside["geometry_encoder"]["__call__"][0][0]), 1e-5),
        }

    base = compared(params)
    slots: dict[str, list] = {}
    for entry in entries(config):
        slots.setdefault(entry.torch, []).append(entry)
    still = set()
    for name, parts in slots.items():
        moved = jax.tree.map(np.array, params)
        for entry in parts:
            *owners, leaf = entry.path
            node = functools.reduce(lambda tree, key: tree[key], owners, moved)
            node[leaf][entry.slot] *= 1.05
        got = compared(moved)
        if not any(
            relative(got[key][0], x) > 10 * tolerance for key, (x, tolerance) in base.items()
        ):
            still.add(name)
    assert still == CANCELLED

    named = {name for name, _ in model.named_parameters()}
    assert named - set(slots) == set(carried_shapes(config))
    assert {name: tuple(p.shape) for name, p in model.named_parameters() if name not in slots}.keys() == carried_shapes(config).keys()  # fmt: skip
