"""Drawing one generated picture: a background and a pile of coloured, patterned shapes.

A scene is a list of objects from the lowest to the topmost; `draw` returns the pixels and, for each
object, the part of it that remains visible. Antialiased by drawing four times larger.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

_SCALE = 4  # of supersampling

# Hue in degrees and its jitter, saturation, value: far enough apart to need no second look.
COLOURS: dict[str, tuple[float, float, float, float]] = {
    "red": (0, 5, 0.85, 0.85),
    "orange": (28, 3, 0.95, 0.97),
    "yellow": (52, 3, 0.88, 0.97),
    "green": (125, 10, 0.75, 0.62),
    "blue": (222, 7, 0.82, 0.85),
    "purple": (279, 6, 0.72, 0.65),
    "pink": (332, 4, 0.42, 1.0),
    "brown": (24, 3, 0.62, 0.42),
    "cyan": (184, 4, 0.75, 0.9),
    "black": (0, 0, 0.0, 0.1),
}
PATTERNS = ("solid", "striped", "dotted", "checkered")
_LIGHT = ("yellow", "orange", "pink", "cyan")  # patterned with dark, the others with white


def _regular(points: int, inner: float = 1.0) -> np.ndarray:
    """A regular polygon, or a star where every second point lies at `inner`, first point up."""
    angles = np.arange(points) * 2 * np.pi / points - np.pi / 2
    radii = np.where(np.arange(points) % 2, inner, 1.0)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 16, -(y + 2.5) / 16], 1)


def _moon() -> np.ndarray:
    outer = np.linspace(0.28 * np.pi, 1.72 * np.pi, 48)
    tip = np.stack([np.cos(outer), np.sin(outer)], 1)
    # The inner arc runs through the outer arc's two ends, around a centre to the right.
    centre, reach = 0.62, tip[0] - [0.62, 0]
    radius, start = np.hypot(*reach), np.arctan2(reach[1], reach[0])
    inner = np.linspace(2 * np.pi - start, start, 32)[1:-1]
    arc = np.stack([centre + radius * np.cos(inner), radius * np.sin(inner)], 1)
    return np.concatenate([tip, arc]) + [0.2, 0]


def _drop() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([0.78 * np.sin(t) * np.sin(t / 2) ** 1.4, -np.cos(t)], 1)


_ARM = 0.34
# Outlines in the unit circle, y downwards; with the largest turn, in degrees, that keeps the name.
SHAPES: dict[str, tuple[np.ndarray, float]] = {
    "circle": (0.86 * _regular(64), 180),
    "square": (0.78 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), 18),
    "triangle": (_regular(3), 180),
    "star": (_regular(10, 0.46), 180),
    "cross": (
        np.array(
            [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
            + [(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
        )
        * 0.94,
        18,
    ),
    "heart": (_heart(), 25),
    "moon": (_moon(), 180),
    "arrow": (
        np.array(
            [(-1, -0.25), (0.1, -0.25), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.25), (-1, 0.25)]
        ),
        180,
    ),
    "drop": (_drop(), 30),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it is, and where. centre, radius in pixels; turn in degrees."""

    shape: str
    colour: str
    pattern: str
    centre: tuple[float, float]
    radius: float
    turn: float
    rgb: tuple[int, int, int]


def outline(thing: Thing) -> np.ndarray:
    """Its corners [n, 2] in pixels."""
    angle = np.deg2rad(thing.turn)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return SHAPES[thing.shape][0] @ turn * thing.radius + thing.centre


def draw_colour(rng: np.random.Generator, name: str) -> tuple[int, int, int]:
    """A shade of the colour, never so far off that it could be another one."""
    hue, jitter, saturation, value = COLOURS[name]
    shade = colorsys.hsv_to_rgb(
        ((hue + rng.uniform(-jitter, jitter)) / 360) % 1,
        saturation * rng.uniform(0.93, 1),
        value * rng.uniform(0.93, 1),
    )
    red, green, blue = (round(255 * c) for c in shade)
    return red, green, blue


def draw_background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """[Y, X, 3] float32 in 0..255: plain, a gradient or blotches; pale, so every colour stands out."""
    kind = rng.integers(3)
    base = _pale(rng)
    if kind == 0:
        return np.broadcast_to(base, (height, width, 3)).astype(np.float32)
    if kind == 1:
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        ramp = x / width * np.cos(angle) + y / height * np.sin(angle)
        ramp = (ramp - ramp.min()) / (ramp.max() - ramp.min())
        return (base + (_pale(rng) - base) * ramp[..., None]).astype(np.float32)
    cells = int(rng.integers(4, 24))
    small = (
        base + rng.normal(0, rng.uniform(6, 16), (cells, cells, 1)) + rng.normal(0, 3, (1, 1, 3))
    )
    blotches = Image.fromarray(np.clip(small, 0, 255).astype(np.uint8))
    return np.asarray(blotches.resize((width, height), Image.Resampling.BICUBIC), np.float32)


def draw(things: list[Thing], background: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels [Y, X, 3] uint8, visible parts [n, Y, X] bool, whole areas [n] (inside the picture).

    A pixel belongs to the topmost object that covers at least half of it.
    """
    height, width = background.shape[:2]
    canvas = background.copy()
    visible = np.zeros((len(things), height, width), bool)
    areas = np.zeros(len(things))
    for k, thing in enumerate(things):
        left, top, inside, line, pattern = _tile(thing)
        y0, x0 = max(top, 0), max(left, 0)
        y1, x1 = min(top + inside.shape[0], height), min(left + inside.shape[1], width)
        if y0 >= y1 or x0 >= x1:
            continue
        part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        area = (slice(y0, y1), slice(x0, x1))
        colour = _paint(thing, line[part], pattern[part])
        alpha = inside[part][..., None]
        canvas[area] = canvas[area] * (1 - alpha) + colour * alpha
        covered = inside[part] >= 0.5
        visible[(slice(0, k), *area)] &= ~covered
        visible[(k, *area)] = covered
        areas[k] = covered.sum()
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), visible, areas


def _pale(rng: np.random.Generator) -> np.ndarray:
    shade = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.1), rng.uniform(0.72, 0.97))
    return np.array(shade, np.float32) * 255


def _tile(thing: Thing) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray]:
    """Left, top and, over the object's own surroundings, coverage, outline and pattern in 0..1."""
    corners = outline(thing)
    left, top = (int(v) for v in np.floor(corners.min(0)) - 1)
    right, bottom = (int(v) for v in np.ceil(corners.max(0)) + 1)
    size = ((right - left) * _SCALE, (bottom - top) * _SCALE)
    # PIL counts pixel centres, polygons here count edges: hence the half pixel.
    points = [tuple(p) for p in ((corners - (left, top)) * _SCALE - 0.5).tolist()]
    shape, edge = Image.new("L", size), Image.new("L", size)
    ImageDraw.Draw(shape).polygon(points, fill=255)
    thickness = max(1, round(_SCALE * thing.radius * 0.05))
    ImageDraw.Draw(edge).line([*points, points[0], points[1]], fill=255, width=thickness)
    pattern = _pattern(thing, left, top, right - left, bottom - top)
    inside, outer, shade = (
        np.asarray(layer, np.float32) / 255
        for layer in (shape.reduce(_SCALE), edge.reduce(_SCALE), pattern)
    )
    return left, top, inside, outer, shade


def _pattern(thing: Thing, left: int, top: int, width: int, height: int) -> Image.Image:
    if thing.pattern == "solid":
        return Image.new("L", (width, height))
    scale = 2  # of supersampling, enough where no mask depends on it
    angle = np.deg2rad(thing.turn + 45)
    x = (np.arange(width * scale, dtype=np.float32) + 0.5) / scale + left - thing.centre[0]
    y = (np.arange(height * scale, dtype=np.float32) + 0.5) / scale + top - thing.centre[1]
    y = y[:, None]
    u = (x * np.cos(angle) + y * np.sin(angle)) / thing.radius
    v = (y * np.cos(angle) - x * np.sin(angle)) / thing.radius
    if thing.pattern == "striped":
        on = np.mod(u / 0.5 + 0.25, 1) < 0.5
    elif thing.pattern == "dotted":
        near = np.hypot(np.mod(u / 0.46, 1) - 0.5, np.mod(v / 0.46, 1) - 0.5)
        on = near < 0.3
    else:
        on = (np.floor(u / 0.34) + np.floor(v / 0.34)) % 2 == 0
    return Image.fromarray(on.astype(np.uint8) * np.uint8(255)).reduce(scale)


def _paint(thing: Thing, line: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """Colour of each pixel [Y, X, 3]: the object's own, its pattern's, and a darker outline."""
    own = np.array(thing.rgb, np.float32)
    ink = own * 0.28 if thing.colour in _LIGHT else np.full(3, 248, np.float32)
    colour = own + (ink - own) * pattern[..., None]
    return colour + (own * 0.6 - colour) * line[..., None]
