"""The source's optical flow between frames and their keyframes, found when an edit first needs it, and kept.

Keyframes change at each step, so that over many steps an edit needs the flow between nearly all frames that
are less than two intervals apart.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from tokenflow.config import EditConfig
from tokenflow.inversion.files import CLEAN, Inversion
from tokenflow.optical_flow import both_ways, dis_flow
from tokenflow.runtime.digests import digest_of
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.run_folder import locked
from util import frame_path, read_image

log = logging.getLogger("tokenflow")

DIGEST_BYTES = 16
FRAMES_HELD = 32  # in memory, since the next pair is often of one of them

# Maps two frames to the flows (H, W, 2) between them, there and back, in pixels; NaN where they fail.
Between = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class SourceMotion:
    """The flow between the N frames of a video, taken at the centre of each cell of their latents.

    `<d>.npy`: (N, 2, h, w, 2), float16: the flow from each frame to the one `d` frames later, and back, in
    pixels; NaN where it fails. `<d>_digests.npy`: (N, 16), uint8, the digest of each pair. A pair that is not
    as its digest says has yet to be found, or is damaged and found again.

    latent_shape: (N, 4, h, w). cell: the side of a cell in pixels. max_displacement: the length in pixels
    beyond which the flow fails.
    """

    folder: Path
    between: Between
    latent_shape: tuple[int, ...]
    cell: int
    max_displacement: float

    def create(self, furthest: int, processes: Processes) -> None:
        """Create the files for frames that are up to `furthest` apart, unless they exist."""
        if processes.is_main:
            with locked(self.folder, waits=True):
                for apart in range(1, furthest + 1):
                    flows, digests = self._files(apart)
                    flows.ensure((self.latent_shape[0], *self._pair_shape), torch.float16)
                    digests.ensure((self.latent_shape[0], DIGEST_BYTES), torch.uint8)
        processes.wait()

    def __call__(self, frames: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The flow from frames (n,) to others (n, k), in cells; NaN where it fails: (n, k, h, w, 2)."""
        flows = [
            self._flow(frame, other)
            for frame, of_frame in zip(frames.tolist(), others.tolist(), strict=True)
            for other in of_frame
        ]
        flows = torch.stack(flows).float().unflatten(0, others.shape)
        too_far = flows.norm(dim=-1, keepdim=True) > self.max_displacement
        return flows.masked_fill(too_far, torch.nan) / self.cell

    def _flow(self, frame: int, other: int) -> torch.Tensor:
        """The flow (h, w, 2) from one frame to another, in pixels."""
        if frame == other:
            return torch.zeros(self._pair_shape[1:], dtype=torch.float16)
        there, back = self._pair(*sorted((frame, other)))
        return there if frame < other else back

    def _pair(self, first: int, later: int) -> torch.Tensor:
        """The flows (2, h, w, 2) between two frames, there and back, in pixels."""
        (flows, digests), row = self._files(later - first), torch.tensor([first])
        known = flows[row]
        if torch.equal(digests[row], digest(known)):
            return known[0]
        middle = np.s_[self.cell // 2 :: self.cell]
        found = np.stack([flow[middle, middle] for flow in self.between(first, later)])
        found = torch.from_numpy(found)[None].half()
        flows[row], digests[row] = found, digest(found)
        return found[0]

    @property
    def _pair_shape(self) -> tuple[int, ...]:
        return 2, *self.latent_shape[2:], 2

    def _files(self, apart: int) -> tuple[FrameArray, FrameArray]:
        flows, digests = f"{apart}.npy", f"{apart}_digests.npy"
        return FrameArray(self.folder / flows), FrameArray(self.folder / digests)


def digest(pair: torch.Tensor) -> torch.Tensor:
    """The digest (1, 16), uint8, of the flows of a pair."""
    found = bytes.fromhex(digest_of([pair.numpy().tobytes()]))
    return torch.tensor([list(found)], dtype=torch.uint8)


def kept_motion(
    inversion: Inversion, config: EditConfig, n_frames: int, processes: Processes
) -> SourceMotion:
    """The motion that an edit of the first `n_frames` frames follows; logs the space that it can take."""
    shape, furthest = inversion.latents(CLEAN).shape, furthest_keyframe(config.interval, n_frames)
    needed = bytes_needed((n_frames, *shape[1:]), furthest)
    log.info(
        "the source's optical flow, which is kept with its inversion, takes up to %.0f MB of disk",
        needed / 1e6,
    )
    frames = inversion.source_frames
    between = dis_between(lambda index: read_image(frame_path(frames, index)))
    cell = inversion.manifest.config["H"] // shape[2]
    folder = inversion.folder / "flow"
    motion = SourceMotion(folder, between, shape, cell, config.max_displacement)
    motion.create(furthest, processes)
    return motion


def furthest_keyframe(interval: int, n_frames: int) -> int:
    """How far apart a frame and a keyframe that it blends can be, with one keyframe in each `interval`."""
    return min(2 * interval, n_frames) - 1


def bytes_needed(latent_shape: tuple[int, ...], furthest: int) -> int:
    """Bytes of the flow between all frames of latents (N, 4, h, w) that are up to `furthest` apart."""
    n_frames, _, height, width = latent_shape
    pairs = sum(n_frames - apart for apart in range(1, furthest + 1))
    return pairs * (8 * height * width + DIGEST_BYTES)


def dis_between(source: Callable[[int], np.ndarray]) -> Between:
    """The flow by dense inverse search; `source` maps a frame's index to the frame, uint8 RGB (H, W, 3)."""
    source, flow = lru_cache(FRAMES_HELD)(source), dis_flow()
    return lambda first, later: both_ways(flow, source(first), source(later))
