"""Consensus of clean predictions: what makes an edit steady over many frames.

TokenFlow's propagation aligns the features of neighbouring frames, token by token; over more frames, details
drift. Here, after a few of the later steps, the predictions of the clean video are decoded, each frame is
averaged with its neighbours along the motion of the source, and the latents are moved by what that changes.
The steps that follow sharpen the average again, which a fusion of the finished frames could not.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.fusion import Fusion

# The first consensus, as a share of the steps: before, predictions are too vague to be aligned. The last one
# leaves a single step: that sharpens the average again, while in more of them the frames part again.
FIRST, STEPS_LEFT = 0.6, 1
# In frames; nearer neighbours are alike already.
DISTANCES = (3, 6, 9, 12)


@dataclass(frozen=True)
class Consensus:
    """Draws frames towards each other at the end of a step of an edit."""

    sd: StableDiffusion
    fusion: Fusion

    def note(self, frames: torch.Tensor, clean: torch.Tensor) -> None:
        """Take the predicted clean latents (n, 4, h, w) of the frames (n,)."""
        self.fusion.put(frames, self.sd.decode_latents(clean))

    def corrections(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield frames (n,), at most `size` at once, and what moves their clean latents: (n, 4, h, w).

        The VAE's own error cancels out, since both the prediction and the average pass it; without that,
        textures blur.
        """
        fusion = self.fusion
        fusion.processes.wait()  # until all have noted their predictions
        for frames in fusion.processes.share(torch.arange(fusion.motion.n_frames).split(size)):
            fused, predicted = fusion.fused(frames, self.sd.device), fusion.pictures[frames].numpy()
            agreed, before = self.sd.encode_frames(np.concatenate([fused, predicted])).chunk(2)
            yield frames, agreed - before


def consensus_steps(n_steps: int, count: int) -> frozenset[int]:
    """The steps, of `n_steps`, that end with a consensus: `count` of them, spread evenly."""
    first = int(FIRST * n_steps)
    last = max(first, n_steps - 1 - STEPS_LEFT)
    return frozenset(torch.linspace(last, first, count, dtype=torch.float64).int().tolist())
