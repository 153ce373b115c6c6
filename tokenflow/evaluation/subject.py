"""An edit that is evaluated, and the videos that it is compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tokenflow.errors import UserError
from tokenflow.video.read import decode_frames
from util import fit_frame

# What a video is in an evaluation, and how it is called. No edit can be blamed for what the first three have.
NAMES = {
    "source": "source",
    "vae": "VAE round trip",
    "reconstruction": "reconstruction",
    "frame_by_frame": "frame by frame",
    "edit": "edit",
}
SOURCE, VAE, RECONSTRUCTION, PER_FRAME, EDIT = NAMES

SMALLEST = 16  # pixels, for the optical flow and SSIM


@dataclass(frozen=True)
class Subject:
    """An edit and the videos that it is compared with, which show the same moments."""

    name: str
    folder: Path  # where its report goes
    frames: dict[str, Path]  # by what it is, SOURCE first: a video or a folder of images
    shown: dict[str, Sequence[int]]  # of each video the frames that belong to those of the edit
    n_frames: int
    fps: Fraction  # of the edit
    resize: str  # how frames of another size than the edit's are fitted
    prompt: str | None = None
    technique: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    playable: dict[str, Path] = field(default_factory=dict)  # H.264 videos that exist already
    inversion: Path | None = None  # folder of the inversion that the edit was made from

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of all frames: the edit's, made even, as videos need it. Raises UserError."""
        height, width = next(decode_frames(self.frames[EDIT])).shape[:2]
        if min(height, width) < SMALLEST:
            raise UserError(
                f"edited: {self.frames[EDIT]}: its frames of {height} x {width} pixels are too small to be "
                f"measured; at least {SMALLEST} on each side are needed"
            )
        return height - height % 2, width - width % 2

    @property
    def compared_with(self) -> tuple:
        """Everything but the edit that its metrics depend on; edits that share it are measured together."""
        others = tuple((name, path) for name, path in self.frames.items() if name != EDIT)
        return others, self.n_frames, self.fps, self.size, self.prompt

    def read(self, name: str) -> Iterator[np.ndarray]:
        """The frames of one of the videos, uint8 RGB (H, W, 3), one by one."""
        height, width = self.size
        frames = pick(decode_frames(self.frames[name]), self.shown[name][: self.n_frames])
        return (fit_frame(frame, height, width, self.resize) for frame in frames)


def pick(frames: Iterator[np.ndarray], indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the frames of these indices, which ascend, and of which some may be the same."""
    position, frame = -1, None
    for index in indices:
        while position < index:
            position, frame = position + 1, next(frames)
        yield frame
