"""The built-in images: textured objects of ten classes over textured backgrounds.

Rendered on the fly, each a pure function of (split, index, size), with label, mask and boxes. A
class is a shape together with a texture; colour, place, size and rotation say nothing about it.
Backgrounds are smooth, so that a patch of them can be told from its neighbours; objects are not,
so that the hard patches are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIZES = {"train": 4096, "test": 1024}
SUPERSAMPLING = 2
REFERENCE = 64  # pixels: texture periods are given for an image of this size

Field = np.ndarray  # float32 [H W]


@dataclass(frozen=True)
class DemoImage:
    """image: uint8 [H W 3]; label: number of the class; mask: bool [H W], True on an object;
    boxes: int [objects 4], x0 y0 x1 y1 in pixels, the ends exclusive."""

    image: np.ndarray
    label: int
    mask: np.ndarray
    boxes: np.ndarray


def render(index: int, split: str = "train", size: int = 64) -> DemoImage:
    """Draw one image of `size` x `size` pixels. The scene is the same at every size.

    Raises ValueError for an unknown split, IndexError for an index outside of it.
    """
    if split not in SIZES:
        raise ValueError(f"no split '{split}' (there is {', '.join(SIZES)})")
    if not 0 <= index < SIZES[split]:
        raise IndexError(f"index {index} is outside of {split}'s {SIZES[split]} images")
    rng = np.random.default_rng([list(SIZES).index(split), index])
    label = index % len(CLASSES)
    fine = size * SUPERSAMPLING
    y, x = np.mgrid[0:fine, 0:fine].astype(np.float32) / fine + 0.5 / fine
    canvas = _background(rng, x, y)
    masks = []
    for center, radius in _places(rng):
        inside, colour = _object(rng, label, (x - center[0]) / radius, (y - center[1]) / radius,
                                 radius * REFERENCE)  # fmt: skip
        canvas = np.where(inside[..., None], colour, canvas)
        masks.append(_shrink(inside.astype(np.float32)) >= 0.5)
    image = (_shrink(canvas).clip(0, 1) * 255).round().astype(np.uint8)
    boxes = np.array([_box(mask) for mask in masks])
    return DemoImage(image, label, np.logical_or.reduce(masks), boxes)


def _background(rng: np.random.Generator, x: Field, y: Field) -> np.ndarray:
    """Slow waves between two muted colours, under a faint fine texture: [H W 3]."""
    first, second = rng.uniform(0.15, 0.85, (2, 3)).astype(np.float32)
    waves = np.zeros_like(x)
    for _ in range(3):
        waves += np.sin(_wave(rng, x, y, frequency=rng.uniform(0.3, 1.6)))
    grain = np.sin(_wave(rng, x, y, rng.uniform(8, 14)))
    grain = grain * np.sin(_wave(rng, x, y, rng.uniform(8, 14)))
    mix = (0.5 + waves / 5 + rng.uniform(0.02, 0.1) * grain)[..., None]
    # Colours half way to each other: less contrast than on any object.
    middle = (first + second) / 2
    return (middle + 0.6 * (first - middle)) * mix + (middle + 0.6 * (second - middle)) * (1 - mix)


def _wave(rng: np.random.Generator, x: Field, y: Field, frequency: float) -> Field:
    """Phase of a plane wave of `frequency` periods per image, in a random direction."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    return np.float32(2 * np.pi * frequency) * along + np.float32(phase)


def _places(rng: np.random.Generator) -> list[tuple[tuple[float, float], float]]:
    """Centres and radii, as shares of the image: one large object, or two smaller ones apart."""
    if rng.random() < 0.5:
        radius = rng.uniform(0.26, 0.36)
        return [(tuple(rng.uniform(radius, 1 - radius, 2)), radius)]
    radii = rng.uniform(0.19, 0.25, 2)
    # On opposite sides of the middle, along a random one of the two diagonals.
    offsets = np.array([0.5 - radii[0], radii[1] - 0.5]) * rng.uniform(0.85, 1, 2)
    sign = rng.choice([-1, 1])
    jitter = rng.uniform(-0.03, 0.03, (2, 2))
    return [
        ((0.5 + o + j[0], 0.5 + sign * o + j[1]), r)
        for o, r, j in zip(offsets, radii, jitter, strict=True)
    ]


def _object(
    rng: np.random.Generator, label: int, u: Field, v: Field, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where the object is [H W] and its colours [H W 3]; u, v are in radii from its centre."""
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * u + sin * v, cos * v - sin * u
    shape, texture = SHAPES_AND_TEXTURES[label]
    period = rng.uniform(6.5, 9.5) / radius
    phase = rng.uniform(0, 1, 2)
    value = texture(u / period + np.float32(phase[0]), v / period + np.float32(phase[1]))
    dark = rng.uniform(0, 0.35, 3)
    light = rng.uniform(0.55, 1, 3)
    # One channel of each is pushed apart, so that the two colours differ in hue as well.
    light[rng.integers(3)] = rng.uniform(0.2, 0.6)
    colours = np.array([dark, light], dtype=np.float32)
    return shape(u, v), colours[value.astype(np.int64)]


def _shrink(fine: np.ndarray) -> np.ndarray:
    """Average over the supersampled pixels: smooth edges."""
    s = SUPERSAMPLING
    return fine.reshape(len(fine) // s, s, fine.shape[1] // s, s, *fine.shape[2:]).mean((1, 3))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# Shapes: (u, v) in radii -> True inside.


def _disc(u: Field, v: Field) -> np.ndarray:
    return u**2 + v**2 < 0.9


def _square(u: Field, v: Field) -> np.ndarray:
    return np.maximum(abs(u), abs(v)) < 0.75


def _triangle(u: Field, v: Field) -> np.ndarray:
    return (v < 0.55) & (v + 1.732 * abs(u) > -1.05) & (v > 1.732 * abs(u) - 1.05)


def _ring(u: Field, v: Field) -> np.ndarray:
    radius = u**2 + v**2
    return (radius < 1) & (radius > 0.16)


def _cross(u: Field, v: Field) -> np.ndarray:
    return (np.minimum(abs(u), abs(v)) < 0.36) & (np.maximum(abs(u), abs(v)) < 0.95)


def _star(u: Field, v: Field) -> np.ndarray:
    return np.hypot(u, v) < 0.72 + 0.3 * np.cos(5 * np.arctan2(v, u))


def _bar(u: Field, v: Field) -> np.ndarray:
    return (abs(u) < 1) & (abs(v) < 0.5)


def _half(u: Field, v: Field) -> np.ndarray:
    return (u**2 + (v + 0.4) ** 2 < 1) & (v > -0.4)


def _crescent(u: Field, v: Field) -> np.ndarray:
    return (u**2 + v**2 < 1) & ((u - 0.55) ** 2 + v**2 > 0.36)


def _heart(u: Field, v: Field) -> np.ndarray:
    return (u * 1.15) ** 2 + (1.25 * v + 0.75 * np.sqrt(abs(u)) - 0.3) ** 2 < 0.95


# Textures: (u, v) in periods -> True where light.


def _stripes(u: Field, v: Field) -> np.ndarray:
    return u % 1 < 0.5


def _checks(u: Field, v: Field) -> np.ndarray:
    return (u % 1 < 0.5) ^ (v % 1 < 0.5)


def _dots(u: Field, v: Field) -> np.ndarray:
    return (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.1


def _zigzag(u: Field, v: Field) -> np.ndarray:
    return (u + 0.8 * abs(v / 1.5 % 1 - 0.5)) % 1 < 0.5


def _lattice(u: Field, v: Field) -> np.ndarray:
    return (u % 1 < 0.28) | (v % 1 < 0.28)


def _bricks(u: Field, v: Field) -> np.ndarray:
    row = np.floor(1.6 * v)
    return (1.6 * v % 1 > 0.28) & ((0.7 * u + 0.5 * (row % 2)) % 1 > 0.2)


def _waves(u: Field, v: Field) -> np.ndarray:
    return (u + 0.3 * np.sin(2 * np.pi * v / 1.4)) % 1 < 0.5


def _pluses(u: Field, v: Field) -> np.ndarray:
    a, b = abs(u / 1.2 % 1 - 0.5), abs(v / 1.2 % 1 - 0.5)
    return (np.minimum(a, b) < 0.13) & (np.maximum(a, b) < 0.4)


def _pinstripes(u: Field, v: Field) -> np.ndarray:
    return (u % 1 < 0.2) | ((u % 1 > 0.4) & (u % 1 < 0.6))


def _scales(u: Field, v: Field) -> np.ndarray:
    shifted = u + 0.5 * (np.floor(v) % 2)
    radius = np.hypot(shifted % 1 - 0.5, v % 1)
    return (radius < 0.5) & (radius > 0.25)


Drawing = Callable[[Field, Field], np.ndarray]

SHAPES_AND_TEXTURES: list[tuple[Drawing, Drawing]] = [
    (_disc, _stripes), (_square, _checks), (_triangle, _dots), (_ring, _zigzag),
    (_cross, _lattice), (_star, _bricks), (_bar, _waves), (_half, _pluses),
    (_crescent, _pinstripes), (_heart, _scales),
]  # fmt: skip

CLASSES = (
    "striped disc", "checked square", "dotted triangle", "zigzag ring", "latticed cross",
    "bricked star", "wavy bar", "half disc of pluses", "pinstriped crescent", "scaly heart",
)  # fmt: skip
