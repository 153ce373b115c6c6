"""What conditions a ControlNet: the Canny edges of frames."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch


@dataclass(frozen=True)
class Control:
    """What conditions a ControlNet: images (n, 3, H, W) in [0, 1] and a factor (n,) on its residuals."""

    images: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, images: torch.Tensor, scale: float) -> "Control":
        """The condition of images (n, 3, H, W) that share one factor."""
        return cls(images, torch.full((len(images),), scale))

    @classmethod
    def cat(cls, controls: Sequence["Control"]) -> "Control":
        """The conditions of several batches as those of one."""
        images, scales = zip(*((c.images, c.scale) for c in controls), strict=True)
        return cls(torch.cat(images), torch.cat(scales))


def canny(frames: np.ndarray, low: int, high: int) -> np.ndarray:
    """Canny edges of uint8 RGB frames (n, H, W, 3) as uint8 RGB (n, H, W, 3), white on black.

    `low` and `high` are the hysteresis thresholds on the gradient, in grey levels.
    """
    edges = np.stack([cv2.Canny(frame, low, high) for frame in frames])
    return np.repeat(edges[..., None], 3, axis=-1)
