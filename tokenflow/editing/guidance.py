"""Classifier-free guidance from the keyframes.

Guidance (Ho and Salimans, arXiv 2207.12598) adds to the noise under the prompt a multiple of its difference
from the noise under the negative prompt. That difference moves along the correspondences as the outputs of a
layer do. So the keyframes' is propagated to the frames between them, for which the negative prompt need not
be evaluated.
"""

import math

import torch
import torch.nn.functional as F

from tokenflow.propagation.cache import BlendedRows
from tokenflow_utils import COND, UNCOND, propagate


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


def propagate_maps(maps: torch.Tensor, nearest: torch.Tensor, blended: BlendedRows) -> torch.Tensor:
    """Propagate maps (k, c, h, w) of the keyframes, of the latents' size, to n frames: (n, c, h, w).

    nearest: (n, 2, s), the correspondences of a layer, in which a token covers a square of latent pixels.
    """
    height, width = maps.shape[-2:]
    side = math.isqrt(height * width // nearest.shape[-1])
    tokens = F.pixel_unshuffle(maps, side).flatten(2).transpose(1, 2)  # k s d
    propagated = propagate(tokens, nearest, blended).transpose(1, 2)  # n d s
    return F.pixel_shuffle(propagated.unflatten(2, (height // side, width // side)), side)
