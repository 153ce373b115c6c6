"""Classifier-free guidance from the keyframes: what guides each frame, how strongly, and where.

Guidance adds to the noise under the prompt a multiple of its difference from the noise under the negative
prompt (Ho and Salimans, arXiv 2207.12598). That difference moves along the correspondences as the outputs of
a layer do, so that the keyframes' is propagated to the frames between them, for which the negative prompt
need not be evaluated. And it amplifies all that the prompt names, also what the source's prompt names too;
hence it is weaker where the two prompts predict much the same.
"""

import math
from collections.abc import Collection
from enum import Enum

import torch
import torch.nn.functional as F

from tokenflow.config import EditConfig
from tokenflow.propagation.cache import BlendedRows
from tokenflow_utils import COND, UNCOND, propagate

WINDOW = 5  # latent pixels across, over which the prompts' differences are averaged
LATE = (
    0.44  # the share of the steps, the last ones, in which propagated differences lose fine detail
)
ALONE = (
    0.3  # the share of the steps, the first ones, in which no frame can do without an evaluation
)


class Guidance(Enum):
    """Where the frames of a step have their guiding differences from."""

    NONE = "no difference, since the guidance scale is 1"
    EVERY_FRAME = "each frame's own"
    KEYFRAMES = "that of the keyframes, propagated"
    REUSED = "each frame's in the step before"
    ALONE = "as KEYFRAMES; other frames are not evaluated, but moved by what the keyframes change"

    @property
    def evaluates_difference(self) -> bool:
        """Whether the keyframes are evaluated under the negative prompt."""
        return self not in (Guidance.NONE, Guidance.REUSED)

    @property
    def needs_memory(self) -> bool:
        """Whether each frame needs something of the step before, besides its latents."""
        return self in (Guidance.REUSED, Guidance.ALONE)


def plan_guidance(
    config: EditConfig, n_steps: int, consensus_steps: Collection[int]
) -> list[Guidance]:
    """The guidance of each of the steps of an edit, of which some end with a consensus."""
    if config.guidance_scale == 1:
        plan = [Guidance.NONE] * n_steps
    elif config.guides_every_frame:
        plan = [Guidance.EVERY_FRAME] * n_steps
    else:
        plan = [Guidance.KEYFRAMES] * n_steps
        late = 0 if config.alternate else int(LATE * n_steps)
        for before_last in range(late):
            kinds = Guidance.REUSED, Guidance.EVERY_FRAME
            plan[n_steps - 1 - before_last] = kinds[before_last % 2]
    if config.alternate:  # never two steps in a row, and never the last one
        for step in range(int(ALONE * n_steps), n_steps - 1):
            if step not in consensus_steps and step > 0 and plan[step - 1] != Guidance.ALONE:
                plan[step] = Guidance.ALONE
    return plan


def guide(uncond: torch.Tensor, cond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance: the noise of both streams (n, 4, h, w) as one; scale: also (n, 1, h, w)."""
    return uncond + scale * (cond - uncond)


def guide_streams(
    noise: dict[int, torch.Tensor], scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The guided noise of streams, and the difference from the prompt's: (n, 4, h, w) each."""
    if UNCOND not in noise:
        return noise[COND], torch.zeros_like(noise[COND])
    guided = guide(noise[UNCOND], noise[COND], scale)
    return guided, guided - noise[COND]


def find_difference(cond: torch.Tensor, unedited: torch.Tensor) -> torch.Tensor:
    """How far the noise (n, 4, h, w) under two prompts differs around each place: (n, 1, h, w)."""
    difference = (cond - unedited).abs().mean(1, keepdim=True)
    return F.avg_pool2d(difference, WINDOW, 1, WINDOW // 2, count_include_pad=False)


def find_scale(difference: torch.Tensor, strong: torch.Tensor, scale: float) -> torch.Tensor:
    """The guidance scale at each place (n, 1, h, w): `scale` where the prompts differ strongly, else less.

    difference: of `find_difference`. strong: (), the least that is strong. Where the prompts agree it is 1.
    """
    return 1 + (scale - 1) * (difference / strong.clamp(min=1e-12)).clamp(max=1)


def propagate_maps(maps: torch.Tensor, nearest: torch.Tensor, blended: BlendedRows) -> torch.Tensor:
    """Propagate maps (k, c, h, w) of the keyframes, of the latents' size, to n frames: (n, c, h, w).

    nearest: (n, 2, s), the correspondences of a layer, in which a token covers a square of latent pixels.
    """
    height, width = maps.shape[-2:]
    side = math.isqrt(height * width // nearest.shape[-1])
    tokens = F.pixel_unshuffle(maps, side).flatten(2).transpose(1, 2)  # k s d
    propagated = propagate(tokens, nearest, blended).transpose(1, 2)  # n d s
    return F.pixel_shuffle(propagated.unflatten(2, (height // side, width // side)), side)
