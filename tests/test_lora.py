"""Adapters: where they sit, how many they are, that they change what they say and nothing else."""

import fnmatch
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3jax.config import Config, ConfigError, LoraConfig, ModelConfig, OptimConfig
from sam3jax.model import Sam3
from sam3jax.model.init import init_params, parameter_shapes
from sam3jax.training.optim import build_optimizer, learning_rate, schedule_warning
from sam3jax.training.rates import count, multipliers
from sam3jax.weights.lora import init_lora, linear_layers, merge_lora
from sam3jax.weights.trainable import merge, split
from tests.batches import random_batch, small_config, small_params, small_split

VIT = "backbone.vision_backbone.trunk.blocks"
PUBLISHED = ModelConfig()


@pytest.fixture(scope="module")
def published_shapes():
    return parameter_shapes(PUBLISHED)


# At rank 16, as counted by hand for the published sizes.
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ((f"{VIT}.*.attn.qkv", f"{VIT}.*.attn.proj"), 3_145_728),
        ((f"{VIT}.*.mlp.*",), 5_898_240),
        (("transformer.encoder.layers.*",), 835_584),
        (("transformer.decoder.layers.*",), 1_032_192),
        (("geometry_encoder.encode.*",), 417_792),
        (("backbone.language_backbone.encoder.transformer.*",), 7_077_888),
        ((f"{VIT}.31.attn.qkv",), 16 * 4096),
    ],
)
def test_adapters_are_as_many_as_counted_by_hand(published_shapes, targets, expected):
    config = Config(lora=LoraConfig(rank=16, targets=targets))
    shapes = jax.eval_shape(
        lambda: init_lora(jax.random.key(0), published_shapes, PUBLISHED, config.lora)[0]
    )
    scales = {}
    for entry in linear_layers(PUBLISHED):
        node = scales
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        kernel = published_shapes
        for part in entry.path:
            kernel = kernel[part]
        node.setdefault("scale", np.zeros(kernel.shape[:-2]))
        if any(fnmatch.fnmatch(entry.layer, t) for t in targets):
            node["scale"][entry.slot] = 1.0
    trainable, frozen = {"lora": shapes}, {"lora_scale": scales}
    assert count(trainable, multipliers(trainable, frozen, config)) == expected


def test_the_published_model_has_the_published_number_of_parameters(published_shapes):
    from sam3jax.weights.names import carried_shapes

    live = sum(x.size for x in jax.tree.leaves(published_shapes))
    dead = sum(int(np.prod(s)) for s in carried_shapes(PUBLISHED).values())
    assert live + dead == 840_509_750
    assert dead == 1_967_360 + 132_352  # what reaches no output, and the point projections


def test_a_pattern_without_a_match_is_an_error_that_names_it():
    config = small_config(lora={"targets": ("transformer.encoder.layer.*",)})
    with pytest.raises(ConfigError, match=r"transformer\.encoder\.layer\.\*.*matches no layer"):
        small_split(config)


@functools.cache
def forward(model):
    return jax.jit(Sam3(model).apply)


def outputs(config, params, lora=None, scale=None):
    batch = random_batch(config, 1, np.array([[1, 0], [2, 1], [0, 0]]))
    variables = {"params": params}
    if lora is not None:
        variables |= {"lora": lora, "lora_scale": scale}
    return forward(config.model)(variables, batch.images, batch.tokens, batch.prompts)


def test_new_adapters_change_nothing_and_merged_weights_equal_adapters():
    config = small_config(lora={"targets": ("*",)})
    params = small_params(config.model)
    lora, scale = init_lora(jax.random.key(1), params, config.model, config.lora)
    base = outputs(config, params)
    with_new = outputs(config, params, lora, scale)
    jax.tree.map(np.testing.assert_array_equal, base, with_new)

    keys = iter(jax.random.split(jax.random.key(2), 1000))
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), lora)
    adapted = outputs(config, params, lora, scale)
    merged = outputs(config, merge_lora(params, lora, scale))
    assert np.abs(adapted.o2o.logits - base.o2o.logits).max() > 0.1
    for a, b in zip(jax.tree.leaves(adapted), jax.tree.leaves(merged), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * max(float(np.std(a)), 1e-6)


def test_one_block_of_a_stack_can_be_adapted_alone():
    config = small_config(lora={"targets": (f"{VIT}.2.attn.qkv",)}, optim={"weight_decay": 0.1})
    trainable, frozen = small_split(config)
    rates = multipliers(trainable, frozen, config)
    optimizer = build_optimizer(config, trainable, rates)
    assert count(trainable, rates) == 3 * (32 + 96)  # block 2 is the first of stage 1
    ones = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = optimizer.update(ones, optimizer.init(trainable), trainable)
    a = updates["lora"]["vit"]["stages"]["windows"]["attn"]["qkv"]["a"]
    assert a.shape == (2, 1, 32, 3)
    assert np.abs(a[1]).min() > 0
    assert np.abs(a[0]).max() == 0


def test_named_parameters_train_beside_adapters_and_the_rest_stays_whole():
    names = ("transformer.decoder.bbox_embed.*", f"{VIT}.3.norm1.weight")
    config = small_config(trainable=names)
    trainable, frozen = small_split(config)
    assert set(trainable["params"]) == {"decoder", "vit"}
    together = merge(trainable, frozen)["params"]
    jax.tree.map(np.testing.assert_array_equal, together, small_params(config.model))
    rates = multipliers(trainable, frozen, config)["params"]["vit"]["stages"]["last"]["norm1"]
    np.testing.assert_array_equal(rates["scale"][:, 0], [0, 1])


def test_layer_decay_and_tower_rates_follow_the_published_recipe():
    config = small_config(
        train="all", optim={"layer_decay": 0.5, "vision_scale": 0.25, "text_scale": 0.125}
    )
    trainable, frozen = small_split(config)
    rates = multipliers(trainable, frozen, config)["params"]
    depth = 4
    last = rates["vit"]["stages"]["last"]["norm1"]["scale"][:, 0]
    np.testing.assert_allclose(last, [0.25 * 0.5 ** (depth - 1), 0.25 * 0.5 ** (depth - 3)])
    assert float(rates["vit"]["patch_embed"]["kernel"].squeeze()) == 0.25 * 0.5 ** (depth + 1)
    assert float(rates["vit"]["pos_embed"].squeeze()) == 0.25
    assert float(rates["text_encoder"]["resizer"]["kernel"].squeeze()) == 0.125
    assert float(rates["decoder"]["query_embed"].squeeze()) == 1.0


def test_schedule_equals_the_published_one():
    scheduler = pytest.importorskip("sam3.train.optim.schedulers").InverseSquareRootParamScheduler
    config = small_config(
        optim={"learning_rate": 8e-5, "schedule": "inverse_sqrt", "warmup_steps": 7, "timescale": 20, "cooldown_steps": 9}
    ).optim  # fmt: skip
    # Updates are counted from 1, so that warm-up loses none; the cool-down from 0, so that it does not end at 0.
    ours, theirs = learning_rate(config, 100), scheduler(8e-5, 7, 0, 20)
    for n in range(1, 101):
        want = theirs(n, n / 100) * min(1.0, (100 - (n - 1)) / 9)
        np.testing.assert_allclose(float(ours(n)), want, rtol=1e-5, atol=1e-12)
    assert float(ours(100)) > 0


@pytest.mark.parametrize("schedule", ["constant", "cosine", "inverse_sqrt"])
@pytest.mark.parametrize(
    ("steps", "warmup", "cooldown"), [(1, 0, 0), (1, 0, 5), (7, 3, 2), (5, 9, 0)]
)
def test_every_update_has_a_rate(schedule, steps, warmup, cooldown):
    optim = {"schedule": schedule, "warmup_steps": warmup, "cooldown_steps": cooldown}
    rate = learning_rate(small_config(optim=optim).optim, steps)
    assert min(float(rate(n)) for n in range(1, steps + 1)) > 1e-8


def test_init_is_the_same_for_the_same_seed_and_has_torch_like_scales():
    config = small_config().model
    one, two = init_params(config, 3), init_params(config, 3)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    kernel = one["vit"]["stages"]["windows"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / sum(kernel.shape[-2:])), rtol=0.05)
    assert np.abs(one["decoder"]["bbox_embed"]["layers_2"]["kernel"]).max() == 0


def test_everything_or_nothing_to_train_is_decided_at_the_start():
    config = small_config(train="all")
    trainable, frozen = split(small_params(config.model), {}, {}, config)
    assert set(trainable) == {"params"}
    assert not jax.tree.leaves(frozen)


@pytest.mark.parametrize(("steps", "warmup", "said"), [(100, 99, False), (100, 100, True), (10, 200, True), (5, 0, False)])  # fmt: skip
def test_a_warm_up_that_never_ends_is_said(steps, warmup, said):
    config = OptimConfig(warmup_steps=warmup)
    assert (schedule_warning(config, steps) is not None) == said
    if said:
        reached = float(learning_rate(config, steps)(steps))
        assert reached <= config.learning_rate * steps / warmup * (1 + 1e-6)
