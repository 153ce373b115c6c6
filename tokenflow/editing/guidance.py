"""Classifier-free guidance from the keyframes, and only where the prompts differ.

Guidance (Ho and Salimans, arXiv 2207.12598) adds to the noise under the prompt a multiple of its difference
from the noise under the negative prompt. That difference moves along the correspondences as the outputs of a
layer do. So the keyframes' is propagated to the frames between them, for which the negative prompt need not
be evaluated. And guidance amplifies all that the prompt names, also what the source's prompt names too; so it
is weaker where the two predict much the same.
"""

import math

import torch
import torch.nn.functional as F

from tokenflow.propagation.cache import BlendedRows
from tokenflow_utils import COND, UNCOND, propagate

WINDOW = 5  # latent pixels across, over which the prompts' differences are averaged


def guide(
    noise: dict[int, torch.Tensor], scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The guided noise of streams (n, 4, h, w), and what guidance adds to the prompt's noise.

    scale: one for all, or (n, 1, h, w). Without uncond nothing is added.
    """
    uncond, cond = noise.get(UNCOND), noise[COND]
    if uncond is None:
        return cond, torch.zeros_like(cond)
    guided = uncond + scale * (cond - uncond)
    return guided, guided - cond


def find_difference(cond: torch.Tensor, unedited: torch.Tensor) -> torch.Tensor:
    """How far the noise (n, 4, h, w) under two prompts differs around each place: (n, 1, h, w)."""
    difference = (cond - unedited).abs().mean(1, keepdim=True)
    return F.avg_pool2d(difference, WINDOW, 1, WINDOW // 2, count_include_pad=False)


def find_groups(difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of the weak differences and that of the strong ones, () each.

    They are parted by the threshold of Otsu (IEEE Transactions on Systems, Man, and Cybernetics 9, 1979).
    difference: of `find_difference`, at least two.
    """
    values = difference.flatten().float().sort().values
    below, n = torch.arange(1, len(values), device=values.device), len(values)
    sums = values.cumsum(0)
    weak, strong = sums[:-1] / below, (sums[-1] - sums[:-1]) / (n - below)
    best = (below * (n - below) * (strong - weak).square()).argmax()
    return weak.take(best), strong.take(best)  # an index would wait for the GPU


def find_relevance(
    difference: torch.Tensor, groups: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """How far the prompts differ at each place, 0 to 1: (n, 1, h, w).

    difference: of `find_difference`. groups: of `find_groups`. It is 1 from half of the way between them on.
    Weak differences count as none, if the groups are far apart: else the prompts differ everywhere.
    """
    weak, strong = groups
    whole, floor = (weak + strong) / 2, torch.minimum(weak, strong - weak)
    return ((difference - floor) / (whole - floor).clamp(min=1e-12)).clamp(0, 1)


def propagate_maps(maps: torch.Tensor, nearest: torch.Tensor, blended: BlendedRows) -> torch.Tensor:
    """Propagate maps (k, c, h, w) of the keyframes, of the latents' size, to n frames: (n, c, h, w).

    nearest: (n, 2, s), the correspondences of a layer, in which a token covers a square of latent pixels.
    """
    height, width = maps.shape[-2:]
    side = math.isqrt(height * width // nearest.shape[-1])
    tokens = F.pixel_unshuffle(maps, side).flatten(2).transpose(1, 2)  # k s d
    propagated = propagate(tokens, nearest, blended).transpose(1, 2)  # n d s
    return F.pixel_shuffle(propagated.unflatten(2, (height // side, width // side)), side)
