"""Exact optical flow of rendered scenes: at each pixel, the motion of the layer seen there."""

import numpy as np

from shapes.world import BACKGROUND, BAR, EXTENT, OBJECT, Scene, pixel_centers, top_layer


def flow(scene: Scene, i: float, j: float, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels of frame i are in frame j: flow and validity, both of frame i's size.

    Returns float32 (size, size, 2), the displacement (dx, dy) in pixels, and a bool mask of the
    pixels that are seen in frame j too: inside it, and not hidden by another layer.
    """
    points = pixel_centers(size)
    layers = top_layer(scene, i, points)
    moved = np.empty_like(points)
    for layer in (BACKGROUND, OBJECT, BAR):
        (a_i, b_i), (a_j, b_j) = (scene.motion(layer).pose(time) for time in (i, j))
        here = layers == layer
        moved[here] = (points[here] - b_i) / a_i * a_j + b_j
    displacement = (moved - points) * (size / EXTENT)
    # Inside means between the centres of the border pixels, where interpolation has neighbours.
    border = EXTENT / size / 2
    inside = [(axis >= border) & (axis <= EXTENT - border) for axis in (moved.real, moved.imag)]
    valid = inside[0] & inside[1] & (top_layer(scene, j, moved) == layers)
    return np.stack([displacement.real, displacement.imag], -1).astype(np.float32), valid
