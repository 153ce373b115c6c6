"""A tensor on disk with one row for each frame; only the requested rows are in memory."""

from pathlib import Path

import numpy as np
import torch

from tokenflow.errors import is_out_of_resources


class FrameArray:
    """A `.npy` file, indexed by frame indices (n,) as a tensor is.

    It is mapped only while rows are read, so that they do not stay in memory. It is written row by row, so
    that each process, even on another machine with the same disk, can write its own rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> "FrameArray":
        """A new file of zeros, which take no space until they are written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        np.lib.format.open_memmap(path, "w+", kind, tuple(shape))
        return cls(path)

    def ensure(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Create the file, unless a killed run left one of that shape."""
        try:
            fits = self.shape == tuple(shape)
        except (OSError, ValueError, EOFError) as error:
            if is_out_of_resources(error):
                raise
            fits = False
        if not fits:
            FrameArray.create(self.path, shape, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, frames first."""
        return self._mapped().shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._mapped()[frames.numpy()])

    def __setitem__(self, frames: torch.Tensor, values: torch.Tensor) -> None:
        mapped = self._mapped()
        rows = np.ascontiguousarray(values.cpu().numpy(), mapped.dtype)
        with self.path.open("r+b") as file:
            for frame, row in zip(frames.tolist(), rows, strict=True):
                file.seek(mapped.offset + frame * row.nbytes)
                file.write(row)

    def _mapped(self) -> np.memmap:
        return np.load(self.path, mmap_mode="r", allow_pickle=False)
