"""Changes of pixels alone: brightness, contrast, colour, grey, blur, noise. No target moves.

Brightness, contrast and colour are one matrix, applied by Pillow in one pass; a 1008-pixel picture
costs a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops

from sam3jax.config import DataConfig

Change = Callable[[Image.Image], Image.Image]

_LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue, as in ITU-R 601
_SHARE = 0.25  # of the pictures that are blurred, and of those that get noise: most stay sharp
_ZERO = 128  # what stands for no noise in a byte


def draw_change(rng: np.random.Generator, config: DataConfig) -> Change | None:
    """A random change within what `config` allows; None where it allows none.

    The number of draws does not depend on the settings: switching one on leaves the others' luck.
    """
    brightness, contrast, colour = rng.uniform(-1, 1, 3).tolist()
    grey, blur, noise = rng.random(3).tolist()
    seed = int(rng.integers(2**63))
    strength = 0.0 if grey < config.grey else 1 + colour * config.colour
    brightness, contrast = 1 + brightness * config.brightness, 1 + contrast * config.contrast
    radius = config.blur * blur / _SHARE if blur < _SHARE else 0.0
    deviation = config.noise * noise / _SHARE if noise < _SHARE else 0.0
    if brightness == contrast == strength == 1 and not radius and not deviation:
        return None

    def change(image: Image.Image) -> Image.Image:
        if not brightness == contrast == strength == 1:
            image = _mix(image, brightness, contrast, strength)
        if radius > 0.1:
            image = blurred(image, radius)
        return _add_noise(image, deviation, seed) if deviation > 0.5 else image

    return change


def _mix(image: Image.Image, brightness: float, contrast: float, strength: float) -> Image.Image:
    """Colours around grey, contrast around the mean grey level, then brightness."""
    # A sample of 32 x 32 pixels: the mean of all of them costs more than the change itself.
    small = np.asarray(image.resize((32, 32), Image.Resampling.NEAREST), np.float32)
    mean = float((small @ _LUMA).mean())
    colours = strength * np.eye(3) + (1 - strength) * _LUMA  # [3, 3], rows are outputs
    matrix = np.empty((3, 4))
    matrix[:, :3] = brightness * contrast * colours
    matrix[:, 3] = brightness * (1 - contrast) * mean
    return image.convert("RGB", tuple(matrix.ravel().tolist()))


def blurred(image: Image.Image, radius: float) -> Image.Image:
    """A box of radius pixels to each side, along both axes; a quarter of the time of Pillow's.

    Weights are whole numbers of 256ths: what is added up fits into sixteen bits.
    """
    reach = int(np.ceil(radius))
    weights = [round(256 * min(radius - k, 1.0) / (2 * radius + 1)) for k in range(reach)]
    pixels = np.asarray(image)
    for axis in (0, 1):
        margin = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        wide = np.moveaxis(np.pad(pixels, margin, "edge").astype(np.uint16), axis, 0)
        size = len(wide) - 2 * reach
        total = wide[reach : reach + size] * np.uint16(256 - 2 * sum(weights))
        for k, weight in enumerate(weights, 1):
            sides = wide[reach - k : reach - k + size] + wide[reach + k : reach + k + size]
            total += sides * np.uint16(weight)
        pixels = np.moveaxis(((total + np.uint16(128)) >> 8).astype(np.uint8), 0, axis)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _add_noise(image: Image.Image, deviation: float, seed: int) -> Image.Image:
    """Gaussian noise by its quantiles, one random byte a value: a table look-up costs a tenth of drawing
    normal numbers."""
    from scipy.special import ndtri

    quantiles = deviation * ndtri((np.arange(256) + 0.5) / 256)
    table = np.clip(np.rint(_ZERO + quantiles), 0, 255).astype(np.uint8)
    size = image.width * image.height * 3
    draws = np.random.SFC64(seed).random_raw(-(-size // 8)).tobytes()[:size]
    noise = Image.frombytes("RGB", image.size, draws.translate(table.tobytes()))
    return ImageChops.add(image, noise, offset=-_ZERO)
