"""Where a frame's tokens are found in its keyframes: the tokens most alike, or where optical flow leads."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tokenflow.propagation.cache import BlendedRows, send_with_places
from tokenflow.propagation.nearest import find_nearest


def find_correspondences(
    tokens: torch.Tensor, key_tokens: torch.Tensor, blended: BlendedRows
) -> torch.Tensor:
    """The index of each token's nearest token in both keyframes of a blend (equation 3): (n, 2, s).

    tokens: (n, s, d), source tokens of the frames. key_tokens: (k, s, d), source tokens of the keyframes.
    blended: the blend of their rows. Where a weight is 0, the indices are 0.
    """
    n_frames, n_tokens, _ = tokens.shape
    nearest = torch.zeros(n_frames * 2, n_tokens, dtype=torch.long, device=tokens.device)
    for row, places in blended.places.items():
        nearest.index_copy_(0, places, find_nearest(tokens[places // 2], key_tokens[row]))
    return nearest.unflatten(0, (-1, 2))


def follow_flow(flow: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """The index of the token in which the flow from the centre of each of `n_tokens` ends: (..., s).

    flow: (..., h, w, 2), (dx, dy) in cells of the latents, from the centre of each; NaN where it fails, which
    gives -1. A token covers a square of cells, and takes the flow of the cell below and right of its centre.
    """
    side = math.isqrt(math.prod(flow.shape[-3:-1]) // n_tokens)  # of a token, in cells
    flow = flow[..., side // 2 :: side, side // 2 :: side, :].float() / side
    height, width = flow.shape[-3:-1]
    x = (torch.arange(width) + 0.5 + flow[..., 0]).floor().clamp(0, width - 1)
    y = (torch.arange(height)[:, None] + 0.5 + flow[..., 1]).floor().clamp(0, height - 1)
    return (y * width + x).nan_to_num(nan=-1).long().flatten(-2)


@dataclass(frozen=True)
class FlowCorrespondences:
    """Where the flow leads the tokens of n frames at one resolution; tensors are where the tokens are.

    targets: (n, 2, s), the indices of tokens in both keyframes; -1 where the flow fails.
    places: for each row of the cache in which tokens are searched then, where these stand (m,) in `targets`,
    counted through it.
    """

    targets: torch.Tensor
    places: dict[int, torch.Tensor]

    @classmethod
    def of(
        cls, targets: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, device: torch.device
    ) -> "FlowCorrespondences":
        """From targets (n, 2, s) and the rows and weights (n, 2) of a blend, all on the CPU."""
        is_searched = (targets < 0) & (weights > 0)[..., None]
        of_tokens = rows[..., None].expand_as(targets)
        return cls(*send_with_places(targets, of_tokens, is_searched, device))

    def find(self, tokens: torch.Tensor, key_tokens: torch.Tensor) -> torch.Tensor:
        """As `find_correspondences`, of which only those are searched for which the flow fails: (n, 2, s)."""
        found, sequence = self.targets.clamp(min=0).flatten(), tokens.flatten(0, 1)
        n_tokens = tokens.shape[1]
        for row, places in self.places.items():
            searched = sequence[places // (2 * n_tokens) * n_tokens + places % n_tokens]
            found.index_copy_(0, places, find_nearest(searched[None], key_tokens[row])[0])
        return found.view_as(self.targets)

    def complete(self, found: torch.Tensor) -> torch.Tensor:
        """As `find`, where all `find_correspondences` (n, 2, s) are `found` already."""
        return torch.where(self.targets < 0, found, self.targets)


def follow_flow_by_resolution(
    flow: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    levels: Iterable[int],
    device: torch.device,
) -> dict[int, FlowCorrespondences]:
    """Where flow (n, 2, h, w, 2) to both keyframes of a blend leads, by the number of a frame's tokens.

    rows, weights: (n, 2), of the blend. levels: how often a UNet halves the latents.
    """
    sizes = [math.prod(flow.shape[2:4]) // 4**level for level in levels]
    return {
        n_tokens: FlowCorrespondences.of(follow_flow(flow, n_tokens), rows, weights, device)
        for n_tokens in sizes
    }
