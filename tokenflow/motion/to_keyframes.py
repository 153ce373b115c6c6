"""The source's optical flow between frames and their keyframes, found when an edit first needs it, and kept.

Keyframes change at each step, so that over many steps an edit needs the flow between nearly all frames that
are less than two intervals apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from tokenflow.motion.optical_flow import both_ways, dis_flow
from tokenflow.motion.pairs import FRAMES_HELD, KeptPairs

# Maps two frames to the flows (H, W, 2) between them, there and back, in pixels; NaN where they fail.
Between = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class SourceMotion:
    """The flow between the N frames of a video, taken at the centre of each cell of their latents.

    pairs: (2, h, w, 2) for each pair: the flow there and back, in pixels; NaN where it fails. cell: the side
    of a cell in pixels. max_displacement: the length in pixels beyond which the flow fails.
    """

    pairs: KeptPairs
    between: Between
    cell: int
    max_displacement: float

    def __call__(self, frames: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The flow from frames (n,) to others (n, k), in cells; NaN where it fails: (n, k, h, w, 2)."""
        flows = [
            self._flow(frame, other)
            for frame, of_frame in zip(frames.tolist(), others.tolist(), strict=True)
            for other in of_frame
        ]
        flows = torch.stack(flows).float().unflatten(0, others.shape)
        too_far = flows.norm(dim=-1, keepdim=True) > self.max_displacement
        return flows.masked_fill(too_far, torch.nan) / self.cell

    def _flow(self, frame: int, other: int) -> torch.Tensor:
        """The flow (h, w, 2) from one frame to another, in pixels."""
        if frame == other:
            return torch.zeros(self.pairs.shape[1:], dtype=torch.float16)
        there, back = self.pairs.get(*sorted((frame, other)), self._at_centres)
        return there if frame < other else back

    def _at_centres(self, first: int, later: int) -> np.ndarray:
        """The flows (2, h, w, 2) between two frames, there and back, in pixels."""
        middle = np.s_[self.cell // 2 :: self.cell]
        return np.stack([flow[middle, middle] for flow in self.between(first, later)])


def furthest_keyframe(interval: int, n_frames: int) -> int:
    """How far apart a frame and a keyframe that it blends can be, with one keyframe in each `interval`."""
    return min(2 * interval, n_frames) - 1


def dis_between(source: Callable[[int], np.ndarray]) -> Between:
    """The flow by dense inverse search; `source` maps a frame's index to the frame, uint8 RGB (H, W, 3)."""
    source, flow = lru_cache(FRAMES_HELD)(source), dis_flow()
    return lambda first, later: both_ways(flow, source(first), source(later))
