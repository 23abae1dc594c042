"""What a run says of the precision of its products."""

from __future__ import annotations

from typing import Any

import jax

from sam3jax.config import ModelConfig

# What `jax_default_matmul_precision` unset means for float32 on each platform.
_DEFAULT = {"gpu": "TF32 (10 bits)", "tpu": "bfloat16 (7 bits)"}


def precision_line(model: ModelConfig, device: Any) -> str | None:
    """A sentence for the log, of an accelerator; on a CPU float32 is float32."""
    if device.platform == "cpu":
        return None
    asked = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
    old = device.platform == "gpu" and float(getattr(device, "compute_capability", "8.0")) < 8
    if model.compute_dtype == "bfloat16":
        units = ", for which this card has no units: they are computed in float32" if old else ""
        return f"precision: products of bfloat16, added up in float32{units}"
    if asked in (None, "default"):
        found = "float32: this card has no TF32" if old else _DEFAULT.get(device.platform, "the platform's own")  # fmt: skip
        return f"precision: float32, products at jax's default, {found}; JAX_DEFAULT_MATMUL_PRECISION=highest is exact and slower"
    return f"precision: float32, products at {asked}, as jax_default_matmul_precision says"
