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

from tokenflow.editing.relevance import find_groups, sample_frames
from tokenflow.editing.source import Source
from tokenflow.errors import UserError
from tokenflow.inversion.frames import FrameChoice
from tokenflow.motion.fusion import Fusion
from tokenflow.runtime.frame_array import FrameArray

STRONG = 0.98  # the quantile of the differences that counts as 1
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


def write_mask(
    inside: FrameArray,
    differences: FrameArray,
    source: Source,
    fusion: Fusion,
    device: torch.device,
) -> None:
    """Write the mask (N, 1, H, W), uint8, of where two prompts see the source differently.

    differences: (N, 1, h, w), of `PromptDifference`. fusion: along which they are averaged. Processes divide
    the frames.
    """
    fusion.begin()
    processes, (n_frames, _, height, width) = fusion.processes, inside.shape
    maps = FrameArray(fusion.path.with_name("differences.npy"))
    if processes.is_main:
        FrameArray.create(maps.path, inside.shape, torch.uint8)
    batches, sampled = processes.share(torch.arange(n_frames).split(BATCH)), sample_frames(n_frames)
    scale = height // differences.shape[2]  # pixels to a latent
    strongest = max(1e-6, differences[sampled].quantile(STRONG).item())
    for frames in tqdm(batches, "Finding mask", disable=not processes.is_main):
        measured = (differences[frames] / strongest).clamp(max=1)
        shown = F.interpolate(measured, (height, width), mode="bilinear")
        shown = (255 * shown).round().byte().permute(0, 2, 3, 1)
        fusion.put(frames, shown.expand(-1, -1, -1, 3).numpy())
    processes.wait()
    for frame in (frame for frames in batches for frame in frames.split(1)):
        steady = torch.from_numpy(fusion.average(frame, device)[0, ..., 0])
        picture = torch.from_numpy(source.picture(frame.item())).to(device)
        steady, picture = steady.to(device) / 255, picture.permute(2, 0, 1) / 255
        maps[frame] = (255 * draw_to_edges(steady, picture, scale)).round().byte()[None, None]
    processes.wait()
    every = max(1, scale // 2)  # pixel, which is enough to find what divides them
    coarse = [maps[frame][..., ::every, ::every].numpy() for frame in sampled.split(1)]
    outside, within = find_groups(np.stack(coarse))
    for frames in batches:
        inside[frames] = maps[frames] >= outside + BORDER * (within - outside)


def draw_to_edges(relevant: torch.Tensor, picture: torch.Tensor, scale: int) -> torch.Tensor:
    """Relevance (H, W), which is no finer than latents are, drawn to the edges in a picture.

    By a guided filter (He, Sun and Tang, ECCV 2010). picture: (3, H, W) in [0, 1]. scale: pixels to a side
    of a latent.
    """
    size = 2 * REACH * scale + 1
    return guided_blur(picture[None], relevant[None, None], size, EVEN)[0, 0].clamp(0, 1)


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
