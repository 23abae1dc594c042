"""Eight fake CPU devices, exact float32 products, and no silence about warnings of our own."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    # Tests run small programs once: compiling them is the time, so the optimizer's level is 0.
    few = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} {few}"

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def reference():
    """The torch oracle; tests that need it skip where the packages are absent."""
    pytest.importorskip("torch", reason="the torch oracle needs torch")
    pytest.importorskip("sam3", reason="the torch oracle needs the sam3 package")
    from tests import torch_reference

    return torch_reference
