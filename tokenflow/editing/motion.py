"""The motion of the source: from each frame to its neighbours, in files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenflow.fusion import fused, reliability
from tokenflow.optical_flow import dis_flow
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.transfer import to_device


@dataclass(frozen=True)
class Motion:
    """The optical flow from each of N frames to those at some `offsets`, and how reliable it is.

    `flow.npy`: (N, k, H, W, 2), float16, in pixels. `reliability.npy`: (N, k, H, W), uint8; 255 is 1. An
    offset that leads out of the video has reliability 0.
    """

    folder: Path
    offsets: tuple[int, ...]
    n_frames: int

    @classmethod
    def within(cls, distances: Sequence[int], folder: Path, n_frames: int) -> "Motion":
        """The motion to frames at these distances, backward and forward."""
        offsets = tuple(sign * d for d in distances for sign in (-1, 1))
        return cls(folder, offsets, n_frames)

    def compute(self, source: Callable[[int], np.ndarray], processes: Processes) -> None:
        """Find the flow by DIS; processes divide the frames.

        source: maps a frame's index to the source's frame, uint8 RGB (H, W, 3).
        """
        source = lru_cache(2 * max(self.offsets) + 1)(source)
        size, flow = source(0).shape[:2], dis_flow()
        if processes.is_main:
            rows = self.n_frames, len(self.offsets), *size
            FrameArray.create(self._flow.path, (*rows, 2), torch.float16)
            FrameArray.create(self._reliability.path, rows, torch.uint8)
        processes.wait()
        frames = processes.share(range(self.n_frames))
        shown = {"unit": "frame", "disable": not processes.is_main}
        for frame in tqdm(frames, "Finding motion", **shown):
            flows = np.zeros((len(self.offsets), *size, 2), np.float32)
            for column, other in self._neighbours(frame):
                flows[column] = flow(source(frame), source(other))
            self._flow[torch.tensor([frame])] = torch.from_numpy(flows)[None]
        processes.wait()  # the way back may be in another process's frames
        for frame in tqdm(frames, "Checking motion", **shown):
            reliable = np.zeros((len(self.offsets), *size), np.float32)
            for column, other in self._neighbours(frame):
                back = self.offsets.index(frame - other)
                there, back = (
                    self._flow[torch.tensor([start])][0, column].float().numpy()
                    for start, column in ((frame, column), (other, back))
                )
                reliable[column] = reliability(source(frame), source(other), there, back)
            rounded = torch.from_numpy(255 * reliable).round()
            self._reliability[torch.tensor([frame])] = rounded[None]
        processes.wait()

    def fused(self, pictures: FrameArray, frame: int, device: torch.device) -> torch.Tensor:
        """A frame of the `pictures` (N, H, W, 3), uint8, averaged with its neighbours: (H, W, 3), uint8."""
        columns, others = zip(*self._neighbours(frame), strict=True)
        columns, at = list(columns), torch.tensor([frame])
        stack = to_device(pictures[torch.tensor([frame, *others])], device)
        stack = stack.permute(0, 3, 1, 2).float()
        flows = to_device(self._flow[at][0, columns], device).float()
        weights = to_device(self._reliability[at][0, columns], device).float() / 255
        mean = fused(stack[0], stack[1:], flows, weights)
        return mean.round().byte().permute(1, 2, 0).cpu()

    def _neighbours(self, frame: int) -> list[tuple[int, int]]:
        """The columns of the offsets that lead to a frame of the video, and that frame."""
        others = ((column, frame + offset) for column, offset in enumerate(self.offsets))
        return [(column, other) for column, other in others if 0 <= other < self.n_frames]

    @property
    def _flow(self) -> FrameArray:
        return FrameArray(self.folder / "flow.npy")

    @property
    def _reliability(self) -> FrameArray:
        return FrameArray(self.folder / "reliability.npy")
