"""The source's optical flow between frames and their keyframes, found when an edit first needs it, and kept.

Keyframes change at each step, so that over many steps an edit needs the flow between nearly all frames that
are less than two intervals apart.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tokenflow.motion.optical_flow import DenseInverseSearch, find_consistent
from tokenflow.motion.pairs import KeptPairs


@dataclass(frozen=True)
class FlowToKeyframes(KeptPairs):
    """The flow between the frames of a video, taken at the centre of each cell of their latents.

    What is kept, (h, w, 2), is in pixels, and NaN where the flow fails.
    cell: the side of a cell in pixels. max_displacement: the length in pixels beyond which the flow fails.
    """

    cell: int
    max_displacement: float

    def measure(self, frame: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The flow between two frames, uint8 RGB (H, W, 3), at the centres of the cells: (2, h, w, 2)."""
        flow, middle = DenseInverseSearch(), np.s_[self.cell // 2 :: self.cell]
        there, back = flow.find(frame, other), flow.find(other, frame)
        ways = (there, find_consistent(there, back)), (back, find_consistent(back, there))
        flows = [np.where(valid[..., None], way, np.nan) for way, valid in ways]
        return np.stack([way[middle, middle] for way in flows])

    def find_between(self, frames: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The flow from frames (n,) to others (n, k), in cells; NaN where it fails: (n, k, h, w, 2)."""
        still = torch.zeros(self.shape, dtype=torch.float16)
        flows = [
            still if frame == other else self.find(frame, other)
            for frame, of_frame in zip(frames.tolist(), others.tolist(), strict=True)
            for other in of_frame
        ]
        flows = torch.stack(flows).float().unflatten(0, others.shape)
        too_far = flows.norm(dim=-1, keepdim=True) > self.max_displacement
        return flows.masked_fill(too_far, torch.nan) / self.cell


def find_furthest_keyframe(interval: int, n_frames: int) -> int:
    """How far apart a frame and a keyframe that it blends can be, with one keyframe in each `interval`."""
    return min(2 * interval, n_frames) - 1
