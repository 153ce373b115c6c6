"""Which frames of a video are used, and at which size."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokenflow.config_control import ControlConfig
from tokenflow.errors import UserError
from tokenflow.video.read import decode_frames
from util import fit_frame, save_frames


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


def check_control_frames(config: ControlConfig, choice: FrameChoice, n_frames: int) -> None:
    """Raise UserError if frames of control_path are missing."""
    if config.control_path is None:
        return
    if not (path := Path(config.control_path)).exists():
        raise UserError(f"control_path: {path}: no such file or folder")
    choice.check_length("control_path", path, n_frames, choice.count(path, n_frames))
