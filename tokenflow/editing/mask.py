"""Masks: where an edit may change the video, and where the video stays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from tokenflow.editing.fusion import Fusion
from tokenflow.errors import UserError
from tokenflow.inversion.source_frames import FrameChoice
from tokenflow.runtime.frame_array import FrameArray

# Where in the schedule two prompts are compared, as shares of its steps.
COMPARED = (0.35, 0.5, 0.65, 0.8)
STRONG = 0.98  # the quantile of a frame's differences that counts as 1
RELEVANT = 0.25  # from this difference on, a place is inside
BATCH = 8  # frames at once
MARGIN = 1  # latent pixels, by which the inside grows, so that the edit is not cut

# Maps latents (n, 4, h, w), a timestep and frames (n,) to their noise (n, 4, h, w), under one prompt.
Noise = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mask:
    """Keeps the source's latents wherever an edit may change nothing.

    inside: (N, 1, h, w): 1 where the edit is taken, else 0.
    source: maps a timestep and frames (n,) to the source's latents (n, 4, h, w); None names the clean ones.
    """

    inside: FrameArray
    source: Callable[[int | None, torch.Tensor], torch.Tensor]

    def confined(self, latents: torch.Tensor, t: int | None, frames: torch.Tensor) -> torch.Tensor:
        """Edited latents (n, 4, h, w) at a timestep inside, and the source's outside."""
        return self.source(t, frames).lerp(latents, self.inside[frames])


def relevance(
    latents_at: Callable[[int, torch.Tensor], torch.Tensor],
    timesteps: tuple[int, ...],
    prompts: tuple[Noise, Noise],
    frames: torch.Tensor,
) -> torch.Tensor:
    """How differently two prompts see each place of the source's frames (n,): (n, h, w), 0 to 1.

    The mean absolute difference of the noise under both prompts, relative to a frame's strongest (Couairon
    et al., DiffEdit, arXiv 2210.11427, section 3.2, but on the inverted latents instead of random noise).
    latents_at: maps a timestep and frames (n,) to inverted latents (n, 4, h, w).
    """
    maps = []
    for t in timesteps:
        latents = latents_at(t, frames)
        one, other = (noise(latents, t, frames) for noise in prompts)
        difference = (one - other).abs().mean(1)
        strongest = difference.flatten(1).quantile(STRONG, dim=1)[:, None, None]
        maps.append((difference / strongest.clamp(min=1e-6)).clamp(max=1))
    return torch.stack(maps).mean(0)


def inside_of(relevant: torch.Tensor) -> torch.Tensor:
    """Where relevance (n, h, w) is high, and a margin around: 0 or 1, (n, 1, h, w)."""
    chosen = (relevant[:, None] >= RELEVANT).float()
    return F.max_pool2d(chosen, 2 * MARGIN + 1, 1, MARGIN)


def write_relevant(
    inside: FrameArray,
    fusion: Fusion,
    relevant: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> None:
    """Write the mask of relevant places, which are averaged along the motion first; processes divide it.

    inside: (N, 1, h, w). relevant: maps frames (n,) to their `relevance` (n, h, w).
    """
    batches = fusion.processes.share(torch.arange(fusion.n_frames).split(BATCH))
    for frames in tqdm(batches, "Finding mask", disable=not fusion.processes.is_main):
        maps = relevant(frames)[:, None]
        shown = F.interpolate(maps, fusion.pictures.shape[1:3], mode="bilinear")
        shown = (255 * shown).round().byte().permute(0, 2, 3, 1)
        fusion.put(frames, shown.expand(-1, -1, -1, 3).numpy())
    fusion.processes.wait()
    for frames in batches:
        averages = fusion.fused(frames, device)[..., 0]
        inside[frames] = inside_of(torch.stack([reduced(a, *inside.shape[2:]) for a in averages]))


def check_mask(path: Path, choice: FrameChoice, n_frames: int) -> None:
    """Raise UserError if a user's mask has fewer frames than are edited. choice: as for `given`."""
    if (count := choice.count(path, n_frames)) < n_frames:
        raise UserError(
            f"mask: {path} has {count} frames for the {n_frames} to edit; it must be as long as the video"
        )


def given(
    path: Path, choice: FrameChoice, n_frames: int, height: int, width: int
) -> Iterator[torch.Tensor]:
    """Yield for each frame where a user's mask is white, in latent pixels: 0 or 1, (height, width).

    path: a video or folder of images of the source's whole length, white inside. choice: which frames the
    inversion used of the source.
    """
    for frame in choice.fitted(path, n_frames):
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        yield (reduced(grey, height, width) >= 0.5).float()


def reduced(image: np.ndarray, height: int, width: int) -> torch.Tensor:
    """A grey image (H, W), uint8, in a smaller size: each pixel the mean of those it replaces, 0 to 1."""
    smaller = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(smaller).float() / 255


def compared(timesteps: tuple[int, ...]) -> tuple[int, ...]:
    """The timesteps, of a schedule's, at which `relevance` compares prompts."""
    return tuple(timesteps[int(share * len(timesteps))] for share in COMPARED)
