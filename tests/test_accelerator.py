"""scripts/accelerator.py: it runs where there is no accelerator, sees what is wrong, and says of each check how it ended."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3jax.training.state import TrainState
from scripts import accelerator


def test_the_checks_run_on_any_device(tmp_path, capsys):
    """All but the two that compile the same step again."""
    names = ["matcher", "tiny", "fused", "precision", "attention"]
    assert accelerator.main(["--small", "--out", str(tmp_path), "--only", *names]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "accelerator.json").read_text())
    assert {k: v["status"] for k, v in found["checks"].items()} == dict.fromkeys(names, "passed") | {"fused": "left out"}  # fmt: skip
    assert found["checks"]["tiny"]["programs"] == 1
    assert "left out  fused" in out
    assert "cuDNN is NVIDIA's" in out


@pytest.mark.parametrize(
    ("other", "passed"),
    [({}, True), ({"gradient": 2.001}, False), ({"gradient": np.nan}, False), ({"loss": 3.01}, False),
     ({"loss": np.nan}, False)],
)  # fmt: skip
def test_parity_sees_a_difference(monkeypatch, other, passed):
    device, reference = jax.devices()[:2]

    def program(config, where, optimizer):
        values = {"gradient": 2.0, "loss": 3.0, **(other if where == device else {})}
        state = TrainState(
            jnp.int32(0), {"a": jnp.ones(3), "b": jnp.ones(2)}, (), None, jnp.int32(0)
        )
        gradient = {"a": jnp.ones(3), "b": jnp.full(2, values["gradient"])}
        new = state.replace(trainable=jax.tree.map(jnp.subtract, state.trainable, gradient))
        metrics = {"first": jnp.float32(0), "loss": jnp.float32(values["loss"])}
        return accelerator.Program(lambda state: (new, metrics), state, ())

    monkeypatch.setattr(accelerator, "program", program)
    assert accelerator.parity(device, reference, small=True)["passed"] is passed


def test_a_fault_of_one_check_is_its_own(monkeypatch, tmp_path, capsys):
    def broken(device, small):
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nand much more")

    wrong = lambda device, small: {"passed": False, "said": "loss nan"}
    monkeypatch.setattr(accelerator, "CHECKS", {"first": broken, "second": wrong, "precision": accelerator.precision})  # fmt: skip
    assert accelerator.main(["--small", "--out", str(tmp_path), "--only", "first", "second", "precision"]) == 1  # fmt: skip
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["failed", "failed", "passed"]
    assert "RuntimeError: CUDNN_STATUS_NOT_SUPPORTED" in lines[0]


def test_other_numbers_in_a_branch_of_attention_fail(monkeypatch):
    shrunk = lambda *given: accelerator._plain(*given) * 0.9
    monkeypatch.setattr(accelerator, "_branches", lambda device, bias: {"shrunk": shrunk})
    assert not accelerator.attention(jax.devices()[0], small=True)["passed"]
