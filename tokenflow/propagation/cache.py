"""Keyframes between UNet passes: their tokens, outputs, keys, values and noise."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from tokenflow.runtime.transfer import to_device


@dataclass(frozen=True)
class BlendedRows:
    """Which two rows of the cache each of n frames blends; all tensors are where its layers' tokens are.

    rows, weights: (n, 2); the weights have the precision of the layers' outputs.
    places: for each row that has a weight, where it stands (m,) in `rows`, counted through it.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    places: dict[int, torch.Tensor]

    @classmethod
    def of(
        cls,
        rows: torch.Tensor,
        weights: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> "BlendedRows":
        """From rows and weights (n, 2) on the CPU, in one go for all layers."""
        on_device, places = send_with_places(rows, rows, weights > 0, device)
        return cls(on_device, to_device(weights, device, dtype), places)


def send_with_places(
    values: torch.Tensor, rows: torch.Tensor, is_used: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Integer values on a device, and for each row that is used, its places (m,) in `rows` (...).

    Places are counted through `rows`. All go to the device in one transfer.
    """
    used = torch.where(is_used, rows, -1).flatten()
    places = {row: (used == row).nonzero().flatten() for row in used.unique().tolist() if row >= 0}
    packed = to_device(torch.cat([values.flatten(), *places.values()]), device)
    first, *rest = packed.split([values.numel(), *map(len, places.values())])
    return first.view_as(values), dict(zip(places, rest, strict=True))


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

    def write(self, name: Hashable, positions: Sequence[int], values: torch.Tensor) -> None:
        """Set the rows (k, ...) of keyframes at `positions`, which have neighbouring rows or none yet."""
        self.positions += [position for position in positions if position not in self.positions]
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
