"""The condition of a ControlNet: Canny edges of the source frames."""

import cv2
import numpy as np


def canny(frames: np.ndarray, low: int, high: int) -> np.ndarray:
    """Canny edges of uint8 RGB frames (n, H, W, 3) as uint8 RGB (n, H, W, 3), white on black.

    `low` and `high` are the hysteresis thresholds on the gradient, in grey levels.
    """
    edges = np.stack([cv2.Canny(frame, low, high) for frame in frames])
    return np.repeat(edges[..., None], 3, axis=-1)
