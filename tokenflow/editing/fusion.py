"""Frames of an edit averaged with their neighbours along the motion of the source, through files."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenflow.motion import agreement, fused, reliability, warped
from tokenflow.optical_flow import dis_flow
from tokenflow.runtime.ahead import in_parallel
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.transfer import to_device

# Grey levels: flicker is less, and a neighbour in which the edit has not followed the source differs more.
FLICKER = 25.0


@dataclass(frozen=True)
class Fusion:
    """Averages each of N pictures with those at some `offsets`, which are numbers of frames.

    `flow.npy`: (N, k, H, W, 2), float16, the source's optical flow in pixels. `reliability.npy`:
    (N, k, H, W), uint8; 255 is 1. `pictures.npy`: (N, H, W, 3), uint8 RGB, what is to be averaged. An offset
    that leads out of the video has reliability 0. Processes divide the frames.
    """

    folder: Path
    offsets: tuple[int, ...]
    n_frames: int
    processes: Processes

    @classmethod
    def along(
        cls,
        source: Callable[[int], np.ndarray],
        n_frames: int,
        distances: Iterable[int],
        folder: Path,
        processes: Processes,
    ) -> "Fusion":
        """Find the motion of the source to the frames at these distances, before and after each.

        source: maps a frame's index to the source's frame, uint8 RGB (H, W, 3).
        """
        offsets = tuple(sign * distance for distance in distances for sign in (-1, 1))
        fusion = cls(folder, offsets, n_frames, processes)
        source = lru_cache(2 * max(offsets) + 1)(source)
        fusion._create_files(source(0).shape)
        fusion._find_motion(source)
        return fusion

    def put(self, frames: torch.Tensor, pictures: np.ndarray) -> None:
        """Take the pictures (n, H, W, 3), uint8 RGB, of the frames (n,)."""
        self.pictures[frames] = torch.from_numpy(pictures)

    def fused(
        self, frames: torch.Tensor, device: torch.device, tolerance: float | None = None
    ) -> np.ndarray:
        """The averages (n, H, W, 3), uint8 RGB, for the frames (n,), computed on a device.

        tolerance: in grey levels; a neighbour counts the less the more it differs. None: it counts anyway.
        """
        return np.stack([self._fused(frame, device, tolerance) for frame in frames.tolist()])

    @property
    def pictures(self) -> FrameArray:
        """What is to be averaged: (N, H, W, 3), uint8 RGB."""
        return FrameArray(self.folder / "pictures.npy")

    def _fused(self, frame: int, device: torch.device, tolerance: float | None) -> np.ndarray:
        neighbours, at = self._neighbours(frame), torch.tensor([frame])
        if not neighbours:  # in a very short video
            return self.pictures[at][0].numpy()
        columns, others = (list(part) for part in zip(*neighbours, strict=True))
        pictures = self.pictures[torch.tensor([frame, *others])]
        pictures = to_device(pictures, device).permute(0, 3, 1, 2).float()
        flows = to_device(self._flow[at][0, columns], device).float()
        weights = to_device(self._reliability[at][0, columns], device).float() / 255
        moved = warped(pictures[1:], flows)
        if tolerance:
            weights = weights * agreement(pictures[0], moved, tolerance)
        mean = fused(pictures[0], moved, weights)
        return mean.round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()

    def _create_files(self, shape: tuple[int, int, int]) -> None:
        if self.processes.is_main:
            rows = self.n_frames, len(self.offsets), *shape[:2]
            FrameArray.create(self._flow.path, (*rows, 2), torch.float16)
            FrameArray.create(self._reliability.path, rows, torch.uint8)
            FrameArray.create(self.pictures.path, (self.n_frames, *shape), torch.uint8)
        self.processes.wait()

    def _find_motion(self, source: Callable[[int], np.ndarray]) -> None:
        def find(frame: int) -> None:
            row = torch.zeros(self._flow.shape[1:])
            flow = dis_flow()  # which holds buffers, so that threads cannot share one
            for column, other in self._neighbours(frame):
                row[column] = torch.from_numpy(flow(source(frame), source(other)))
            self._flow[torch.tensor([frame])] = row[None]

        def check(frame: int) -> None:
            row = torch.zeros(self._reliability.shape[1:])
            there = self._flow[torch.tensor([frame])][0]
            for column, other in self._neighbours(frame):
                back = self._flow[torch.tensor([other])][0, self.offsets.index(frame - other)]
                ways = (way.float().numpy() for way in (there[column], back))
                row[column] = torch.from_numpy(reliability(source(frame), source(other), *ways))
            self._reliability[torch.tensor([frame])] = (255 * row).round()[None]

        frames, hidden = self.processes.share(range(self.n_frames)), not self.processes.is_main
        for work, name in ((find, "Finding motion"), (check, "Checking motion")):
            each = in_parallel(work, frames)
            for _ in tqdm(each, name, len(frames), unit="frame", disable=hidden):
                pass
            self.processes.wait()  # the way back may be in another process's frames

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
