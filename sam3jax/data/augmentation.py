"""Changes of pixels alone: brightness, contrast, colour, grey, blur, noise. No target moves.

Brightness, contrast and colour are one matrix, applied by Pillow in one pass; a 1008-pixel picture
costs a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from sam3jax.config import DataConfig

Change = Callable[[Image.Image], Image.Image]

_LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue, as in ITU-R 601
_QUANTILES = 256  # steps of the noise's distribution: one random byte a value


def draw_change(rng: np.random.Generator, config: DataConfig) -> Change | None:
    """A random change within what `config` allows; None where it allows none.

    The number of draws does not depend on the settings: switching one on leaves the others' luck.
    """
    brightness, contrast, colour = rng.uniform(-1, 1, 3)
    grey, blur, noise = rng.random(3)
    seed = int(rng.integers(2**63))
    strength = 0.0 if grey < config.grey else 1 + colour * config.colour
    brightness, contrast = 1 + brightness * config.brightness, 1 + contrast * config.contrast
    radius, deviation = blur * config.blur, noise * config.noise
    if brightness == contrast == strength == 1 and not radius and not deviation:
        return None

    def change(image: Image.Image) -> Image.Image:
        if not brightness == contrast == strength == 1:
            image = _mix(image, brightness, contrast, strength)
        if radius > 0.1:
            image = image.filter(ImageFilter.GaussianBlur(radius))
        return _add_noise(image, deviation, seed) if deviation > 0.5 else image

    return change


def _mix(image: Image.Image, brightness: float, contrast: float, strength: float) -> Image.Image:
    """Colours around grey, contrast around the mean grey level, then brightness."""
    small = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32)
    mean = float((small @ _LUMA).mean())
    colours = strength * np.eye(3) + (1 - strength) * _LUMA  # [3, 3], rows are outputs
    matrix = np.empty((3, 4))
    matrix[:, :3] = brightness * contrast * colours
    matrix[:, 3] = brightness * (1 - contrast) * mean
    return image.convert("RGB", tuple(matrix.ravel().tolist()))


def _add_noise(image: Image.Image, deviation: float, seed: int) -> Image.Image:
    """Gaussian noise by its quantiles: a table look-up costs a tenth of drawing normal numbers."""
    from scipy.special import ndtri

    values = np.asarray(image)
    table = np.rint(deviation * ndtri((np.arange(_QUANTILES) + 0.5) / _QUANTILES)).astype(np.int16)
    draws = np.random.Generator(np.random.SFC64(seed)).bytes(values.size)
    noise = table[np.frombuffer(draws, np.uint8)].reshape(values.shape)
    noise += values
    return Image.fromarray(np.clip(noise, 0, 255, out=noise).astype(np.uint8))
