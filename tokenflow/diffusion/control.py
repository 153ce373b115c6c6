"""What conditions a ControlNet: the Canny edges of a video's frames, found once and kept as a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from tokenflow.runtime.frame_array import FrameArray
from util import load_frames


@dataclass(frozen=True)
class Control:
    """What conditions a ControlNet: images (n, 3, H, W) in [0, 1] and a factor (n,) on its residuals."""

    images: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, images: torch.Tensor, scale: float) -> "Control":
        """The condition of images (n, 3, H, W) with one factor for all."""
        return cls(images, torch.full((len(images),), scale))

    @classmethod
    def cat(cls, controls: Sequence["Control"]) -> "Control":
        """Concatenate the conditions of several batches."""
        images, scales = zip(*((c.images, c.scale) for c in controls), strict=True)
        return cls(torch.cat(images), torch.cat(scales))


def canny(frames: np.ndarray, low: int, high: int) -> np.ndarray:
    """Canny edges of uint8 RGB frames (n, H, W, 3) as uint8 RGB (n, H, W, 3), white on black.

    `low` and `high` are the hysteresis thresholds on the gradient, in grey levels.
    """
    edges = np.stack([cv2.Canny(frame, low, high) for frame in frames])
    return np.repeat(edges[..., None], 3, axis=-1)


class CannyEdges:
    """The Canny edges of a video's frames in one `.npy` file, uint8 (N, H, W)."""

    def __init__(self, path: Path) -> None:
        self.rows = FrameArray(path)

    def compute(self, folder: Path, n_frames: int, low: int, high: int) -> None:
        """Find the edges of the first `n_frames` frames in `folder`, one frame at a time."""
        for index in range(n_frames):
            edges = canny(load_frames(folder, [index]), low, high)[..., 0]
            if index == 0:
                FrameArray.create(self.rows.path, (n_frames, *edges.shape[1:]), torch.uint8)
            self.rows[torch.tensor([index])] = torch.from_numpy(edges)

    def __getitem__(self, frames: torch.Tensor) -> np.ndarray:
        """The edges of the frames (n,), as `canny` gives them: (n, H, W, 3)."""
        return np.repeat(self.rows[frames].numpy()[..., None], 3, axis=-1)
