"""What conditions ControlNets: images of each frame of a video, found once and kept in files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokenflow.runtime.frame_array import FrameArray


@dataclass(frozen=True)
class Control:
    """What conditions m ControlNets: images (m, n, 3, H, W) in [0, 1] and factors (m, n)."""

    images: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, images: torch.Tensor, scales: Sequence[float]) -> "Control":
        """The condition of images (m, n, 3, H, W) with one factor for each ControlNet."""
        return cls(images, torch.tensor(scales)[:, None].repeat(1, images.shape[1]))

    @classmethod
    def cat(cls, controls: Sequence["Control"]) -> "Control":
        """Concatenate the conditions of several batches."""
        images, scales = zip(*((c.images, c.scales) for c in controls), strict=True)
        return cls(torch.cat(images, dim=1), torch.cat(scales, dim=1))


class Conditions:
    """What m ControlNets are given of each frame: files `condition_<i>.npy`, uint8 RGB (N, H, W, 3)."""

    def __init__(self, folder: Path, count: int) -> None:
        self.files = [FrameArray(folder / f"condition_{index}.npy") for index in range(count)]

    def write(self, n_frames: int, found: Sequence[Iterable[np.ndarray]]) -> None:
        """Write what was `found` of each frame, uint8 RGB (H, W, 3), for each ControlNet."""
        for file, frames in zip(self.files, found, strict=True):
            for index, frame in enumerate(frames):
                if index == 0:
                    FrameArray.create(file.path, (n_frames, *frame.shape), torch.uint8)
                file[torch.tensor([index])] = torch.from_numpy(frame)[None]

    def __getitem__(self, frames: torch.Tensor) -> np.ndarray:
        """The conditions (m, n, H, W, 3) of the frames (n,)."""
        return np.stack([file[frames].numpy() for file in self.files])
