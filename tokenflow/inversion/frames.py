"""Which frames of a video are used, at which size, and how fast they play."""

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from tokenflow.config import PreprocessConfig
from tokenflow.config_control import ControlConfig
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.errors import UserError
from tokenflow.video.read import decode_frames, mean_rate, read_times
from tokenflow.video.sound import keep_sound
from util import BLACK, WHITE, fit_frame, save_frames

T = TypeVar("T")
log = logging.getLogger("tokenflow")

SAME_SPEED = Fraction(1, 50)  # as which another frame rate counts, as nobody hears the difference


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video are used, the size in pixels that they are fitted to, and their rate."""

    H: int
    W: int
    resize: str
    start_frame: int
    stride: int
    fps: float | None = None  # of the whole video; None: as its time stamps say

    @classmethod
    def of(cls, config: dict) -> "FrameChoice":
        """The choice in the configuration of an inversion."""
        return cls(**{key: config[key] for key in cls.__dataclass_fields__})

    def fitted(self, video: Path, n_frames: int, background: int = BLACK) -> Iterator[np.ndarray]:
        """The first `n_frames` frames (0: all) that are used of a video, uint8 RGB (H, W, 3), one by one.

        background: the grey that is seen where they are transparent; black leaves masks and control images
        as if nothing were there.
        """
        for frame in self._choose(decode_frames(video, background), n_frames):
            yield fit_frame(frame, self.H, self.W, self.resize)

    def times(self, video: Path, n_frames: int) -> list[Fraction]:
        """When the same frames are shown, in seconds; as many as there are."""
        fps = self.fps and Fraction(str(self.fps))
        return list(self._choose(read_times(video, fps), n_frames))

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
        frames = tqdm(self.fitted(video, n_frames, WHITE), "Reading", n_frames, unit="frame")
        count = save_frames(folder, 0, frames)
        used = f"{video} from start_frame {self.start_frame} with stride {self.stride}"
        if count == 0:
            raise UserError(f"start_frame: there are no frames in {used}")
        if count < n_frames:
            raise UserError(
                f"n_frames: {n_frames} were asked for, but there are only {count} frames in {used}; "
                f"use --n_frames {count}, or 0 for all"
            )

    def write_sound(self, video: Path, path: Path, n_frames: int, fps: Fraction) -> None:
        """Write what is heard during these frames, unless `fps` plays them faster or slower."""
        stamped = replace(self, fps=None)
        (start,) = stamped.times(video, 1)
        keep_sound(video, path, start, n_frames / fps)
        if self.fps and path.exists():
            rate = mean_rate(stamped.times(video, n_frames))
            if abs(rate / fps - 1) > SAME_SPEED:
                log.info("fps: the sound is left out, because the video plays at another speed")
                path.unlink()

    def _choose(self, frames: Iterator[T], n_frames: int) -> Iterator[T]:
        stop = self.start_frame + n_frames * self.stride if n_frames else None
        return itertools.islice(frames, self.start_frame, stop, self.stride)


def choose_size(config: PreprocessConfig, checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width in pixels of the frames to invert, of which auto keeps the source's aspect ratio.

    Raises UserError for a size that the networks do not take.
    """
    height, width = config.H, config.W
    if None in (height, width):
        shown_height, shown_width = next(decode_frames(Path(config.data_path))).shape[:2]
        ratio = shown_height / shown_width
        if height:
            width = checkpoint.nearest_size(height / ratio)
        elif width:
            height = checkpoint.nearest_size(width * ratio)
        else:  # as many pixels as the frames of the training have
            height = checkpoint.nearest_size(checkpoint.trained_side * math.sqrt(ratio))
            width = checkpoint.nearest_size(checkpoint.trained_side / math.sqrt(ratio))
        log.info(f"frames of {shown_width}x{shown_height} pixels become {width}x{height}")
    height, width = height or checkpoint.trained_side, width or checkpoint.trained_side
    checkpoint.check_size(height, width)
    return height, width


def find_frame_rate(video: Path, times: list[Fraction]) -> Fraction:
    """Frames per second of frames of a video that are shown at these times, all equally long.

    Says so if that changes how fast things move.
    """
    rate = mean_rate(times)
    gaps = [float(after - before) for before, after in itertools.pairwise(times)]
    if gaps and max(gaps) > 2 * min(gaps):
        log.info(
            f"{video}: its frame rate varies, frames are {min(gaps):.3g} to {max(gaps):.3g} s apart; all are "
            f"played at the mean of {float(rate):.4g} per second (--fps: another rate)"
        )
    return rate


def check_control_frames(config: ControlConfig, choice: FrameChoice, n_frames: int) -> None:
    """Raise UserError if frames of control_path are missing."""
    if config.control_path is None:
        return
    if not (path := Path(config.control_path)).exists():
        raise UserError(f"control_path: {path}: no such file or folder")
    choice.check_length("control_path", path, n_frames, len(choice.times(path, n_frames)))
