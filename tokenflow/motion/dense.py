"""Where the pixels of a frame are in other frames of the source: found when an edit needs it, and kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenflow.motion.averaging import reliability
from tokenflow.motion.optical_flow import dis_flow
from tokenflow.motion.pairs import FRAMES_HELD, KeptPairs
from tokenflow.runtime.ahead import in_parallel
from tokenflow.runtime.distributed import Processes


@dataclass(frozen=True)
class DenseMotion:
    """The motion between the first `n_frames` frames of a video.

    pairs: (2, H, W, 3) for each pair, there and back: the optical flow (dx, dy) in pixels, and how far it can
    be relied on, 0 to 1. source: maps a frame's index to the source's frame, uint8 RGB (H, W, 3).
    """

    pairs: KeptPairs
    source: Callable[[int], np.ndarray]
    n_frames: int

    @classmethod
    def kept_in(
        cls,
        folder: Path,
        video: tuple[int, int, int],
        source: Callable[[int], np.ndarray],
        n_frames: int,
    ) -> "DenseMotion":
        """The motion whose files are in a folder; `video`: its (N, H, W), N being all frames there are."""
        n_all, height, width = video
        return cls(KeptPairs(folder, n_all, (2, height, width, 3)), source, n_frames)

    def find(self, distances: Sequence[int], processes: Processes) -> None:
        """Find what is not known yet of frames so far apart; processes divide the pairs."""
        self.pairs.create(distances, self.n_frames, processes)
        source = lru_cache(FRAMES_HELD)(self.source)

        def measured(first: int, later: int) -> np.ndarray:
            return with_reliability(source(first), source(later))

        def find(pair: tuple[int, int]) -> None:
            self.pairs.get(*pair, measured)

        frames = range(self.n_frames)
        pairs = [(i, i + d) for i in frames for d in distances if i + d < self.n_frames]
        pairs, hidden = processes.share(pairs), not processes.is_main
        each = in_parallel(find, pairs)
        for _ in tqdm(each, "Finding motion", len(pairs), unit="pair", disable=hidden):
            pass
        processes.wait()

    def between(self, frame: int, other: int) -> torch.Tensor:
        """The flow and its reliability from a frame to another one, once they are found: (H, W, 3)."""
        pair = self.pairs.read(*sorted((frame, other)))
        return pair[int(frame > other)]


def with_reliability(frame: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The flow between two frames, uint8 RGB (H, W, 3), and its reliability, there and back: (2, H, W, 3)."""
    flow = dis_flow()  # which holds buffers, so that threads cannot share one
    there, back = flow(frame, other), flow(other, frame)
    reliable = reliability(frame, other, there, back), reliability(other, frame, back, there)
    ways = zip((there, back), reliable, strict=True)
    return np.stack([np.dstack(way) for way in ways])
