"""The loss against the published torch loss: terms, gradients, assignments, over every option."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sam3")

from sam3jax.config import LossConfig
from sam3jax.losses import breakdown, compute_losses
from tests.loss_cases import Case, random_case, to_outputs, to_targets
from tests.parity import loss_reference as reference

jax.config.update("jax_default_matmul_precision", "highest")


def ours(case: Case, config: LossConfig, **options):
    """Terms and gradients of our loss, named as the reference names them."""
    targets, valid = to_targets(case), jnp.asarray(case.prompt_valid)

    @jax.jit
    def run(outputs):
        loss = lambda o: compute_losses(o, targets, valid, config, **options)
        return jax.value_and_grad(loss, has_aux=True)(outputs)

    (_, terms), g = run(to_outputs(case))
    q = case.masks.shape[1]
    masks = np.asarray(g.pixel_embed).transpose(0, 3, 1, 2)
    grads = {
        "logits": g.o2o.logits, "boxes": g.o2o.boxes, "logits_o2m": g.o2m.logits, "boxes_o2m": g.o2m.boxes,
        "presence": g.presence_logits, "masks": masks[:, :q], "masks_o2m": masks[:, q:], "semantic": g.semantic_logits,
    }  # fmt: skip
    return {k: float(v) for k, v in terms.items()}, {k: np.asarray(v) for k, v in grads.items()}


def assert_equal(case: Case, config: LossConfig, **options) -> dict[str, float]:
    got, got_grads = ours(case, config, **options)
    want, want_grads, _ = reference.run(case, config)
    for key, value in want.items():
        if key not in got:
            assert value == 0, f"{key} is {value} in torch and missing here"
        else:
            np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    for key, value in want_grads.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(
            got_grads[key], value, rtol=1e-4, atol=1e-4 * scale + 1e-12, err_msg=key
        )
    parts = breakdown({k: jnp.float32(v) for k, v in got.items()}, config)
    np.testing.assert_allclose(sum(parts.values()), got["core_loss"], rtol=1e-5)
    return got


@pytest.mark.parametrize("seed", range(5))
def test_default_loss_equals_torch(seed):
    terms = assert_equal(random_case(seed), LossConfig())
    assert terms["mask_pairs"] > 0
    assert terms["mask_pairs_dropped"] == 0
