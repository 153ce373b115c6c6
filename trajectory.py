"""The latents of an edit on disk, after each of its steps: what a killed edit goes on from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from processes import Processes
from rows import Rows
from runs import partial_path, remove


class Trajectory:
    """Latents (N, 4, h, w) by the number of steps done; only those after the last step are kept."""

    def __init__(self, folder: Path, shape: tuple[int, ...], processes: Processes) -> None:
        self.folder, self.shape, self.processes = folder, shape, processes

    @property
    def steps_done(self) -> int | None:
        """Steps that are whole on disk; None before the initial latents are."""
        return max((int(path.stem) for path in self.folder.glob("[0-9]*.npy")), default=None)

    def latents(self, steps_done: int) -> Rows:
        """The latents after that many steps."""
        return Rows(self._file(steps_done))

    @contextmanager
    def writing(self, steps_done: int) -> Iterator[Rows]:
        """Latents for all processes to write their frames of, which are then those of so many steps."""
        path, is_main = self._file(steps_done), self.processes.is_main
        if is_main:
            Rows.create(partial_path(path), self.shape, torch.float32)
        self.processes.wait()
        yield Rows(partial_path(path))
        self.processes.wait()
        if is_main:
            partial_path(path).replace(path)
            remove(self._file(steps_done - 1))
        self.processes.wait()

    def _file(self, steps_done: int) -> Path:
        return self.folder / f"{steps_done}.npy"
