"""Consensus of clean predictions: what makes an edit steady over many frames.

TokenFlow's propagation aligns the features of neighbouring frames, token by token; over more frames, details
drift. Here, after a few of the later steps, predictions of clean frames are decoded, each is averaged with
its neighbours along the motion of the source, and the latents are moved by what that changes. The steps that
follow sharpen the average again, which a fusion of the finished frames could not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokenflow.config import EditConfig
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
    """Draws frames towards each other at the end of a step of an edit.

    first, stride: the frames `first`, `first + stride` and so on are averaged; those between follow them.
    """

    sd: StableDiffusion
    fusion: Fusion
    first: int
    stride: int

    @classmethod
    def after(
        cls, sd: StableDiffusion, make_fusion: Callable[[], Fusion], steps: Sequence[int], step: int
    ) -> "Consensus | None":
        """The consensus that ends a step, if one does: others average other frames, the last one all.

        steps: all that end with one. make_fusion: one at `DISTANCES`, whose motion has `followed_distances`.
        """
        if step not in steps:
            return None
        fusion, stride = make_fusion(), 1 if step == steps[-1] else STRIDE
        return cls(sd, fusion, steps.index(step) % min(stride, fusion.motion.n_used), stride)

    def note(self, frames: torch.Tensor, clean: torch.Tensor) -> None:
        """Take the predicted clean latents (n, 4, h, w) of the frames (n,)."""
        averaged = self._averages(frames)
        if averaged.any():
            self.fusion.put(frames[averaged], self.sd.decode_latents(clean[averaged]))

    def corrections(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield frames (n,), at most `size` at once, and what moves their clean latents: (n, 4, h, w)."""
        motion, processes = self.fusion.motion, self.fusion.processes
        found = FrameArray(self.fusion.pictures.path.with_name("corrections.npy"))
        if processes.is_main:
            shape = self.sd.latent_shape(motion.n_used, *motion.shape[:2])
            FrameArray.create(found.path, shape, torch.float32)
        processes.wait()  # until all have noted their predictions, too
        averaged = torch.arange(self.first, motion.n_used, self.stride)
        for frames in processes.share(averaged.split(size)):
            found[frames] = self._changed(frames)
        processes.wait()
        for frames in processes.share(torch.arange(motion.n_used).split(size)):
            yield frames, torch.stack([self._followed(found, frame) for frame in frames.tolist()])

    def _averages(self, frames: torch.Tensor | int) -> torch.Tensor | bool:
        """Which of the frames (n,) are averaged, bool (n,); or whether a single one is."""
        return frames % self.stride == self.first

    def _changed(self, frames: torch.Tensor) -> torch.Tensor:
        """What averaging changes in the latents of the frames (n,): (n, 4, h, w).

        The VAE's own error cancels out, since both the prediction and the average pass it; without that,
        textures blur.
        """
        fused, predicted = self.fusion.average(frames, self.sd.device), self.fusion.pictures[frames]
        both = np.concatenate([fused, predicted.numpy()])
        agreed, before = self.sd.encode_frames(both).chunk(2)
        return agreed - before

    def _followed(self, found: FrameArray, frame: int) -> torch.Tensor:
        """What moves the latents of a frame, (4, h, w): what was found for it, or for those around it."""
        if self._averages(frame):
            return found[torch.tensor([frame])][0]
        motion = self.fusion.motion
        around = range(max(0, frame - self.stride + 1), min(frame + self.stride, motion.n_used))
        near = [other for other in around if self._averages(other)]
        along = torch.stack([motion.read(frame, other) for other in near])
        near = torch.tensor(near)
        return carry(found[near], along, (near - frame).abs())


def followed_distances(config: EditConfig) -> list[int]:
    """How far apart the frames are whose motion an edit follows in its averages, in frames."""
    distances = set(range(1, config.fuse_distance + 1))
    if config.consensus_count or config.mask == "auto":
        distances |= {*range(1, STRIDE), *DISTANCES}
    return sorted(distances)


def consensus_steps(n_steps: int, count: int) -> list[int]:
    """The steps, of `n_steps`, that end with a consensus: `count` of them, spread evenly."""
    first = int(FIRST * n_steps)
    last = max(first, n_steps - 1 - STEPS_LEFT)
    return sorted(set(torch.linspace(last, first, count, dtype=torch.float64).int().tolist()))
