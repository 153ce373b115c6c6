"""Consensus of clean predictions: what makes an edit steady over many frames.

TokenFlow's propagation aligns the features of neighbouring frames, token by token; over more frames, details
drift. Here, after a few of the later steps, predictions of clean frames are decoded, each is averaged with
its neighbours along the motion of the source, and the latents are moved by what that changes. The steps that
follow sharpen the average again, which a fusion of the finished frames could not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.motion.averaging import carry
from tokenflow.motion.fusion import Fusion
from tokenflow.runtime.frame_array import FrameArray

# The first consensus, as a share of the steps: before, predictions are too vague to be aligned. The last one
# leaves a single step: that sharpens the average again, while in more of them the frames part again.
FIRST, STEPS_LEFT = 0.6, 1
# In frames. All but the last consensus decode one frame in each STRIDE, which is most of what they take; the
# frames between are much like it, and are moved by what moves it.
STRIDE = 3
# In frames, multiples of STRIDE; nearer neighbours are alike already.
DISTANCES = (3, 6, 9, 12)


@dataclass(frozen=True)
class Consensus:
    """Draws frames towards each other at the end of some `steps` of an edit, counted from 0.

    fusion: of frames at `DISTANCES`. first, stride: in a step the frames `first`, `first + stride` and so on
    are averaged; those between follow them.
    """

    sd: StableDiffusion
    fusion: Fusion
    steps: Sequence[int]
    first: int = 0
    stride: int = 1

    def at(self, step: int) -> "Consensus | None":
        """The consensus that ends a step, if one does: others average other frames, the last one all."""
        if step not in self.steps:
            return None
        self.fusion.begin(also=range(1, STRIDE))
        stride = 1 if step == self.steps[-1] else STRIDE
        first = self.steps.index(step) % min(stride, self.fusion.motion.n_used)
        return replace(self, first=first, stride=stride)

    def note(self, frames: torch.Tensor, clean: torch.Tensor) -> None:
        """Take the predicted clean latents (n, 4, h, w) of the frames (n,)."""
        averaged = self._averages(frames)
        if averaged.any():
            self.fusion.put(frames[averaged], self.sd.decode_latents(clean[averaged]))

    def find_corrections(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield frames (n,), at most `size` at once, and what moves their clean latents: (n, 4, h, w)."""
        motion, processes = self.fusion.motion, self.fusion.processes
        changes = FrameArray(self.fusion.path.with_name("corrections.npy"))
        if processes.is_main:
            shape = self.sd.latent_shape(motion.n_used, *motion.shape[:2])
            FrameArray.create(changes.path, shape, torch.float32)
        processes.wait()  # until all have noted their predictions, too
        averaged = torch.arange(self.first, motion.n_used, self.stride)
        for frames in processes.share(averaged.split(size)):
            changes[frames] = self._find_change(frames)
        processes.wait()
        for frames in processes.share(torch.arange(motion.n_used).split(size)):
            yield frames, torch.stack([self._follow(changes, frame) for frame in frames.tolist()])

    def _averages(self, frames: torch.Tensor | int) -> torch.Tensor | bool:
        """Which of the frames (n,) are averaged, bool (n,); or whether a single one is."""
        return frames % self.stride == self.first

    def _find_change(self, frames: torch.Tensor) -> torch.Tensor:
        """What averaging changes in the latents of the frames (n,): (n, 4, h, w).

        The VAE's own error cancels out, since both the prediction and the average pass it; without that,
        textures blur.
        """
        averages, predicted = self.fusion.average(frames, self.sd.device), self.fusion.read(frames)
        after, before = self.sd.encode_frames(np.concatenate([averages, predicted])).chunk(2)
        return after - before

    def _follow(self, changes: FrameArray, frame: int) -> torch.Tensor:
        """What moves the latents of a frame, (4, h, w): its own change, or those of frames around it."""
        if self._averages(frame):
            return changes[torch.tensor([frame])][0]
        motion = self.fusion.motion
        around = range(max(0, frame - self.stride + 1), min(frame + self.stride, motion.n_used))
        near = [other for other in around if self._averages(other)]
        along = torch.stack([motion.read(frame, other) for other in near])
        near = torch.tensor(near)
        return carry(changes[near], along, (near - frame).abs())


def choose_steps(n_steps: int, count: int) -> list[int]:
    """The steps, of `n_steps`, that end with a consensus: `count` of them, spread evenly."""
    first = int(FIRST * n_steps)
    last = max(first, n_steps - 1 - STEPS_LEFT)
    return sorted(set(torch.linspace(last, first, count, dtype=torch.float64).int().tolist()))
