"""A run knows its base again, and says so where another has taken its place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3jax.config import ConfigError, ModelConfig, parse_config
from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer
from sam3jax.model.init import init_params
from sam3jax.training.optim import build_optimizer
from sam3jax.training.step import init_state
from sam3jax.weights import checkpoints as checkpoint
from sam3jax.weights.checkpoints import fingerprint, load_base, load_run, open_run_folder
from sam3jax.weights.model_folder import save_model_folder
from sam3jax.weights.trainable import multipliers
from tests.small_run import SIZES

TREE = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.zeros(3, np.float32)}


def changed(tree, name, value):
    return {**tree, name: value}


@pytest.mark.parametrize(
    "other",
    [
        changed(TREE, "b", np.float32([0, 0, 1e-30])),
        changed(TREE, "b", np.float32([0, 0, -0.0])),
        changed(TREE, "b", np.zeros(3, np.float16)),
        changed(TREE, "b", np.zeros((3, 1), np.float32)),
        changed(TREE, "c", np.zeros(3, np.float32)),
        changed(TREE, "a", {"kernel": TREE["a"]["kernel"][:, ::-1]}),
        {"a": TREE["a"], "c": TREE["b"]},
        {"a": TREE["a"]},
    ],
)
def test_a_fingerprint_tells_every_difference(other):
    assert fingerprint(other) != fingerprint(TREE)


def test_a_fingerprint_is_of_the_values_alone():
    turned = {"b": jnp.zeros(3), "a": {"kernel": np.asfortranarray(TREE["a"]["kernel"])}}
    assert fingerprint(turned) == fingerprint(TREE) == fingerprint(jax.device_put(TREE))
    assert fingerprint(TREE, "other base") != fingerprint(TREE)


def write_model(folder, seed: int) -> None:
    config = ModelConfig(**SIZES)
    tokenizer = Tokenizer(build_byte_tokenizer(config.vocab_size), config.text_length)
    save_model_folder(folder, config, init_params(config, seed), tokenizer, source={})


def settings(folder, init):
    return parse_config({"init": str(init), "output": str(folder), "steps": 1})


def write_run(folder, init, step: int = 0) -> None:
    """A run folder as the trainer leaves it; every step moves its adapters by 1."""
    base = load_base(settings(folder, init))
    trainable, frozen = checkpoint.start(base)
    rates = multipliers(trainable, frozen, base.config)
    optimizer = build_optimizer(base.config, trainable, rates)
    state = init_state(jax.tree.map(lambda x: x + step, trainable), optimizer, False)
    open_run_folder(base)
    saved = checkpoint.Checkpoints(folder, base.config)
    saved.save(state.replace(step=jnp.array(step, jnp.int32)), {}, None)
    saved.close()


def test_a_run_whose_base_was_replaced_is_refused(tmp_path):
    model, run, second = (tmp_path / name for name in ("model", "run", "second"))
    write_model(model, seed=0)
    write_run(run, init=model)
    write_run(second, init=run)
    before = load_base(settings(tmp_path, second)).fingerprint

    write_model(model, seed=1)
    for folder in (run, second):
        with pytest.raises(ConfigError, match=r"run was trained from other weights .*model holds"):
            load_run(folder)
    with pytest.raises(ConfigError, match="train again into another output"):
        open_run_folder(load_base(settings(run, model)))

    write_model(model, seed=0)
    assert load_base(settings(tmp_path, second)).fingerprint == before
    open_run_folder(load_base(settings(run, model)))


def test_a_run_on_a_run_that_went_on_is_refused(tmp_path):
    model, run, second = (tmp_path / name for name in ("model", "run", "second"))
    write_model(model, seed=0)
    write_run(run, init=model)
    write_run(second, init=run)
    write_run(run, init=model, step=1)
    with pytest.raises(ConfigError, match=r"second was trained from other weights .*run holds"):
        load_run(second)
