"""Keyframes between UNet passes: their tokens, outputs, keys, values and noise."""

from collections.abc import Hashable, Sequence

import torch


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
