"""What is found about pairs of a video's frames, kept on disk with digests that reveal damage."""

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
FRAMES_HELD = 32  # in memory while pairs are found, since the next pair is often of one of them


@dataclass(frozen=True)
class KeptPairs:
    """A tensor of some `shape` for each pair of N frames, found when it is first needed.

    `<d>.npy`: (N, *shape), float16, of each frame and the one `d` frames later. `<d>_digests.npy`: (N, 16),
    uint8, the digest of each pair. A pair that is not as its digest says has yet to be found, or is damaged
    and found again.
    """

    folder: Path
    n_frames: int
    shape: tuple[int, ...]

    def create(self, distances: Sequence[int], n_frames: int, processes: Processes) -> None:
        """Create the files for frames so far apart, unless they exist.

        n_frames: logs the space that the pairs of so many frames can take.
        """
        n_pairs = sum(max(0, n_frames - apart) for apart in distances)
        n_bytes = n_pairs * (2 * math.prod(self.shape) + DIGEST_BYTES)
        log.info(
            "the source's motion takes up to %.0f MB of disk in %s", n_bytes / 1e6, self.folder
        )
        if processes.is_main:
            with lock(self.folder, waits=True):
                for apart in distances:
                    pairs, digests = self._files(apart)
                    pairs.ensure((self.n_frames, *self.shape), torch.float16)
                    digests.ensure((self.n_frames, DIGEST_BYTES), torch.uint8)
        processes.wait()

    def get(self, first: int, later: int, find: Callable[[int, int], np.ndarray]) -> torch.Tensor:
        """The tensor of a pair, (*shape); what `find` returns for it is kept, if nothing sound was."""
        (pairs, digests), row = self._files(later - first), torch.tensor([first])
        known = pairs[row]
        if torch.equal(digests[row], digest(known)):
            return known[0]
        found = torch.from_numpy(find(first, later))[None].half()
        pairs[row], digests[row] = found, digest(found)
        return found[0]

    def read(self, first: int, later: int) -> torch.Tensor:
        """The tensor of a pair, (*shape), which `get` has returned before."""
        return self._files(later - first)[0][torch.tensor([first])][0]

    def _files(self, apart: int) -> tuple[FrameArray, FrameArray]:
        names = f"{apart}.npy", f"{apart}_digests.npy"
        return tuple(FrameArray(self.folder / name) for name in names)


def digest(pair: torch.Tensor) -> torch.Tensor:
    """The digest (1, 16), uint8, of the tensor of a pair."""
    found = bytes.fromhex(digest_of([pair.numpy().tobytes()]))
    return torch.tensor([list(found)], dtype=torch.uint8)
