"""Keyframes between UNet passes: their tokens, outputs, keys, values and noise."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from tokenflow.runtime.transfer import to_device


@dataclass(frozen=True)
class BlendedRows:
    """Which two rows of the cache each of n frames blends; all tensors are where its layers' tokens are.

    The weights have the precision of the layers' outputs.

    rows, weights: (n, 2). searches: for each row that has a weight, the frames (m,) that blend it, and
    their places (m,) in `rows`, counted through it.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    searches: tuple[tuple[int, torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(
        cls,
        rows: torch.Tensor,
        weights: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> "BlendedRows":
        """From rows and weights (n, 2) on the CPU, in one go for all layers."""
        blended = torch.where(weights > 0, rows, -1).flatten()
        used = blended[blended >= 0].unique().tolist()
        places = [(blended == row).nonzero().flatten() for row in used]
        packed = to_device(torch.cat([rows.flatten(), *places]), device)
        of_rows, *places = packed.split([rows.numel(), *map(len, places)])
        frames = (place // 2 for place in places)
        searches = tuple(zip(used, frames, places, strict=True))
        return cls(of_rows.view_as(rows), to_device(weights, device, dtype), searches)


class KeyframeCache:
    """Tensors by name, each with one row for every keyframe that is still needed."""

    def __init__(self) -> None:
        self.positions: list[int] = []  # of the keyframes, in the order of their rows
        self._tensors: dict[Hashable, torch.Tensor] = {}

    def keep(self, positions: Sequence[int]) -> None:
        """Forget all keyframes except those at `positions`."""
        kept = {name: self.read(name, positions) for name in self._tensors if positions}
        self._tensors = {name: torch.stack(rows) for name, rows in kept.items()}
        self.positions = list(positions)

    def add(self, positions: Sequence[int]) -> None:
        """Make rows for the keyframes at `positions`, unless they have one."""
        self.positions += [position for position in positions if position not in self.positions]

    def write(self, name: Hashable, positions: Sequence[int], values: torch.Tensor) -> None:
        """Set the rows (k, ...) of keyframes at `positions`, which must have neighbouring rows."""
        first = self.positions.index(positions[0])
        tensor = self._tensors.get(name, values[:0])
        if len(tensor) < first + len(values):
            before = tensor
            tensor = values.new_empty(len(self.positions), *values.shape[1:])
            tensor[: len(before)] = before
            self._tensors[name] = tensor
        tensor[first : first + len(values)] = values

    def tensor(self, name: Hashable) -> torch.Tensor:
        """All rows (k, ...) of a tensor."""
        return self._tensors[name]

    def read(self, name: Hashable, positions: Sequence[int]) -> list[torch.Tensor]:
        """The rows (...) of the keyframes at `positions`."""
        return [self._tensors[name][self.positions.index(position)] for position in positions]

    def rows(self, positions: torch.Tensor) -> torch.Tensor:
        """The row of each position, in the same shape."""
        row_of = torch.zeros(max(self.positions) + 1, dtype=torch.long)
        row_of[self.positions] = torch.arange(len(self.positions))
        return row_of[positions]

    def blended(
        self,
        positions: torch.Tensor,
        weights: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> BlendedRows:
        """What frames of these positions and weights (n, 2) blend, for layers on `device` in `dtype`."""
        return BlendedRows.of(self.rows(positions), weights, device, dtype)
