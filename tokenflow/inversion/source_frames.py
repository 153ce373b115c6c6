"""The frames of a video that are inverted, and what is seen in them: conditions of ControlNets, and depth."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenflow.config_control import ControlConfig
from tokenflow.diffusion.control import Conditions
from tokenflow.diffusion.depth import DepthModel, depth_picture
from tokenflow.diffusion.detectors import check_detectors, found
from tokenflow.errors import UserError
from tokenflow.runtime.frame_array import FrameArray
from util import (
    decode_frames,
    fingerprint,
    fit_frame,
    load_frames,
    save_frames,
    write_video,
)

DEPTH_VIDEO = "depth.mp4"


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video are used, and the size in pixels that they are fitted to."""

    H: int
    W: int
    resize: str
    start_frame: int
    stride: int

    @classmethod
    def of(cls, config: dict) -> "FrameChoice":
        """The choice in the configuration of an inversion."""
        return cls(**{key: config[key] for key in cls.__dataclass_fields__})

    def frames(self, video: Path, n_frames: int) -> Iterator[np.ndarray]:
        """The first `n_frames` frames (0: all) that are used of a video, uint8 RGB, one by one."""
        stop = self.start_frame + n_frames * self.stride if n_frames else None
        return itertools.islice(decode_frames(video), self.start_frame, stop, self.stride)

    def fitted(self, video: Path, n_frames: int) -> Iterator[np.ndarray]:
        """The same frames, fitted to the chosen size (H, W, 3)."""
        for frame in self.frames(video, n_frames):
            yield fit_frame(frame, self.H, self.W, self.resize)

    def count(self, video: Path, n_frames: int = 0) -> int:
        """How many of the first `n_frames` frames (0: all) there are."""
        return sum(1 for _ in self.frames(video, n_frames))

    def check_length(self, option: str, video: Path, n_frames: int, count: int) -> None:
        """Raise UserError if of a video, which an option names, there are fewer than `n_frames` frames."""
        if count < n_frames:
            raise UserError(
                f"{option}: {video} has {count} frames for {n_frames} of the source, from start_frame "
                f"{self.start_frame} with stride {self.stride}; it needs one for each frame of the "
                "whole source"
            )

    def write(self, video: Path, folder: Path, n_frames: int) -> None:
        """Write the first `n_frames` frames as PNG into `folder`. Raises UserError if there are fewer."""
        folder.mkdir(exist_ok=True)
        frames = tqdm(self.fitted(video, n_frames), "Reading", n_frames, unit="frame")
        count = save_frames(folder, 0, frames)
        used = f"{video} from start_frame {self.start_frame} with stride {self.stride}"
        if count == 0:
            raise UserError(f"start_frame: there are no frames in {used}")
        if count < n_frames:
            raise UserError(
                f"n_frames: {n_frames} were asked for, but there are only {count} frames in {used}; "
                f"use --n_frames {count}, or 0 for all"
            )


def written_frames(folder: Path, n_frames: int) -> Iterator[np.ndarray]:
    """The first `n_frames` frames in a folder of frames, uint8 RGB (H, W, 3), one by one."""
    return (load_frames(folder, [index])[0] for index in range(n_frames))


def check_conditions(config: ControlConfig, choice: FrameChoice, n_frames: int) -> None:
    """Raise UserError if a detector's package or frames of control_path are missing."""
    check_detectors(config)
    if config.control_path is None:
        return
    if not (path := Path(config.control_path)).exists():
        raise UserError(f"control_path: {path}: no such file or folder")
    choice.check_length("control_path", path, n_frames, choice.count(path, n_frames))


def control_identity(config: ControlConfig) -> str | None:
    """The fingerprint of control_path, if there are such frames."""
    path = Path(config.control_path) if config.control_path else None
    return fingerprint(path) if path and path.exists() else None


def find_conditions(
    config: ControlConfig,
    choice: FrameChoice,
    folder: Path,
    n_frames: int,
    conditions: Conditions,
    device: torch.device,
) -> None:
    """Write what the ControlNets are given of the first `n_frames` frames in `folder`."""
    frames = partial(written_frames, folder, n_frames)
    own = partial(choice.fitted, Path(config.control_path or ""), n_frames)
    progress = (
        tqdm(seen, f"Finding {control}", n_frames, unit="frame")
        for control, seen in zip(config.control, found(config, frames, own, device), strict=True)
    )
    conditions.write(n_frames, progress)


def find_depth(model: DepthModel, folder: Path, depth: FrameArray) -> None:
    """Write the depth of the frames in `folder` to `depth`, whose shape is (N, 1, h, w)."""
    n_frames, _, height, width = depth.shape
    seen: Iterable = model.of_video(partial(written_frames, folder, n_frames), height, width)
    for index, of_frame in enumerate(tqdm(seen, "Finding depth", n_frames, unit="frame")):
        depth[torch.tensor([index])] = torch.from_numpy(of_frame)[None, None]


def write_depth_video(
    path: Path, depth: FrameArray, n_frames: int, size: tuple[int, int], fps: Fraction
) -> None:
    """Show the depth of the first `n_frames` frames, enlarged to a size (H, W) in pixels, as a video."""
    rows = (depth[torch.tensor([index])][0, 0].numpy() for index in range(n_frames))
    write_video(path, (depth_picture(row, *size) for row in rows), fps)
