"""Pictures of more than eight bits -> eight, so that what was bright stays bright.

X-ray, CT, thermal and microscope pictures use 10, 12 or 14 bits of 16, or floats. The scale follows
from what a picture holds, or from `data.window`, which is the same for all pictures.
"""

from __future__ import annotations

import numpy as np

Window = tuple[float, float]  # values that become 0 and 255

_BITS = (8, 10, 12, 14, 16)


def to_bytes(values: np.ndarray, window: Window | None = None) -> np.ndarray:
    """Values of any type and shape -> uint8; NaN and infinities become 0."""
    if values.dtype == np.uint8:
        return values
    values = np.asarray(values)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        values = np.where(np.isfinite(values), values, 0)
    low, high = window or own_window(values)
    if window is None and values.dtype.kind in "iu" and low == 0:
        return (values >> _shift(high)).astype(np.uint8)  # exact, as dividing by a power of two is
    scaled = (values.astype(np.float32) - low) * (255 / max(high - low, 1e-30))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def own_window(values: np.ndarray) -> Window:
    """The range that holds the values: 0..1 and 0..255 of floats, 8, 10, 12, 14 or 16 bits, or their
    own smallest and largest value where some are negative or beyond sixteen bits."""
    if not values.size:
        return 0.0, 255.0
    low, high = float(values.min()), float(values.max())
    if low < 0 or high >= 2 ** _BITS[-1]:
        return low, high
    if values.dtype.kind == "f" and high <= 1:
        return 0.0, 1.0
    bits = next(bits for bits in _BITS if high < 2**bits)
    return 0.0, float(2**bits - 1)


def _shift(high: float) -> int:
    return int(high).bit_length() - 8
