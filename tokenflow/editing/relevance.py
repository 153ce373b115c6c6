"""Where an edit belongs: where its prompt sees the source video differently from the source's own prompt.

The difference between the prompts is found once for each frame, before the edit begins. It makes guidance
weaker where the prompts agree, and it becomes an automatic mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from tokenflow.diffusion.ddim import NoisePredictor, check_finite
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.source import Source
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray

# Where in the schedule the prompts are compared, as shares of its steps. While there is much noise, they
# differ where the edit belongs; later also on what stays.
COMPARED = (0.0, 0.1)
BATCH = 8  # frames at once
SAMPLED = 256  # frames, spread over the video, at most, by which weak differences are told from strong ones
WINDOW = 5  # latent pixels across, over which differences are averaged for the relevance


@dataclass(frozen=True)
class PromptDifference:
    """Finds how differently the source's own prompt and the edit's see the source.

    timesteps: of the schedule. unedited, edited: predict the noise in the source's frames under each prompt;
    LoRAs belong to the edit alone, so what they change counts as well.
    """

    sd: StableDiffusion
    source: Source
    timesteps: Sequence[int]
    unedited: NoisePredictor
    edited: NoisePredictor

    def measure(self, frames: torch.Tensor) -> torch.Tensor:
        """How differently the prompts see each place of the source's frames (n,): (n, 1, h, w).

        The mean absolute difference of the noise under both prompts (Couairon et al., DiffEdit, arXiv
        2210.11427, section 3.2, but on the inverted latents instead of random noise).
        """
        maps = []
        for t in (self.timesteps[int(share * len(self.timesteps))] for share in COMPARED):
            latents = self.source.latents(t, frames)
            with self.sd.original():
                unedited = self.unedited(latents, t, frames)
            maps.append((self.edited(latents, t, frames) - unedited).abs().mean(1, keepdim=True))
            check_finite(maps[-1], f"the noise by which prompts are compared at timestep {t}")
        return torch.stack(maps).mean(0)

    def write(self, differences: FrameArray, processes: Processes) -> None:
        """Write the differences of all frames (N, 1, h, w), float32; processes divide the frames."""
        batches = processes.share(torch.arange(self.source.n_frames).split(BATCH))
        for frames in tqdm(batches, "Comparing prompts", disable=not processes.is_main):
            differences[frames] = self.measure(frames)


def sample_frames(n_frames: int) -> torch.Tensor:
    """Frames (n,) that stand for all of a video, without taking more memory the longer it is."""
    return torch.linspace(0, n_frames - 1, min(n_frames, SAMPLED)).round().long()


def find_groups(values: np.ndarray) -> tuple[float, float]:
    """The means of the two groups, weak and strong, into which values from 0 on divide best.

    Otsu, IEEE Transactions on Systems, Man, and Cybernetics 9, 1979; on 256 levels. If all values are equal,
    so are the means.
    """
    values = values.reshape(1, -1)
    levels = np.rint(values * (255 / max(values.max(), 1e-12))).astype(np.uint8)
    _, high = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    groups = [group for group in (values[high == 0], values[high > 0]) if group.size]
    return float(groups[0].mean()), float(groups[-1].mean())


@dataclass(frozen=True)
class Relevance:
    """How relevant guidance is at each place of the source's frames.

    differences: (N, 1, h, w), as `PromptDifference` writes them. strength: 0 to 1, how much weaker
    guidance is where the prompts agree.
    """

    differences: FrameArray
    strength: float

    def at(self, frames: torch.Tensor) -> torch.Tensor:
        """The relevance of the frames (n,), (n, 1, h, w): 1 where the prompts differ, 1 - strength where not.

        It is whole from half of the way between weak and strong differences on. Weak ones count as none, if
        the two are far apart: else the prompts differ everywhere.
        """
        weak, strong = self._groups
        whole, floor = (weak + strong) / 2, min(weak, strong - weak)
        risen = (self._average(frames) - floor) / max(whole - floor, 1e-12)
        return 1 - self.strength * (1 - risen.clamp(0, 1))

    def _average(self, frames: torch.Tensor) -> torch.Tensor:
        """The differences (n, 1, h, w) of the frames (n,), averaged around each place."""
        differences = self.differences[frames]
        return F.avg_pool2d(differences, WINDOW, 1, WINDOW // 2, count_include_pad=False)

    @cached_property
    def _groups(self) -> tuple[float, float]:
        """The means of the video's weak and strong differences."""
        return find_groups(self._average(sample_frames(len(self.differences))).numpy())
