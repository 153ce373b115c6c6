"""Consensus of clean predictions: what makes an edit steady over many frames.

TokenFlow's propagation aligns the features of neighbouring frames, token by token; over more frames, details
drift. Here, after a few of the later steps, the predictions of the clean video are decoded, each frame is
averaged with its neighbours along the motion of the source, and the average takes the prediction's place. The
steps that follow sharpen it again, which is what a fusion of the finished frames lacks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.fusion import Fusion
from tokenflow.runtime.frame_array import FrameArray

# The first and the last consensus, as shares of the steps: before, predictions are too vague to be aligned,
# and after, too few steps are left to sharpen them.
FIRST, LAST = 0.6, 0.9
# In frames; nearer neighbours are alike already.
DISTANCES = (3, 6, 9, 12)


@dataclass(frozen=True)
class Consensus:
    """Draws frames towards each other after some `steps` (counted from 0) of an edit.

    clean: the predicted clean latents (N, 4, h, w), in a file for all processes.
    """

    sd: StableDiffusion
    fusion: Fusion
    steps: frozenset[int]
    clean: FrameArray

    @classmethod
    def of(
        cls, sd: StableDiffusion, fusion: Fusion, steps: frozenset[int], shape: tuple[int, ...]
    ) -> "Consensus":
        """The consensus of an edit whose latents have that shape (N, 4, h, w)."""
        clean = FrameArray(fusion.folder / "clean.npy")
        if fusion.processes.is_main:
            FrameArray.create(clean.path, shape, torch.float32)
        fusion.processes.wait()
        return cls(sd, fusion, steps, clean)

    def note(self, frames: torch.Tensor, clean: torch.Tensor) -> None:
        """Take the predicted clean latents (n, 4, h, w) of the frames (n,)."""
        self.clean[frames] = clean
        self.fusion.put(frames, self.sd.decode_latents(clean))

    def corrections(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield frames (n,), at most `size` at once, and what moves their clean latents: (n, 4, h, w)."""
        fusion = self.fusion
        fusion.processes.wait()  # until all have noted their predictions
        for frames in fusion.processes.share(torch.arange(fusion.n_frames).split(size)):
            agreed = self.sd.encode_frames(fusion.fused(frames, self.sd.device))
            yield frames, agreed - self.clean[frames]


def consensus_steps(n_steps: int, count: int) -> frozenset[int]:
    """The steps, of `n_steps`, that end with a consensus: `count` of them, spread evenly."""
    shares = torch.linspace(FIRST, LAST, count, dtype=torch.float64).tolist()
    return frozenset(int(round(share * n_steps, 6)) for share in shares)
