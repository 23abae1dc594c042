"""A run knows its base again, and says so where another has taken its place."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3jax.config import ConfigError, ModelConfig, parse_config
from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer
from sam3jax.model.init import init_params
from sam3jax.weights.base import fingerprint, open_base, same_base
from sam3jax.weights.checkpoints import Checkpoints
from sam3jax.weights.model_folder import open_model_folder, save_model_folder
from sam3jax.weights.run_folder import open_run_folder, read_run
from sam3jax.weights.trainable import start
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
    base = open_base(settings(folder, init))
    weights = base.load()
    trainable, _ = start(weights.params, base.config)
    with open_run_folder(base.config, weights.fingerprint) as opened:
        saved = Checkpoints(folder, keep=3)
        about = {"run": opened.id, "step": step, "base": weights.fingerprint, "data": {}}
        moved = jax.tree.map(lambda x: x + step, trainable)
        saved.save(step, moved, {"step": np.array(step)}, about)
        saved.close()


def known(config) -> str:
    return open_base(config).load().fingerprint


def open_again(config) -> None:
    with open_run_folder(open_base(config).config, known(config)):
        pass


def test_a_run_whose_base_was_replaced_is_refused(tmp_path):
    model, run, second = (tmp_path / name for name in ("model", "run", "second"))
    write_model(model, seed=0)
    write_run(run, init=model)
    write_run(second, init=run)
    before = known(settings(tmp_path, second))

    write_model(model, seed=1)
    for folder in (run, second):
        with pytest.raises(ConfigError, match=r"run was trained from other weights .*model holds"):
            read_run(folder)
    with pytest.raises(ConfigError, match="train again into another output"):
        open_again(settings(run, model))

    write_model(model, seed=0)
    assert known(settings(tmp_path, second)) == before
    open_again(settings(run, model))

    # The same arrays, and two tokens that are exchanged.
    folder = open_model_folder(model)
    text = folder.tokenizer.replace(":523,", ":x,").replace(":524,", ":523,").replace(":x,", ":524,")  # fmt: skip
    assert text != folder.tokenizer
    save_model_folder(model, folder.config, folder.leaves, text)
    for folder in (run, second):
        with pytest.raises(ConfigError, match="or another vocabulary"):
            read_run(folder)


def test_a_run_that_noted_no_vocabulary_is_opened_all_the_same():
    assert same_base("ab", "ab-12")
    assert same_base("ab-12", "ab-12")
    assert not same_base("ab-12", "ab-13")
    assert not same_base("ac", "ab-12")


def test_a_run_on_a_run_that_went_on_is_refused(tmp_path):
    model, run, second = (tmp_path / name for name in ("model", "run", "second"))
    write_model(model, seed=0)
    write_run(run, init=model)
    write_run(second, init=run)
    write_run(run, init=model, step=1)
    with pytest.raises(ConfigError, match=r"second was trained from other weights .*run holds"):
        read_run(second)


def test_the_best_checkpoint_is_asked_of_the_checkpoints(tmp_path):
    """The newest two and the best stay; of equal scores the later step is best."""
    saved = Checkpoints(tmp_path, keep=2)
    for step, score in enumerate((0.2, 0.5, 0.5, None, 0.1, 0.3), start=1):
        saved.save(
            step,
            {"x": np.full(3, step, np.float32)},
            {"step": np.int32(step)},
            {"base": "noise", "data": {}},
        )
        if score is not None:
            saved.attach(step, {"metrics": {"AP": score}, "thresholds": {}, "score": score})
    saved.close()
    found = Checkpoints(tmp_path)
    assert (found.best(), found.latest()) == (3, 6)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["3", "5", "6"]  # fmt: skip
    assert found.validation(3)["metrics"] == {"AP": 0.5}
    np.testing.assert_array_equal(found.weights(3, {"x": np.zeros(3, np.float32)})["x"], 3)
    found.close()


def test_a_run_of_the_version_before_is_refused_with_what_to_do_and_stays_as_it_is(tmp_path):
    """As version 0.1 left it: a setting that is gone, one item for the whole state, metrics by orbax."""
    model, run = tmp_path / "model", tmp_path / "run"
    write_model(model, seed=0)
    run.mkdir()
    text = f"init: {model}\noutput: {run}\nsteps: 2\noptim:\n  accumulate: 1\n"
    (run / "config.yaml").write_text(text)
    for item in ("data", "metrics", "state"):
        (run / "checkpoints" / "2" / item).mkdir(parents=True)
    refused = r"written by sam3jax 0\.1 .*convert jax-to-torch.*train again into another output"
    with pytest.raises(ConfigError, match=refused):
        read_run(run)
    with pytest.raises(ConfigError, match=refused):
        open_base(settings(tmp_path / "next", run))
    with pytest.raises(ConfigError, match=refused), open_run_folder(open_base(settings(run, model)).config, "any"):  # fmt: skip
        pass
    assert (run / "config.yaml").read_text() == text


def test_a_setting_that_is_gone_says_what_stands_in_its_place():
    with pytest.raises(ConfigError, match=r"optim\.accumulate is gone: .*micro_batch"):
        parse_config({"optim": {"accumulate": 4}})


def refused(run) -> str:
    with pytest.raises(ConfigError) as found:
        read_run(run)
    return str(found.value)


def test_checkpoints_of_another_run_or_step_are_refused(tmp_path):
    model, one, two = (tmp_path / name for name in ("model", "one", "two"))
    write_model(model, seed=0)
    write_run(one, init=model, step=2)
    write_run(two, init=model, step=4)
    assert read_run(one).step == 2
    shutil.copytree(two / "checkpoints" / "4", one / "checkpoints" / "4")
    assert f"{one}/checkpoints/4 belongs to another run" in refused(one)
    shutil.rmtree(one / "checkpoints" / "4")
    (two / "checkpoints" / "4").rename(two / "checkpoints" / "6")
    assert "is the checkpoint of step 4 under another name" in refused(two)


@pytest.mark.parametrize(
    ("item", "damage"),
    [("about/metadata", "empty"), ("about/metadata", "text"), ("about/metadata", "gone"),
     ("weights/_METADATA", "cut"), ("weights/manifest.ocdbt", "cut"), ("weights/manifest.ocdbt", "gone")],
)  # fmt: skip
def test_a_damaged_newest_checkpoint_offers_the_one_before(item, damage, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    write_model(model, seed=0)
    write_run(run, init=model, step=2)
    write_run(run, init=model, step=4)
    file = run / "checkpoints" / "4" / item
    if damage == "gone":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"{}"}[damage])
    said = refused(run)
    assert "the checkpoint of step 4 is damaged" in said
    assert f"remove {run}/checkpoints/4, then step 2 takes its place" in said
    shutil.rmtree(run / "checkpoints" / "4")
    assert read_run(run).step == 2
