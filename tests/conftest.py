"""Eight fake CPU devices, exact float32 products, and one compilation cache for the session."""

import gc
import os
import tempfile
from pathlib import Path

from tests.xla import flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# OpenMP's threads spin while they wait: beside another busy process, torch's tiny models took ten times as long.
for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags(8)}"

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

# A program that one test compiled, another one takes from here, in whichever process. Nothing outlives the
# session, unless JAX_COMPILATION_CACHE_DIR names a folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="sam3jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    jax.config.update("jax_compilation_cache_dir", cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Tracing makes millions of small objects and little garbage: a twentieth of a test's time went into looking for it.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Files of slow tests come first, so that no worker is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if item.path.parent.name == "parity":
            item.add_marker("parity")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Compiled programs are mapped into memory in pieces, of which Linux allows 65,530: past them XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def one_device():
    """Trainings run on one device, where they compile three times faster; eight are the step's own test."""
    from sam3jax import train
    from sam3jax.training.mesh import make_mesh
    from tests.trainings import step_for_equal_settings

    mesh = make_mesh(jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", lambda: mesh)
        patch.setattr(train, "make_train_step", step_for_equal_settings())
        yield


@pytest.fixture(scope="session")
def reference():
    """The torch oracle; tests that need it skip where the packages are absent."""
    pytest.importorskip("torch", reason="the torch oracle needs torch")
    pytest.importorskip("sam3", reason="the torch oracle needs the sam3 package")
    from tests import torch_reference

    return torch_reference
