"""Masks: where an edit may change the video, and where the video stays."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import guided_blur
from tqdm import tqdm

from tokenflow.diffusion.ddim import NoisePredictor, check_finite
from tokenflow.editing.source import Source
from tokenflow.errors import UserError
from tokenflow.inversion.frames import FrameChoice
from tokenflow.motion.fusion import Fusion
from tokenflow.runtime.frame_array import FrameArray

# Where in the schedule two prompts are compared, as shares of its steps. While there is much noise, they
# differ where the edit belongs; later also on what stays.
COMPARED = (0.0, 0.05, 0.1)
STRONG = 0.98  # the quantile of a frame's differences that counts as 1
BATCH = 8  # frames at once
REACH = 2  # latent pixels, within which the picture shows where a difference ends
EVEN = 1e-3  # the variance of colours in [0, 1] below which a surface has no edges
# Where the border is between the mean differences outside (0) and inside (1): below the middle, since a mask
# may not cut the edit.
BORDER = 0.25
WHITE = 128  # grey levels from which on a pixel of a user's mask is white
RAMP = 1  # pixels by which a mask is widened and blurred, where the edit passes into the source


@dataclass(frozen=True)
class Mask:
    """Keeps the source's latents, and in the end its pixels, wherever an edit may change nothing.

    inside: (N, 1, H, W), uint8: 1 where the edit is taken, else 0.
    """

    inside: FrameArray
    source: Source

    def confine(self, latents: torch.Tensor, t: int | None, frames: torch.Tensor) -> torch.Tensor:
        """Edited latents (n, 4, h, w) at a timestep (None: clean ones) where any pixel is inside, and the
        source's elsewhere."""
        inside = find_touched(self.inside[frames], *latents.shape[-2:])
        return self.source.latents(t, frames).lerp(latents, inside)

    def compose(self, edited: np.ndarray, frames: torch.Tensor) -> np.ndarray:
        """Edited frames (n, H, W, 3), uint8 RGB, inside, else the source's, free of the VAE's error."""
        source = np.stack([self.source.picture(frame) for frame in frames.tolist()])
        share = soften(self.inside[frames].float()).permute(0, 2, 3, 1).numpy()
        return (share * edited + (1 - share) * source).round().astype(np.uint8)

    def show(self) -> Iterator[np.ndarray]:
        """Yield for each frame a picture, uint8 (H, W, 3): white where the edit is taken, else black."""
        for frame in torch.arange(len(self.inside)).split(1):
            yield (255 * self.inside[frame][0]).expand(3, -1, -1).permute(1, 2, 0).numpy()


def find_touched(inside: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The latents (n, 1, height, width) that hold a pixel inside a mask (n, 1, H, W), uint8: 0 or 1, float32.

    A third of the time of PyTorch's pooling, which takes no uint8; it is needed in every step.
    """
    rows = inside.unflatten(-1, (width, -1)).amax(-1)
    return rows.unflatten(-2, (height, -1)).amax(-2).float()


def soften(inside: torch.Tensor) -> torch.Tensor:
    """A mask (n, 1, H, W) that is 1 inside and falls to 0 around it."""
    wider = F.max_pool2d(inside, 2 * RAMP + 1, stride=1, padding=RAMP)
    return F.avg_pool2d(wider, 2 * RAMP + 1, stride=1, padding=RAMP, count_include_pad=False)


@dataclass(frozen=True)
class PromptDifference:
    """Finds where two prompts see the source differently, which is where an edit belongs.

    timesteps: of the schedule. predictors: of the noise under each prompt. fusion: along which the
    differences are averaged.
    """

    source: Source
    timesteps: tuple[int, ...]
    predictors: tuple[NoisePredictor, NoisePredictor]
    fusion: Fusion
    device: torch.device

    def measure(self, frames: torch.Tensor) -> torch.Tensor:
        """How differently the prompts see each place of the source's frames (n,): (n, h, w), 0 to 1.

        The mean absolute difference of the noise under both prompts, relative to a frame's strongest
        (Couairon et al., DiffEdit, arXiv 2210.11427, section 3.2, but on the inverted latents instead of
        random noise).
        """
        maps = []
        for t in (self.timesteps[int(share * len(self.timesteps))] for share in COMPARED):
            latents = self.source.latents(t, frames)
            one, other = (predict(latents, t, frames) for predict in self.predictors)
            difference = (one - other).abs().mean(1)
            check_finite(difference, f"the noise that a mask compares at timestep {t}")
            strongest = difference.flatten(1).quantile(STRONG, dim=1)[:, None, None]
            maps.append((difference / strongest.clamp(min=1e-6)).clamp(max=1))
        return torch.stack(maps).mean(0)

    def write(self, inside: FrameArray) -> None:
        """Write the mask (N, 1, H, W), uint8; processes divide the frames."""
        self.fusion.begin()
        processes, (n_frames, _, height, width) = self.fusion.processes, inside.shape
        maps = FrameArray(self.fusion.path.with_name("relevance.npy"))
        if processes.is_main:
            FrameArray.create(maps.path, inside.shape, torch.uint8)
        batches, all_frames = processes.share(torch.arange(n_frames).split(BATCH)), range(n_frames)
        scale = height // self.source.latents(None, torch.arange(1)).shape[2]  # pixels to a latent
        for frames in tqdm(batches, "Finding mask", disable=not processes.is_main):
            measured = self.measure(frames)[:, None]
            shown = F.interpolate(measured, (height, width), mode="bilinear")
            shown = (255 * shown).round().byte().permute(0, 2, 3, 1)
            self.fusion.put(frames, shown.expand(-1, -1, -1, 3).numpy())
        processes.wait()
        for frame in (frame for frames in batches for frame in frames.split(1)):
            steady = torch.from_numpy(self.fusion.average(frame, self.device)[0, ..., 0])
            picture = torch.from_numpy(self.source.picture(frame.item())).to(self.device)
            steady, picture = steady.to(self.device) / 255, picture.permute(2, 0, 1) / 255
            maps[frame] = (255 * draw_to_edges(steady, picture, scale)).round().byte()[None, None]
        processes.wait()
        every = max(1, scale // 2)  # pixel, which is enough to find what divides them
        sampled = (maps[torch.tensor([n])][..., ::every, ::every].numpy() for n in all_frames)
        least = find_border(np.stack(list(sampled)))
        for frames in batches:
            inside[frames] = maps[frames] >= least


def draw_to_edges(relevant: torch.Tensor, picture: torch.Tensor, scale: int) -> torch.Tensor:
    """Relevance (H, W), which is no finer than latents are, drawn to the edges in a picture.

    By a guided filter (He, Sun and Tang, ECCV 2010). picture: (3, H, W) in [0, 1]. scale: pixels to a side
    of a latent.
    """
    size = 2 * REACH * scale + 1
    return guided_blur(picture[None], relevant[None, None], size, EVEN)[0, 0].clamp(0, 1)


def find_border(values: np.ndarray) -> float:
    """The value from which on values, uint8, are inside: `BORDER` of the way between their two groups.

    The groups are those into which they divide best (Otsu, 1979). Of equal values all are inside.
    """
    values = values.reshape(1, -1)
    _, high = cv2.threshold(values, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    groups = [group for group in (values[high == 0], values[high > 0]) if group.size]
    outside, inside = groups[0].mean(), groups[-1].mean()
    return float(outside + BORDER * (inside - outside))


def check_mask(path: Path, choice: FrameChoice, n_frames: int) -> None:
    """Raise UserError if a user's mask, as `read_mask` reads it, has too few frames or is white in none."""
    inside = [bool(mask.any()) for mask in read_mask(path, choice, n_frames)]
    choice.check_length("mask", path, n_frames, len(inside))
    if not any(inside):
        raise UserError(
            f"mask: {path} is white nowhere in the {n_frames} frames to edit, so nothing would change; it "
            "must be white (255) where the edit may change the video"
        )


def read_mask(path: Path, choice: FrameChoice, n_frames: int) -> Iterator[torch.Tensor]:
    """Yield for each frame where a user's mask is white: bool (H, W).

    path: a video or folder of images of the source's whole length, white inside. choice: which frames the
    inversion used of the source.
    """
    for frame in choice.fitted(path, n_frames):
        yield torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) >= WHITE)
