"""What is measured between pairs of a video's frames, kept on disk with digests that reveal damage."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokenflow.runtime.digests import digest_of
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.run_folder import lock

log = logging.getLogger("tokenflow")

DIGEST_BYTES = 16


@dataclass(frozen=True)
class KeptPairs:
    """Tensors of some `shape` from one frame of a video to another, measured when they are first needed.

    `<d>.npy`: (N, 2, *shape), float16, from each frame to the one `d` frames later, and back.
    `<d>_digests.npy`: (N, 16), uint8, the digest of each pair. A pair that is not as its digest says has yet
    to be measured, or is damaged and measured again.

    source: maps the index of one of N frames to the frame, uint8 RGB (H, W, 3). n_used: how many frames of
    the video are used, from the first.
    """

    folder: Path
    source: Callable[[int], np.ndarray]
    n_frames: int
    n_used: int
    shape: tuple[int, ...]

    def measure(self, frame: np.ndarray, other: np.ndarray) -> np.ndarray:
        """What is kept of two frames, there and back: (2, *shape)."""
        raise NotImplementedError

    def create(self, distances: Sequence[int], processes: Processes) -> None:
        """Create the files for frames so far apart, unless they exist; log the space they can take."""
        n_pairs = sum(max(0, self.n_used - apart) for apart in distances)
        n_bytes = n_pairs * (4 * math.prod(self.shape) + DIGEST_BYTES)
        log.info(
            "the source's motion takes up to %.0f MB of disk in %s", n_bytes / 1e6, self.folder
        )
        if processes.is_main:
            with lock(self.folder, waits=True):
                for apart in distances:
                    pairs, digests = self._files(apart)
                    pairs.ensure((self.n_frames, 2, *self.shape), torch.float16)
                    digests.ensure((self.n_frames, DIGEST_BYTES), torch.uint8)
        processes.wait()

    def find(self, frame: int, other: int) -> torch.Tensor:
        """What is measured from one frame to another (*shape); it is kept, unless it was before."""
        first, later = sorted((frame, other))
        (pairs, digests), row = self._files(later - first), torch.tensor([first])
        pair = pairs[row]
        if not torch.equal(digests[row], compute_digest(pair)):
            measured = self.measure(self.source(first), self.source(later))
            pair = torch.from_numpy(measured)[None].half()
            pairs[row], digests[row] = pair, compute_digest(pair)
        return pair[0, int(frame > other)]

    def read(self, frame: int, other: int) -> torch.Tensor:
        """What `find` has returned before: (*shape)."""
        first, later = sorted((frame, other))
        pairs, _ = self._files(later - first)
        return pairs[torch.tensor([first])][0, int(frame > other)]

    def _files(self, apart: int) -> tuple[FrameArray, FrameArray]:
        names = f"{apart}.npy", f"{apart}_digests.npy"
        return tuple(FrameArray(self.folder / name) for name in names)


def compute_digest(pair: torch.Tensor) -> torch.Tensor:
    """The digest (1, 16), uint8, of the tensor of a pair."""
    digest = bytes.fromhex(digest_of([pair.numpy().tobytes()]))
    return torch.tensor([list(digest)], dtype=torch.uint8)
