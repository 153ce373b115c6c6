"""Frames of an edit averaged with their neighbours along the motion of the source, through files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokenflow.motion.averaging import average, find_agreement, warp
from tokenflow.motion.dense import DenseMotion
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.transfer import to_device

# Grey levels: flicker is less, and a neighbour in which the edit has not followed the source differs more.
FLICKER = 25.0


@dataclass(frozen=True)
class Fusion:
    """Averages each of N pictures with those at some `distances` before and after it.

    path: of a file (N, H, W, 3), uint8 RGB, of what is to be averaged. Processes divide the frames.
    """

    motion: DenseMotion
    distances: Sequence[int]
    path: Path
    processes: Processes

    def begin(self, also: Iterable[int] = ()) -> None:
        """Find the motion between frames so far apart, and `also` between others; make room for pictures."""
        self.motion.find_all(sorted({*self.distances, *also}), self.processes)
        if self.processes.is_main:
            size = self.motion.shape[:2]
            FrameArray.create(self.path, (self.motion.n_used, *size, 3), torch.uint8)
        self.processes.wait()

    def put(self, frames: torch.Tensor, pictures: np.ndarray) -> None:
        """Take the pictures (n, H, W, 3), uint8 RGB, of the frames (n,)."""
        FrameArray(self.path)[frames] = torch.from_numpy(pictures)

    def read(self, frames: torch.Tensor) -> np.ndarray:
        """The pictures (n, H, W, 3), uint8 RGB, of the frames (n,)."""
        return FrameArray(self.path)[frames].numpy()

    def average(
        self, frames: torch.Tensor, device: torch.device, tolerance: float | None = None
    ) -> np.ndarray:
        """The averages (n, H, W, 3), uint8 RGB, for the frames (n,), computed on a device.

        tolerance: in grey levels; a neighbour counts the less the more it differs. None: it counts anyway.
        """
        return np.stack([self._average(frame, device, tolerance) for frame in frames.tolist()])

    def _average(self, frame: int, device: torch.device, tolerance: float | None) -> np.ndarray:
        offsets = (sign * distance for distance in self.distances for sign in (-1, 1))
        others = [o for o in (frame + offset for offset in offsets) if 0 <= o < self.motion.n_used]
        pictures = torch.from_numpy(self.read(torch.tensor([frame, *others])))
        pictures = to_device(pictures, device)
        if not others:  # in a very short video
            return pictures[0].cpu().numpy()
        pictures = pictures.permute(0, 3, 1, 2).float()
        motion = torch.stack([self.motion.read(frame, other) for other in others])
        motion = to_device(motion, device).float()
        flows, weights = motion[..., :2], motion[..., 2]
        moved = warp(pictures[1:], flows)
        if tolerance:
            weights = weights * find_agreement(pictures[0], moved, tolerance)
        mean = average(pictures[0], moved, weights)
        return mean.round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
