"""The built-in videos: textured objects that move over drifting backgrounds, in ten motions.

Rendered on the fly, each a pure function of (split, index, frame number, size), with label and a
mask of the object per frame. A class is a motion. Shape, texture, colours, background and its drift
are drawn independently of it. So are place and size in any one frame: places lie on a torus (an
object that leaves on one side comes back on the other) and are uniform, sizes are log-uniform and
grow or shrink in an endless cycle. A single frame therefore tells nothing about the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpm.data.arrays import UnreadableImage
from hpm.data.demo import SHAPES_AND_TEXTURES

SIZES = {"train": 4096, "test": 1024}
SIZE = 64  # of a frame's sides, in pixels
LENGTH = 64  # of a video, in frames
RADII = (0.13, 0.27)  # of an object, as fractions of the frame's side
SPRITE = 48  # samples along each axis of an object
PERIODS = (20.0, 32.0)  # of motions that repeat, in frames
SPEEDS = (1 / 40, 1 / 24)  # of motions along a line, in frames' sides per frame
REACH = (0.12, 0.2)  # of motions that return: the radius of circles, the amplitude of swings

CLASSES: tuple[str, ...] = (
    "left",
    "right",
    "up",
    "down",
    "clockwise",
    "anticlockwise",
    "growing",
    "shrinking",
    "swinging sideways",
    "swinging up and down",
)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)


@dataclass(frozen=True)
class DemoClip:
    """frames: uint8 [T H W 3]. label: class index. masks: bool [T H W], True on the object."""

    frames: np.ndarray
    label: int
    masks: np.ndarray


def render(
    index: int, split: str = "train", numbers: Sequence[int] = range(LENGTH), size: int = SIZE
) -> DemoClip:
    """Draw frames of the given numbers, `size` x `size` pixels. The scene is the same at any size.

    Raises ValueError for an unknown split, IndexError for an index outside of it.
    """
    if split not in SIZES:
        raise ValueError(f"no split '{split}' (there is {', '.join(SIZES)})")
    if not 0 <= index < SIZES[split]:
        raise IndexError(f"index {index} is outside of {split}'s {SIZES[split]} videos")
    rng = np.random.default_rng([list(SIZES).index(split), index, LENGTH])
    label = index % len(CLASSES)
    at = np.asarray(numbers, np.float32)
    hue = rng.random()
    background = _background(rng, at, size, hue)
    sprite = _sprite(rng, hue)
    centers, radii = _motion(rng, CLASSES[label], at)
    across, down = (_weights(centers[:, axis], radii, size) for axis in (0, 1))
    # Resampling is separable: [T 1 H S] @ [4 S S] @ [T 1 S W].
    drawn = down[:, None] @ sprite @ across[:, None].swapaxes(2, 3)
    cover = drawn[:, 3]
    background *= (1 - cover)[:, None]
    background += drawn[:, :3]
    background += 0.5  # rounded by the cut to whole numbers
    frames = background.astype(np.uint8).transpose(0, 2, 3, 1)
    return DemoClip(frames, label, cover >= 0.5)


class DemoVideo:
    """A built-in video; see hpm.data.video.clip.Video."""

    length = LENGTH

    def __init__(self, index: int, split: str):
        self.index, self.split = index, split

    def close(self) -> None:
        pass

    def read(
        self, numbers: Sequence[int], channels: int = 3, least: tuple[int, int] | None = None
    ) -> np.ndarray:
        """uint8 [frames H W 3]."""
        if channels not in (1, 3, 4):
            raise UnreadableImage(f"3 channels instead of {channels}")
        size = min(SIZE, max(least)) if least else SIZE
        within = [min(number, LENGTH - 1) for number in numbers]
        return render(self.index, self.split, within, size).frames


def _motion(rng: np.random.Generator, name: str, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres (x, y) [T 2] and radii [T] of the object at the frame numbers `at`, as fractions of
    the frame's side. Every class draws the same numbers, used or not."""
    start, phase, size = rng.random(2), rng.random(), rng.random()
    period, speed, reach = rng.uniform(*PERIODS), rng.uniform(*SPEEDS), rng.uniform(*REACH)
    turns = phase + at / period
    centers = np.tile(start, (len(at), 1))
    if name in DIRECTIONS:
        centers += speed * at[:, None] * DIRECTIONS[name]
    elif name in ("clockwise", "anticlockwise"):
        sign = 1 if name == "clockwise" else -1  # y points down
        angle = 2 * np.pi * sign * turns
        centers += reach * np.stack([np.cos(angle), np.sin(angle)], 1)
    elif name.startswith("swinging"):
        centers[:, int(name == "swinging up and down")] += reach * np.sin(2 * np.pi * turns)
    cycle = {"growing": turns % 1, "shrinking": -turns % 1}.get(name, np.full(len(at), size))
    return centers % 1, RADII[0] * (RADII[1] / RADII[0]) ** cycle


def _weights(center: np.ndarray, radius: np.ndarray, size: int) -> np.ndarray:
    """Weights [T size SPRITE] with which each pixel of a row sums the object's samples: a triangle
    as wide as a pixel or the distance of two samples, whichever is larger."""
    pixels = ((np.arange(size) + 0.5) / size).astype(np.float32)
    samples = ((2 * np.arange(SPRITE) + 1) / SPRITE - 1).astype(np.float32)
    spacing = (2 * radius / SPRITE).astype(np.float32)[:, None, None]
    width = np.maximum(spacing, np.float32(1 / size))
    positions = (center[:, None] + radius[:, None] * samples).astype(np.float32)
    away = pixels[:, None] - positions[:, None, :]
    away -= np.round(away)  # on the torus
    np.abs(away, out=away)
    away /= -width
    away += 1
    np.maximum(away, 0, out=away)
    away *= spacing / width
    return away


def _sprite(rng: np.random.Generator, hue: float) -> np.ndarray:
    """An object: its colours (full scale 255) times its coverage, and its coverage, float32
    [4 SPRITE SPRITE]."""
    shape, texture = (
        SHAPES_AND_TEXTURES[number][part]
        for part, number in enumerate(rng.integers(len(SHAPES_AND_TEXTURES), size=2))
    )
    at = np.linspace(-1, 1, SPRITE, dtype=np.float32)
    inside = shape(*_turned(rng, at))
    period = rng.uniform(0.5, 0.75)
    u, v = _turned(rng, at / np.float32(period))
    shift = rng.uniform(-1, 1, 2).astype(np.float32)
    bright = texture(u + shift[0], v + shift[1])
    hues = hue + rng.uniform(0.2, 0.8, 2)  # not the background's
    dark = _colour(rng.uniform(0.08, 0.22), rng.uniform(0.05, 0.2), hues[0])
    light = _colour(rng.uniform(0.7, 0.92), rng.uniform(0.1, 0.35), hues[1])
    colours = 255 * np.where(bright, light[:, None, None], dark[:, None, None])
    whole = np.concatenate([colours, np.ones_like(colours[:1])])
    return np.where(inside, whole, np.float32(0))


def _turned(rng: np.random.Generator, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of a square grid in a randomly rotated frame."""
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y = at[None, :], at[:, None]
    return cos * x + sin * y, cos * y - sin * x


def _background(rng: np.random.Generator, at: np.ndarray, size: int, hue: float) -> np.ndarray:
    """Slow colour waves and a faint grain that drift together: float32 [T 3 H W], full scale 255.

    Amplitudes are small enough that no colour leaves the range from 0 to 255."""
    base = _colour(rng.uniform(0.4, 0.6), rng.uniform(0.05, 0.2), hue)
    # Periods per frame's side, and the amplitude of each wave in the three channels.
    frequency = np.concatenate([rng.uniform(0.3, 1.8, 4), rng.uniform(5, 11, 4)])
    colours = np.concatenate(
        [rng.uniform(-0.06, 0.06, (4, 3)), rng.uniform(0.004, 0.022) * np.ones((4, 3))]
    )
    angle, phase = rng.uniform(0, 2 * np.pi, (2, 8))
    direction, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.002, 0.008)
    places = 2 * np.pi * (np.arange(size) + 0.5) / size
    # A drift only shifts the phase of each wave.
    shift = 2 * np.pi * frequency * np.cos(angle - direction) * speed
    across = np.outer(places, frequency * np.cos(angle)) + phase
    down = np.outer(places, frequency * np.sin(angle)) - at[:, None, None] * shift
    # sin(a + b) = sin a cos b + cos a sin b: products of matrices need few sines.
    left = np.concatenate([np.cos(down), np.sin(down)], 2).astype(np.float32)
    right = np.concatenate([np.sin(across), np.cos(across)], 1).T * np.tile(colours.T, 2)[..., None]
    # The mean colour is a wave of frequency 0.
    left = np.concatenate([left, np.ones_like(left[..., :1])], 2)
    right = np.concatenate([right, np.tile(base[:, None, None], size)], 1)
    return left[:, None] @ (255 * right).astype(np.float32)


def _colour(light: float, chroma: float, hue: float) -> np.ndarray:
    """A colour [3] of mean `light`, saturation `chroma` and `hue` (of period 1)."""
    away = np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))
    return (light + chroma * away).clip(0, 1).astype(np.float32)
