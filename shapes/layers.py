"""What layers of a scene are made of: motions, textured surfaces and outlines.

Points are complex numbers x + iy (x to the right, y down), so that a similarity transform is
p -> a * p + b. Lengths are in world units (see `world`), times in frames.
"""

import math
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np

HUES = {"red": 0.0, "green": 125.0, "blue": 225.0, "yellow": 54.0}  # degrees
NEUTRALS = {"white": 1.0, "grey": 0.5}  # brightness relative to that of a hue
COLORS = (*HUES, *NEUTRALS)
TEXTURES = ("plain", "striped", "dotted", "checkered")


@dataclass(frozen=True)
class Wave:
    """The oscillation amplitude * sin(2 pi time / period + phase)."""

    amplitude: float
    period: float
    phase: float

    def __call__(self, time: float) -> float:
        return self.amplitude * math.sin(2 * math.pi * time / self.period + self.phase)


STILL = Wave(0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Motion:
    """Motion of a layer: swinging translation and zoom, steady rotation (radians a frame)."""

    center: complex
    x: Wave
    y: Wave
    log_scale: Wave = STILL
    angle: float = 0.0
    spin: float = 0.0

    def pose(self, time: float) -> tuple[complex, complex]:
        """(a, b) of the transform p -> a * p + b from layer to frame coordinates at `time`."""
        turn = np.exp(self.log_scale(time) + 1j * (self.angle + self.spin * time))
        return complex(turn), self.center + complex(self.x(time), self.y(time))


@dataclass(frozen=True)
class Surface:
    """What a caption leaves open of a layer's look: its shades, and how its texture lies."""

    hue_shift: float  # degrees
    saturation: float
    brightness: float
    contrast: float  # brightness of the dark tone relative to the light one
    angle: float  # radians
    period: float  # world units
    phase: complex  # world units
    grain: tuple[tuple[complex, float], ...]  # wave vectors (radians / unit), phases
    shading: tuple[tuple[complex, float], ...]  # likewise, of waves longer than an object

    def paint(self, points: np.ndarray, color: str, texture: str, blur: float) -> np.ndarray:
        """Colours (..., 3) in [0, 1] at `points` of the layer; edges are `blur` units wide.

        Shading and grain belong to the surface and move with it, so that a plain one does too.
        """
        tone = _pattern(points * np.exp(1j * self.angle) + self.phase, texture, self.period, blur)
        shade = self.brightness * (self.contrast + (1 - self.contrast) * tone)
        for vector, phase in self.grain:
            shade = shade * (1 + 0.02 * np.sin((points * vector.conjugate()).real + phase))
        for vector, phase in self.shading:
            shade = shade * (0.9 + 0.1 * np.sin((points * vector.conjugate()).real + phase))
        if color in NEUTRALS:
            return shade[..., None] * np.full(3, NEUTRALS[color])
        hue = (HUES[color] + self.hue_shift) / 360 % 1
        return shade[..., None] * np.array(hsv_to_rgb(hue, self.saturation, 1.0))


def outline(points: np.ndarray, shape: str, radius: float) -> np.ndarray:
    """Signed distance to the outline; the shapes of one radius have about the same size."""
    if shape == "circle":
        return np.abs(points) - radius
    if shape == "square":
        return np.maximum(np.abs(points.real), np.abs(points.imag)) - 0.85 * radius
    normals = np.exp(2j * np.pi * np.arange(3) / 3)  # of a triangle
    sides = [(points * normal.conjugate()).real for normal in normals]
    return np.maximum.reduce(sides) - 0.66 * radius


def _pattern(points: np.ndarray, texture: str, period: float, blur: float) -> np.ndarray:
    """Tone in [0, 1] (dark, light) of a texture of two tones whose edges are `blur` wide."""
    if texture == "plain":
        return np.ones(points.shape)
    if texture == "checkered":
        period = 1.25 * period  # two edges a period in both directions: finer than stripes
    # Distances to the middle of the nearest light stripe, and of the nearest light row.
    across = np.abs((points.real / period) % 1 - 0.5) * period
    along = np.abs((points.imag / period) % 1 - 0.5) * period
    if texture == "dotted":
        return np.clip(0.5 + (0.34 * period - np.hypot(across, along)) / blur, 0, 1)
    stripes = np.clip(0.5 + (period / 4 - across) / blur, 0, 1)
    if texture == "striped":
        return stripes
    rows = np.clip(0.5 + (period / 4 - along) / blur, 0, 1)
    return stripes * rows + (1 - stripes) * (1 - rows)
