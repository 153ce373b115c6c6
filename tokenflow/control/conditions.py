"""What conditions ControlNets: images of each frame of a video, found once and kept in files."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenflow.config_control import ControlConfig
from tokenflow.control.detectors import found
from tokenflow.runtime.frame_array import FrameArray
from util import fingerprint


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


def control_identity(config: ControlConfig) -> str | None:
    """The fingerprint of control_path, if there are such frames."""
    path = Path(config.control_path) if config.control_path else None
    return fingerprint(path) if path and path.exists() else None


def find_conditions(
    config: ControlConfig,
    frames: Callable[[], Iterable[np.ndarray]],
    own: Callable[[], Iterable[np.ndarray]],
    n_frames: int,
    conditions: Conditions,
    device: torch.device,
) -> None:
    """Write what the ControlNets are given of each frame.

    frames, own: give the source's frames and those of control_path, uint8 RGB (H, W, 3), anew.
    """
    progress = (
        tqdm(seen, f"Finding {control}", n_frames, unit="frame")
        for control, seen in zip(config.control, found(config, frames, own, device), strict=True)
    )
    conditions.write(n_frames, progress)
