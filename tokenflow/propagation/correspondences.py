"""Where a frame's tokens are found in its keyframes: the tokens most alike, or where optical flow leads."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tokenflow.propagation.cache import BlendedRows
from tokenflow.propagation.nearest import nearest_tokens
from tokenflow.runtime.transfer import to_device


def correspondences(
    tokens: torch.Tensor, key_tokens: torch.Tensor, blended: BlendedRows
) -> torch.Tensor:
    """The index of each token's nearest token in both keyframes of a blend (equation 3): (n, 2, s).

    tokens: (n, s, d), source tokens of the frames. key_tokens: (k, s, d), source tokens of the keyframes.
    blended: the blend of their rows. Where a weight is 0, the indices are 0.
    """
    n_frames, n_tokens, _ = tokens.shape
    nearest = torch.zeros(n_frames * 2, n_tokens, dtype=torch.long, device=tokens.device)
    for row, frames, places in blended.searches:
        nearest.index_copy_(0, places, nearest_tokens(tokens[frames], key_tokens[row]))
    return nearest.unflatten(0, (-1, 2))


def tokens_along(flows: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """The index of the token in which the flow from the centre of each of `n_tokens` ends: (..., s).

    flows: (..., h, w, 2), (dx, dy) in cells of the latents, from the centre of each; NaN where they fail,
    which gives -1. A token covers a square of cells, and takes the flow of the cell below and right of its
    centre.
    """
    side = math.isqrt(math.prod(flows.shape[-3:-1]) // n_tokens)  # of a token, in cells
    flows = flows[..., side // 2 :: side, side // 2 :: side, :].float() / side
    height, width = flows.shape[-3:-1]
    x = (torch.arange(width) + 0.5 + flows[..., 0]).floor().clamp(0, width - 1)
    y = (torch.arange(height)[:, None] + 0.5 + flows[..., 1]).floor().clamp(0, height - 1)
    return (y * width + x).nan_to_num(nan=-1).long().flatten(-2)


@dataclass(frozen=True)
class Led:
    """Where the flow leads the tokens of n frames at one resolution; tensors are where the tokens are.

    targets: (n, 2, s), the indices of tokens in both keyframes; -1 where the flow fails. searches: for each
    row of the cache in which some are searched then, the searched tokens (m,), counted through all frames',
    and their places (m,), counted through `targets`.
    """

    targets: torch.Tensor
    searches: tuple[tuple[int, torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(
        cls, targets: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, device: torch.device
    ) -> "Led":
        """From targets (n, 2, s) and the rows and weights (n, 2) of a blend, all on the CPU."""
        searched = torch.where((targets < 0) & (weights > 0)[..., None], rows[..., None], -1)
        used = [row for row in searched.unique().tolist() if row >= 0]
        places = [(searched == row).flatten().nonzero().flatten() for row in used]
        packed = to_device(torch.cat([targets.flatten(), *places]), device)
        of_targets, *places = packed.split([targets.numel(), *map(len, places)])
        n_tokens = targets.shape[-1]
        tokens = (place // (2 * n_tokens) * n_tokens + place % n_tokens for place in places)
        return cls(of_targets.view_as(targets), tuple(zip(used, tokens, places, strict=True)))

    def searched(self, tokens: torch.Tensor, key_tokens: torch.Tensor) -> torch.Tensor:
        """As `correspondences`, of which only those are searched for which the flow fails: (n, 2, s)."""
        found, sequence = self.targets.clamp(min=0).flatten(), tokens.flatten(0, 1)
        for row, of_tokens, places in self.searches:
            nearest = nearest_tokens(sequence[of_tokens][None], key_tokens[row])
            found.index_copy_(0, places, nearest[0])
        return found.view_as(self.targets)

    def completed(self, found: torch.Tensor) -> torch.Tensor:
        """As `searched`, where all `correspondences` (n, 2, s) are `found` already."""
        return torch.where(self.targets < 0, found, self.targets)


def led_by_resolution(
    flows: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    levels: Iterable[int],
    device: torch.device,
) -> dict[int, Led]:
    """Where flows (n, 2, h, w, 2) to both keyframes of a blend lead, by the number of a frame's tokens.

    rows, weights: (n, 2), of the blend. levels: how often a UNet halves the latents.
    """
    height, width = flows.shape[2:4]
    sizes = [height * width // 4**level for level in levels]
    return {s: Led.of(tokens_along(flows, s), rows, weights, device) for s in sizes}
