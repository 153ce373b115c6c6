"""Moving scenes: one textured object over a textured background, at times behind a grey bar.

A scene is a stack of layers (background, object, bar). Each layer has coordinates of its own, in
which its outline and texture stand still, and a similarity transform that carries them into the
frame at a time. Points are complex numbers x + iy (x to the right, y down), so that a similarity
transform is p -> a * p + b. Lengths are in world units: a frame is 128 of them wide and high,
whatever its size in pixels. Times are in frames and need not be whole.
"""

import math
from colorsys import hsv_to_rgb
from dataclasses import asdict, dataclass, replace

import numpy as np

EXTENT = 128.0
HUES = {"red": 0.0, "green": 125.0, "blue": 225.0, "yellow": 54.0}  # degrees
VALUES = {
    "shape": ("circle", "square", "triangle"),
    "color": tuple(HUES),
    "texture": ("striped", "dotted", "checkered"),
    "background_color": tuple(HUES),
    "background_texture": ("striped", "dotted", "checkered"),
}
BACKGROUND, OBJECT, BAR = range(3)
BAR_GREY = 0.55


@dataclass(frozen=True)
class Attributes:
    """What a caption says of a scene; `VALUES` lists the values of each attribute."""

    shape: str
    color: str
    texture: str
    background_color: str
    background_texture: str
    barred: bool = False

    def caption(self) -> str:
        """The scene in words, e.g. "a red striped circle on a green dotted background"."""
        text = (
            f"a {self.color} {self.texture} {self.shape}"
            f" on a {self.background_color} {self.background_texture} background"
        )
        return text + " behind a grey bar" if self.barred else text


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

    def paint(self, points: np.ndarray, color: str, texture: str, blur: float) -> np.ndarray:
        """Colours (..., 3) in [0, 1] at `points` of the layer; edges are `blur` units wide."""
        tone = _pattern(points * np.exp(1j * self.angle) + self.phase, texture, self.period, blur)
        shade = self.brightness * (self.contrast + (1 - self.contrast) * tone)
        for vector, phase in self.grain:
            shade = shade * (1 + 0.02 * np.sin((points * vector.conjugate()).real + phase))
        hue = (HUES[color] + self.hue_shift) / 360 % 1
        return shade[..., None] * np.array(hsv_to_rgb(hue, self.saturation, 1.0))


@dataclass(frozen=True)
class Scene:
    """Attributes plus everything they leave open; see `with_attributes` for its counterparts."""

    attributes: Attributes
    radius: float
    object_surface: Surface
    background_surface: Surface
    object_motion: Motion
    background_motion: Motion
    bar_motion: Motion
    bar_width: float

    def motion(self, layer: int) -> Motion:
        """Motion of BACKGROUND, OBJECT or BAR."""
        return (self.background_motion, self.object_motion, self.bar_motion)[layer]

    def with_attributes(self, **changes) -> "Scene":
        """The same scene, moving the same way, with other attributes."""
        return replace(self, attributes=replace(self.attributes, **changes))


def sample_attributes(rng: np.random.Generator, **fixed) -> Attributes:
    """Random attributes but for those in `fixed`; object and background colours differ."""
    drawn = {name: str(rng.choice(values)) for name, values in VALUES.items()} | fixed
    if drawn["color"] == drawn["background_color"]:
        free = "color" if "background_color" in fixed else "background_color"
        if free in fixed:
            raise ValueError("the object and the background need different colours")
        taken = drawn["color"]
        drawn[free] = str(rng.choice([name for name in HUES if name != taken]))
    drawn.setdefault("barred", bool(rng.random() < 0.1))
    return Attributes(**drawn)


def sample_scene(seed: int | np.random.Generator, **fixed) -> Scene:
    """A random scene; attributes named in `fixed` have the given value."""
    rng = np.random.default_rng(seed)

    def swing(amplitude, speed) -> Wave:
        """Oscillation with a random amplitude and peak speed (units/frame) out of two ranges."""
        reach = rng.uniform(*amplitude)
        period = 2 * math.pi * reach / rng.uniform(*speed)
        return Wave(reach, period, rng.uniform(0, 2 * math.pi))

    middle = complex(EXTENT / 2, EXTENT / 2)
    return Scene(
        attributes=sample_attributes(rng, **fixed),
        radius=rng.uniform(30, 42),
        object_surface=_sample_surface(rng),
        background_surface=_sample_surface(rng),
        object_motion=Motion(
            center=middle + complex(*rng.uniform(-6, 6, 2)),
            x=swing((8, 16), (0.4, 1.4)),
            y=swing((8, 16), (0.4, 1.4)),
            log_scale=swing((0.03, 0.1), (0.001, 0.005)),
            angle=rng.uniform(0, 2 * math.pi),
            spin=math.radians(rng.uniform(-2, 2)),
        ),
        background_motion=Motion(
            center=0j, x=swing((20, 60), (0.0, 1.0)), y=swing((20, 60), (0.0, 1.0))
        ),
        bar_motion=Motion(
            center=middle,
            x=swing((50, 70), (1.0, 2.0)),
            y=STILL,
            angle=math.radians(rng.uniform(-30, 30)),
        ),
        bar_width=rng.uniform(12, 20),
    )


def pixel_centers(size: int) -> np.ndarray:
    """Frame coordinates (size, size), complex, of the pixels of a frame `size` pixels wide."""
    axis = (np.arange(size) + 0.5) * (EXTENT / size)
    return axis[None, :] + 1j * axis[:, None]


def distances(scene: Scene, time: float, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signed distances (negative inside) of frame `points` to the object and to the bar."""
    a, b = scene.object_motion.pose(time)
    outline = _outline((points - b) / a, scene.attributes.shape, scene.radius) * abs(a)
    if not scene.attributes.barred:
        return outline, np.full(points.shape, np.inf)
    a, b = scene.bar_motion.pose(time)
    return outline, np.abs(((points - b) / a).real) - scene.bar_width / 2


def top_layer(scene: Scene, time: float, points: np.ndarray) -> np.ndarray:
    """Which of BACKGROUND, OBJECT, BAR is seen at complex frame `points`."""
    object_distance, bar_distance = distances(scene, time, points)
    return np.where(bar_distance < 0, BAR, np.where(object_distance < 0, OBJECT, BACKGROUND))


def render(scene: Scene, time: float, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """The frame at `time`, uint8 RGB (size, size, 3), and the visible object's mask, bool."""
    attributes, points, pixel = scene.attributes, pixel_centers(size), EXTENT / size
    blur = 2 * pixel  # edges of textures that a bilinear lookup can reproduce
    a, b = scene.background_motion.pose(time)
    image = scene.background_surface.paint(
        (points - b) / a, attributes.background_color, attributes.background_texture, blur
    )
    a, b = scene.object_motion.pose(time)
    surface = scene.object_surface.paint(
        (points - b) / a, attributes.color, attributes.texture, blur
    )
    for color, distance in zip((surface, BAR_GREY), distances(scene, time, points), strict=True):
        coverage = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
        image = image + coverage * (color - image)
    mask = top_layer(scene, time, points) == OBJECT
    return np.round(image.clip(0, 1) * 255).astype(np.uint8), mask


def attribute_indices(attributes: Attributes) -> list[int]:
    """Index of each attribute's value in `VALUES`, in its order."""
    chosen = asdict(attributes)
    return [values.index(chosen[name]) for name, values in VALUES.items()]


def _sample_surface(rng: np.random.Generator) -> Surface:
    lengths = rng.uniform(10, 40, 4)
    directions = np.exp(1j * rng.uniform(0, 2 * math.pi, 4))
    return Surface(
        hue_shift=rng.uniform(-8, 8),
        saturation=rng.uniform(0.7, 0.9),
        brightness=rng.uniform(0.85, 0.98),
        contrast=rng.uniform(0.5, 0.62),
        angle=rng.uniform(0, 2 * math.pi),
        period=rng.uniform(24, 32),
        phase=complex(*rng.uniform(0, 100, 2)),
        grain=tuple(zip(2 * np.pi / lengths * directions, rng.uniform(0, 7, 4), strict=True)),
    )


def _outline(points: np.ndarray, shape: str, radius: float) -> np.ndarray:
    """Signed distance to the outline; the shapes of one radius have about the same size."""
    if shape == "circle":
        return np.abs(points) - radius
    if shape == "square":
        return np.maximum(np.abs(points.real), np.abs(points.imag)) - 0.85 * radius
    if shape == "triangle":
        normals = np.exp(2j * np.pi * np.arange(3) / 3)
        sides = [(points * normal.conjugate()).real for normal in normals]
        return np.maximum.reduce(sides) - 0.66 * radius
    raise ValueError(f"unknown shape {shape!r}")


def _pattern(points: np.ndarray, texture: str, period: float, blur: float) -> np.ndarray:
    """Tone in [0, 1] (dark, light) of a texture of two tones whose edges are `blur` wide."""
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
    if texture == "checkered":
        rows = np.clip(0.5 + (period / 4 - along) / blur, 0, 1)
        return stripes * rows + (1 - stripes) * (1 - rows)
    raise ValueError(f"unknown texture {texture!r}")
