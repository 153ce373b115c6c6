"""Control images: what ControlNets are given of each frame of a video, found once and kept in files."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenflow.config import ControlNetConfig, PreprocessConfig
from tokenflow.config_control import ControlConfig
from tokenflow.control.detectors import Frames, detect
from tokenflow.diffusion.parts import Repository
from tokenflow.runtime.frame_array import FrameArray
from util import digest_content


class ControlImages:
    """The control images of m ControlNets: files `condition_<i>.npy` in a folder, uint8 RGB (N, H, W, 3)."""

    def __init__(self, folder: Path, count: int) -> None:
        self.files = [FrameArray(folder / f"condition_{index}.npy") for index in range(count)]

    def find(
        self,
        config: ControlConfig,
        frames: Callable[[], Frames],
        own: Callable[[], Frames],
        n_frames: int,
        device: torch.device,
    ) -> None:
        """Find them in a video and write them, frame by frame.

        frames, own: give the source's frames and those of control_path, uint8 RGB (H, W, 3), anew.
        """
        found = detect(config, frames, own, device)
        for file, control, images in zip(self.files, config.control, found, strict=True):
            progress = tqdm(images, f"Finding {control}", n_frames, unit="frame")
            for index, image in enumerate(progress):
                if index == 0:
                    FrameArray.create(file.path, (n_frames, *image.shape), torch.uint8)
                file[torch.tensor([index])] = torch.from_numpy(image)[None]

    def __getitem__(self, frames: torch.Tensor) -> np.ndarray:
        """The control images (m, n, H, W, 3) of the frames (n,)."""
        return np.stack([file[frames].numpy() for file in self.files])

    def show(self, n_frames: int) -> Iterable[np.ndarray]:
        """The control images of each frame side by side, uint8 RGB (H, m W, 3)."""
        each = (self[torch.tensor([index])] for index in range(n_frames))
        return (np.concatenate(images[:, 0], axis=1) for images in each)


def control_identity(config: ControlConfig) -> str | None:
    """The digest of control_path, if there are such frames."""
    path = Path(config.control_path) if config.control_path else None
    return digest_content(path) if path and path.exists() else None


def identify_networks(config: PreprocessConfig | ControlNetConfig) -> list[str]:
    """What tells the ControlNets from others, and the depth model if one is named."""
    networks = [Repository(name).identify() for name in config.controlnet_ids]
    if depth := config.depth_model:  # a hub id as it is, since nothing has been downloaded yet
        networks.append(Repository(depth).identify() if Path(depth).is_dir() else depth)
    return networks
