"""Moving scenes: an object over a background, both textured or plain, at times behind a black bar.

A scene is a stack of layers (background, object, bar). Each layer has coordinates of its own, in
which its outline and texture stand still, and a similarity transform that carries them into the
frame at a time. Points are complex numbers x + iy (x to the right, y down), so that a similarity
transform is p -> a * p + b. Lengths are in world units: a frame is 128 of them wide and high,
whatever its size in pixels. Times are in frames and need not be whole.
"""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from shapes.layers import COLORS, STILL, TEXTURES, Motion, Surface, Wave, outline

EXTENT = 128.0
VALUES = {
    "shape": ("circle", "square", "triangle"),
    "color": COLORS,
    "texture": TEXTURES,
    "background_color": COLORS,
    "background_texture": TEXTURES,
}
BACKGROUND, OBJECT, BAR = range(3)
BAR_TONE = 0.05  # black: darker than the dark tone of every texture


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
        return text + " behind a black bar" if self.barred else text


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
        drawn[free] = str(rng.choice([name for name in COLORS if name != taken]))
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
    object_distance = outline((points - b) / a, scene.attributes.shape, scene.radius) * abs(a)
    if not scene.attributes.barred:
        return object_distance, np.full(points.shape, np.inf)
    a, b = scene.bar_motion.pose(time)
    return object_distance, np.abs(((points - b) / a).real) - scene.bar_width / 2


def find_top_layer(scene: Scene, time: float, points: np.ndarray) -> np.ndarray:
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
    for color, distance in zip((surface, BAR_TONE), distances(scene, time, points), strict=True):
        coverage = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
        image = image + coverage * (color - image)
    mask = find_top_layer(scene, time, points) == OBJECT
    return np.round(image.clip(0, 1) * 255).astype(np.uint8), mask


def find_flow(scene: Scene, i: float, j: float, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels of frame i are in frame j: flow and validity, both of frame i's size.

    Returns float32 (size, size, 2), the displacement (dx, dy) in pixels, and a bool mask of the
    pixels that are seen in frame j too: inside it, and not hidden by another layer.
    """
    points = pixel_centers(size)
    layers = find_top_layer(scene, i, points)
    moved = np.empty_like(points)
    for layer in (BACKGROUND, OBJECT, BAR):
        (a_i, b_i), (a_j, b_j) = (scene.motion(layer).pose(time) for time in (i, j))
        here = layers == layer
        moved[here] = (points[here] - b_i) / a_i * a_j + b_j
    displacement = (moved - points) * (size / EXTENT)
    # Inside means between the centres of the border pixels, where interpolation has neighbours.
    border = EXTENT / size / 2
    inside = [(axis >= border) & (axis <= EXTENT - border) for axis in (moved.real, moved.imag)]
    valid = inside[0] & inside[1] & (find_top_layer(scene, j, moved) == layers)
    return np.stack([displacement.real, displacement.imag], -1).astype(np.float32), valid


def index_attributes(attributes: Attributes) -> list[int]:
    """Index of each attribute's value in `VALUES`, in its order."""
    chosen = asdict(attributes)
    return [values.index(chosen[name]) for name, values in VALUES.items()]


def _sample_surface(rng: np.random.Generator) -> Surface:
    def waves(shortest: float, longest: float, number: int) -> tuple[tuple[complex, float], ...]:
        """Wave vectors and phases of `number` waves of random directions and lengths (units)."""
        lengths = rng.uniform(shortest, longest, number)
        directions = np.exp(1j * rng.uniform(0, 2 * math.pi, number))
        phases = rng.uniform(0, 2 * math.pi, number)
        return tuple(zip(2 * np.pi / lengths * directions, phases, strict=True))

    return Surface(
        hue_shift=rng.uniform(-8, 8),
        saturation=rng.uniform(0.7, 0.9),
        brightness=rng.uniform(0.85, 0.98),
        contrast=rng.uniform(0.5, 0.62),
        angle=rng.uniform(0, 2 * math.pi),
        period=rng.uniform(24, 32),
        phase=complex(*rng.uniform(0, 100, 2)),
        grain=waves(10, 40, 4),
        shading=waves(100, 200, 2),
    )
