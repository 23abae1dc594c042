"""The tiny step, compiled for a GPU and a TPU that are not here: it fits, stays on the device, forms no large scores."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from sam3jax.config import parse_config
from sam3jax.model.attention import attention
from sam3jax.training import plan, targets
from tests.small_run import SIZES

GPU, TPU = "h100", "v5e"
PLATFORM = {GPU: "gpu", TPU: "tpu"}


@pytest.fixture(scope="module", params=[GPU, TPU])
def target(request):
    compilers = ["libtpu"] if request.param == TPU else ["jax_cuda12_plugin", "jax_cuda13_plugin"]
    if not any(map(importlib.util.find_spec, compilers)):
        pytest.skip(f"no compiler for {request.param}: pip install 'sam3jax[plan]'")
    return request.param, targets.target(request.param)[1]


def compiled(function, device, *shapes):
    place = SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
    return jax.jit(function).lower(*shapes).compile(targets.compiler_options(device))


def test_the_step_never_leaves_the_device(target):
    """The matcher's loop, the losses, the optimizer: no callback, no feed, no copy to the host's memory."""
    name, devices = target
    config = parse_config({
        "model": {**SIZES, "compute_dtype": "bfloat16"}, "batch_size": 2,
        "data": {"train": "shapes", "shapes_train": 4, "shapes_valid": 2, "shapes_size": 96},
        "lora": {"targets": ["transformer.decoder.*"]},
    })  # fmt: skip
    with jax.default_matmul_precision("default"):  # as in a training
        found = plan.needs(config, devices)
    assert found.host == ()
    assert found.collectives == {}
    assert 0 < found.peak < 0.1 * targets.CARDS[name].memory
    assert found.arguments > 4 * 3 * found.trained


def gradient_of_a_global_block(target, **options):
    name, devices = target
    q = jax.ShapeDtypeStruct((1, 5184, 16, 64), jnp.bfloat16)

    def loss(q, k, v):
        y = attention(q, k, v, backend=PLATFORM[name], **options)
        return (y.astype(jnp.float32) ** 2).sum()

    return compiled(jax.grad(loss, (0, 1, 2)), devices[0], q, q, q)


def test_no_platform_holds_the_scores_of_a_global_block(target):
    """The plain form's are 16 x 5184 x 5184 in float32, 1.7 GB, several times."""
    assert gradient_of_a_global_block(target).memory_analysis().temp_size_in_bytes < 0.3e9


@pytest.mark.parametrize("target", [GPU], indirect=True)
def test_cudnn_is_called_forth_and_back(target):
    """It makes its plan on the card, so that no more can be seen here."""
    text = gradient_of_a_global_block(target, fused=True).as_text()
    assert text.count('custom_call_target="__cudnn$fmha') == 2


def test_a_callback_and_the_hosts_memory_are_found():
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    outside = lambda x: jax.pure_callback(np.asarray, shape, x) * 2
    assert plan.host_traffic(compiled(outside, jax.devices()[0], shape).as_text())
    assert not plan.host_traffic(compiled(lambda x: x * 2, jax.devices()[0], shape).as_text())


def test_copies_to_the_hosts_memory_are_found(target):
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    away = lambda x: jax.device_put(x * 2, jax.memory.Space.Host)
    assert plan.host_traffic(compiled(away, target[1][0], shape).as_text()) == ("host memory",)
