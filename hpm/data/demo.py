"""The built-in images: textured objects of ten classes over textured backgrounds.

Rendered on the fly, each a pure function of (split, index, size), with label, mask and boxes. A
class is a combination of shape and texture; colour, position, size and rotation are independent of
it. Backgrounds are smooth, so that a background patch can be predicted from its neighbours; objects
are not, so that the hard patches lie on objects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SIZES = {"train": 4096, "test": 1024}
SUPERSAMPLING = 2
GAP = 0.03  # least distance between two objects, as a fraction of the image's side

Field = np.ndarray  # float32 [H W]


@dataclass(frozen=True)
class DemoImage:
    """image: uint8 [H W 3]. label: class index. boxes: int [objects 4], x0 y0 x1 y1 in pixels, ends
    exclusive. masks: bool [objects H W], True on the object."""

    image: np.ndarray
    label: int
    boxes: np.ndarray
    masks: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """bool [H W], True on any object."""
        return np.logical_or.reduce(self.masks)


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
    hue = rng.random()
    image = _background(rng, size, hue)
    masks, boxes = [], []
    for center, radius in _places(rng, label):
        rows, columns, cover, colour = _object(rng, label, center, radius, size, hue)
        image[rows, columns] = image[rows, columns] * (1 - cover[..., None]) + colour
        inside = cover >= 0.5
        mask = np.zeros((size, size), bool)
        mask[rows, columns] = inside
        masks.append(mask)
        boxes.append(_box(inside, rows.start, columns.start))
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return DemoImage(pixels, label, np.array(boxes), np.stack(masks))


def _background(rng: np.random.Generator, size: int, hue: float) -> np.ndarray:
    """Low-frequency colour waves plus a faint high-frequency grain: float32 [H W 3]."""
    base = _colour(rng.uniform(0.4, 0.6), rng.uniform(0.05, 0.2), hue)
    # Periods per image, and the amplitude of each wave in the three channels.
    frequency = np.concatenate([rng.uniform(0.3, 1.8, 4), rng.uniform(5, 11, 4)])
    # The slow waves change the hue. The grain is grey, so that it does not look like an object.
    colours = np.concatenate(
        [rng.uniform(-0.06, 0.06, (4, 3)), rng.uniform(0.004, 0.022) * np.ones((4, 3))]
    )
    angle, phase = rng.uniform(0, 2 * np.pi, (2, 8))
    at = (np.arange(size) + 0.5) / size
    across = np.outer(at, 2 * np.pi * frequency * np.cos(angle)) + phase
    down = np.outer(at, 2 * np.pi * frequency * np.sin(angle))
    # sin(a + b) = sin a cos b + cos a sin b: outer products need far fewer sines than pixels.
    left = np.concatenate([np.cos(down), np.sin(down)], 1)
    right = np.concatenate([np.sin(across), np.cos(across)], 1)[..., None] * np.tile(
        colours, (2, 1)
    )
    waves = np.einsum("yk,kz->yz", left, right.transpose(1, 0, 2).reshape(16, -1))
    return (base + waves.reshape(size, size, 3)).astype(np.float32)


def _colour(light: float, chroma: float, hue: float) -> np.ndarray:
    """A colour [3] of mean `light`, saturation `chroma` and `hue` (of period 1)."""
    away = np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))
    return (light + chroma * away).clip(0, 1).astype(np.float32)


def _places(rng: np.random.Generator, label: int) -> list[tuple[np.ndarray, float]]:
    """Centres (x, y) and radii, as fractions of the image's side: one large object or two smaller.

    The area is drawn at random, not the radius: at equal radii, the shapes differ in area, and the
    size would reveal the class.
    """
    one = rng.random() < 0.5
    areas = rng.uniform(0.15, 0.32, 1) if one else rng.uniform(0.075, 0.105, 2)
    radii = np.sqrt(areas / _unit_area(label))
    if one:
        return [(_centers(rng, radii)[0], float(radii[0]))]
    while True:  # one pair in a few dozen is far enough apart
        first, second = _centers(rng, np.repeat(radii, 64)).reshape(2, 64, 2)
        apart = np.hypot(*(first - second).T) > radii.sum() + GAP
        if apart.any():
            chosen = int(apart.argmax())
            return [(first[chosen], float(radii[0])), (second[chosen], float(radii[1]))]


def _centers(rng: np.random.Generator, radii: np.ndarray) -> np.ndarray:
    """Uniformly distributed centres [n 2] of discs that lie inside the image."""
    return radii[:, None] + rng.random((len(radii), 2)) * (1 - 2 * radii[:, None])


@lru_cache
def _unit_area(label: int) -> float:
    """Area of a class's shape at radius 1."""
    at = np.linspace(-1, 1, 256, dtype=np.float32)
    return 4 * float(SHAPES_AND_TEXTURES[label][0](at[None, :], at[:, None]).mean())


def _object(
    rng: np.random.Generator, label: int, center: np.ndarray, radius: float, size: int, hue: float
) -> tuple[slice, slice, Field, np.ndarray]:
    """An object's window (rows, columns), its coverage of each pixel there in [0, 1], and its
    colours times the coverage [h w 3]. `hue` is the background's, which they avoid."""
    low = np.maximum(np.floor((center - radius) * size), 0).astype(int).tolist()
    high = np.minimum(np.ceil((center + radius) * size), size).astype(int).tolist()
    x, y = (
        ((np.arange(a * SUPERSAMPLING, b * SUPERSAMPLING) + 0.5) / SUPERSAMPLING / size - c).astype(
            np.float32
        )
        for a, b, c in zip(low, high, center, strict=True)
    )
    x, y = x[None, :], y[:, None]
    shape, texture = SHAPES_AND_TEXTURES[label]
    inside = shape(*_turn(rng, x / radius, y / radius))
    # Independent of the radius: a patch covers about one period, whatever the object's size.
    period = rng.uniform(6, 9) / 64
    u, v = _turn(rng, x / period, y / period)
    shift = rng.uniform(-1, 1, 2)
    bright = texture(u + np.float32(shift[0]), v + np.float32(shift[1]))
    hues = hue + rng.uniform(0.2, 0.8, 2)
    dark = _colour(rng.uniform(0.08, 0.22), rng.uniform(0.05, 0.2), hues[0])
    light = _colour(rng.uniform(0.7, 0.92), rng.uniform(0.1, 0.35), hues[1])
    cover, lit = _shrink(inside), _shrink(inside & bright)
    colour = cover[..., None] * dark + lit[..., None] * (light - dark)
    return slice(low[1], high[1]), slice(low[0], high[0]), cover, colour


def _turn(rng: np.random.Generator, x: Field, y: Field) -> tuple[Field, Field]:
    """The coordinates in a randomly rotated frame."""
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return (cos * x + sin * y).astype(np.float32), (cos * y - sin * x).astype(np.float32)


def _shrink(fine: np.ndarray) -> Field:
    """Average the supersampled pixels (anti-aliasing)."""
    s = SUPERSAMPLING
    total = sum(fine[i::s, j::s].astype(np.float32) for i in range(s) for j in range(s))
    return np.asarray(total / s**2)


def _box(inside: np.ndarray, top: int, left: int) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return (
        left + int(columns[0]),
        top + int(rows[0]),
        left + int(columns[-1]) + 1,
        top + int(rows[-1]) + 1,
    )


# Shapes: (u, v) in radii -> True inside. Each lies inside the unit disc and covers at least half of
# it, so that two of them fit into an image.


def _disc(u: Field, v: Field) -> np.ndarray:
    return u**2 + v**2 < 1


def _square(u: Field, v: Field) -> np.ndarray:
    return np.maximum(abs(u), abs(v)) < 0.707


def _triangle(u: Field, v: Field) -> np.ndarray:
    # Corners are cut by a circle: a sharp triangle would cover less than half of the disc.
    edges = np.maximum(v, 0.866 * abs(u) - 0.5 * v)
    return (edges < 0.59) & (u**2 + v**2 < 1)


def _star(u: Field, v: Field) -> np.ndarray:
    # A corner at 1, a notch at 0.62, straight lines between them in a fan of ten sectors.
    turn = abs((np.arctan2(v, u) / (2 * np.pi) * 5) % 1 - 0.5)  # 0.5 at a corner, 0 at a notch
    angle = (0.5 - turn) * (2 * np.pi / 5)
    a, b = 0.62 * np.cos(np.pi / 5), 0.62 * np.sin(np.pi / 5)
    return np.hypot(u, v) * (b * np.cos(angle) + (1 - a) * np.sin(angle)) < b


def _cross(u: Field, v: Field) -> np.ndarray:
    return (np.minimum(abs(u), abs(v)) < 0.34) & (np.maximum(abs(u), abs(v)) < 0.94)


def _ring(u: Field, v: Field) -> np.ndarray:
    return abs(u**2 + v**2 - 0.6) < 0.4


def _bar(u: Field, v: Field) -> np.ndarray:
    return (abs(u) < 0.87) & (abs(v) < 0.49)


def _mushroom(u: Field, v: Field) -> np.ndarray:
    return (u**2 + v**2 < 1) & (v > -0.1) | (abs(u) < 0.3) & (v > -0.5) & (v < 0)


def _crescent(u: Field, v: Field) -> np.ndarray:
    return (u**2 + v**2 < 1) & ((u - 0.7) ** 2 + v**2 > 0.5)


def _heart(u: Field, v: Field) -> np.ndarray:
    w, up = abs(u), -v
    lobe = (w - 0.45) ** 2 + (up - 0.33) ** 2 < 0.185
    return lobe | (w + 0.9 * abs(up - 0.05) < 0.92) & (up < 0.4)


# Textures: (u, v) in periods -> True for the light colour.


def _stripes(u: Field, v: Field) -> np.ndarray:
    return u % 1 < 0.5


def _checks(u: Field, v: Field) -> np.ndarray:
    return (u % 1 < 0.5) ^ (v % 1 < 0.5)


def _dots(u: Field, v: Field) -> np.ndarray:
    return (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.11


def _rings(u: Field, v: Field) -> np.ndarray:
    return np.hypot(u, v) % 1 < 0.5


def _zigzag(u: Field, v: Field) -> np.ndarray:
    return (u + 1.2 * abs(v / 1.6 % 1 - 0.5)) % 1 < 0.5


def _lattice(u: Field, v: Field) -> np.ndarray:
    return (u % 1 < 0.3) | (v % 1 < 0.3)


def _bricks(u: Field, v: Field) -> np.ndarray:
    row = np.floor(1.4 * v)
    return (1.4 * v % 1 > 0.3) & ((0.65 * u + 0.5 * (row % 2)) % 1 > 0.2)


def _pluses(u: Field, v: Field) -> np.ndarray:
    a, b = abs(u / 1.2 % 1 - 0.5), abs(v / 1.2 % 1 - 0.5)
    return (np.minimum(a, b) < 0.13) & (np.maximum(a, b) < 0.4)


def _blotches(u: Field, v: Field) -> np.ndarray:
    # Waves whose periods have no common multiple: blotches that never repeat.
    return np.sin(4.3 * u + 1.9 * v) + np.sin(5.1 * v - 2.2 * u) + np.sin(3.1 * (u + v)) > 0.2


def _spokes(u: Field, v: Field) -> np.ndarray:
    return np.arctan2(v, u) * (8 / (2 * np.pi)) % 1 < 0.5


Drawing = Callable[[Field, Field], np.ndarray]

SHAPES_AND_TEXTURES: list[tuple[Drawing, Drawing]] = [
    (_disc, _stripes),
    (_square, _checks),
    (_triangle, _dots),
    (_star, _rings),
    (_cross, _zigzag),
    (_ring, _lattice),
    (_bar, _bricks),
    (_mushroom, _pluses),
    (_crescent, _blotches),
    (_heart, _spokes),
]

CLASSES: tuple[str, ...] = (
    "striped disc",
    "checkered square",
    "dotted triangle",
    "ringed star",
    "zigzag cross",
    "latticed ring",
    "bricked bar",
    "mushroom of pluses",
    "blotched crescent",
    "spoked heart",
)
