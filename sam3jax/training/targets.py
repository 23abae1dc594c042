"""Accelerators that need not be here: what is known of each, and devices for the compiler to aim at.

XLA compiles for a GPU from a text about the card, and for a TPU from libtpu alone. Nothing runs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sam3jax.config import ConfigError

TERA, GIB = 1e12, 2**30


class Card(NamedTuple):
    """What one chip has. memory: bytes; bandwidth: bytes per second; rates: dense FLOP per second of
    matrix products by compute dtype, without sparsity, from the makers' data sheets.

    gpu: what the compiler asks of a GPU besides: (compute capability, multiprocessors, FPUs each, GHz, L2 bytes,
    shared memory a block may take, shared memory and threads of a multiprocessor).
    topology: how libtpu names one chip of a TPU.
    """

    name: str
    memory: int
    bandwidth: float
    rates: dict[str, float]
    gpu: tuple[Any, ...] | None = None
    topology: str | None = None


def _gpu(name: str, gib: float, bandwidth: float, bf16: float, f32: float, *gpu: Any) -> Card:
    rates = {"bfloat16": bf16 * TERA, "float32": f32 * TERA}
    return Card(name, int(gib * GIB), bandwidth * 1e9, rates, gpu)


def _tpu(name: str, gib: float, bandwidth: float, bf16: float, topology: str) -> Card:
    # float32 products take several passes of bfloat16 ones: six at the highest precision.
    rates = {"bfloat16": bf16 * TERA, "float32": bf16 * TERA / 6}
    return Card(name, int(gib * GIB), bandwidth * 1e9, rates, topology=topology)


# float32 of a GPU: TF32 where it has it, which is what XLA takes unless told otherwise.
CARDS = {
    "h200": _gpu("NVIDIA H200", 141e9 / GIB, 4800, 989, 494, (9, 0), 132, 128, 1.98, 52428800, 232448, 233472, 2048),
    "h100": _gpu("NVIDIA H100 SXM", 79.1, 3352, 989, 494, (9, 0), 132, 128, 1.98, 52428800, 232448, 233472, 2048),
    "a100": _gpu("NVIDIA A100 80 GB", 79.1, 2039, 312, 156, (8, 0), 108, 64, 1.41, 41943040, 166912, 167936, 2048),
    "a100-40": _gpu("NVIDIA A100 40 GB", 39.4, 1555, 312, 156, (8, 0), 108, 64, 1.41, 41943040, 166912, 167936, 2048),
    "l4": _gpu("NVIDIA L4", 22.0, 300, 121, 60, (8, 9), 58, 128, 2.04, 50331648, 101376, 102400, 1536),
    "rtx4090": _gpu("NVIDIA RTX 4090", 23.5, 1008, 165, 83, (8, 9), 128, 128, 2.52, 75497472, 101376, 102400, 1536),
    "rtx3060": _gpu("NVIDIA RTX 3060 12 GB", 11.6, 360, 51, 25, (8, 6), 28, 128, 1.78, 2359296, 101376, 102400, 1536),
    # No units for bfloat16 or TF32: XLA computes both in float32.
    "t4": _gpu("NVIDIA T4", 14.7, 320, 8.1, 8.1, (7, 5), 40, 64, 1.59, 4194304, 65536, 65536, 1024),
    "v4": _tpu("TPU v4", 32, 1228, 275, "1x1x1"),
    "v5e": _tpu("TPU v5e", 16, 819, 197, "1x1"),
    "v5p": _tpu("TPU v5p", 95, 2765, 459, "1x1x1"),
    "v6e": _tpu("TPU v6e", 32, 1640, 918, "1x1"),
}  # fmt: skip
# The grids that libtpu knows, by number of chips.
_GRIDS = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"}, "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"},
    "v4": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4"}, "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4"},
}  # fmt: skip
_REMEDY = "pip install 'sam3jax[plan]'"


def target(text: str) -> tuple[Card, Sequence[Any]]:
    """The card and its devices for `h100`, `h100:8`, `v5e:8`; nothing of it need be here.

    Raises ConfigError for a name that is not known, a number of chips that does not exist, and where the compiler
    of the target is not installed.
    """
    name, _, number = text.partition(":")
    if name not in CARDS or not (number or "1").isdecimal() or int(number or 1) < 1:
        raise ConfigError(
            f"--device {text!r}: expected one of {', '.join(CARDS)}, with a number of chips behind it if there are "
            "several, for example h100:8"
        )
    count = int(number or 1)
    jax.config.update("jax_platforms", "cpu")  # the rest of the work is done here
    return CARDS[name], (_gpus if CARDS[name].gpu else _tpus)(name, count)


def compiler_options(device: Any) -> dict[str, Any] | None:
    """What the compiler must be told for a device that may not be here."""
    absent = device.client.runtime_type == "compile_only_runtime"
    # Without a card to try them on, it finds no tiles for products of odd sizes in Triton.
    return {"xla_gpu_enable_triton_gemm": False} if absent and device.platform == "gpu" else None


def _gpus(name: str, count: int) -> Sequence[Any]:
    from jax.experimental import topologies

    card = CARDS[name]
    assert card.gpu is not None
    (major, minor), cores, fpus, ghz, l2, block, shared, threads = card.gpu
    features = "ACCELERATED_FEATURES" if major == 9 else "NONE"
    text = f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {shared} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {fpus}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(card.bandwidth)} l2_cache_size: {l2} clock_rate_ghz: {ghz}
      device_memory_size: {card.memory} shared_memory_per_block_optin: {block}
      cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368
      ecc_enabled: true name: "{card.name}" driver_version: "13.0.0" runtime_version: "13.0.0"
      compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
      device_description_str: "{card.name}" """
    if all(importlib.util.find_spec(f"jax_cuda{n}_plugin") is None for n in (12, 13)):
        raise ConfigError(
            f"to compile for {card.name} without one, install its compiler: {_REMEDY}"
        )
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    described = topologies.get_topology_desc(
        platform="cuda", target_config=text, topology=f"1x1x{count}"
    )
    return described.devices


def _tpus(name: str, count: int) -> Sequence[Any]:
    from jax.experimental import topologies

    grids = _GRIDS[name]
    if count not in grids:
        raise ConfigError(
            f"--device {name}:{count}: slices of {name} have {', '.join(map(str, grids))} chips"
        )
    found = importlib.util.find_spec("libtpu")
    if found is None or found.origin is None:
        raise ConfigError(f"to compile for {CARDS[name].name} without one, install its compiler: {_REMEDY}")  # fmt: skip
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    library = os.path.join(os.path.dirname(found.origin), "libtpu.so")
    os.environ.setdefault("TPU_LIBRARY_PATH", library)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{name}:{grids[count]}",
        **({"chips_per_host_bounds": (1, 1, 1), "num_slices": 1} if count == 1 else {}),
    )  # fmt: skip
    return described.devices


def here() -> tuple[Card, Sequence[Any]]:
    """The devices of this machine, with the memory that this process may take of one, where they tell.

    JAX takes three quarters of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. A CPU has no known
    rates: its memory alone is compared.
    """
    devices = jax.devices()
    kind = devices[0].device_kind
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    for card in CARDS.values():
        if card.name.lower().split()[-1] in kind.lower():
            return card._replace(memory=int(limit or card.memory)), devices
    memory = limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Card(kind, int(memory), 0.0, {}), devices
