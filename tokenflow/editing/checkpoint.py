"""The latents of an edit on disk, after each of its steps: what a killed edit is resumed from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tokenflow.runtime.digests import file_digest
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.run_folder import remove, unfinished_path


class EditCheckpoint:
    """Latents (N, 4, h, w) by the number of steps done; only those after the last step are kept."""

    def __init__(self, folder: Path, shape: tuple[int, ...], processes: Processes) -> None:
        self.folder, self.shape, self.processes = folder, shape, processes

    @property
    def steps_done(self) -> int | None:
        """The most steps whose latents are on disk, undamaged; None without even the initial latents."""
        written = (int(path.stem) for path in self.folder.glob("[0-9]*.npy"))
        return max(filter(self._is_whole, written), default=None)

    def latents(self, steps_done: int) -> FrameArray:
        """The latents after that many steps."""
        return FrameArray(self._file(steps_done))

    @contextmanager
    def writing(self, steps_done: int) -> Iterator[FrameArray]:
        """Yield an array in which all processes write their frames' latents after `steps_done` steps."""
        path, is_main = self._file(steps_done), self.processes.is_main
        if is_main:
            FrameArray.create(unfinished_path(path), self.shape, torch.float32)
        self.processes.wait()
        yield FrameArray(unfinished_path(path))
        self.processes.wait()
        if is_main:
            self._digest_file(steps_done).write_text(file_digest(unfinished_path(path)))
            unfinished_path(path).replace(path)
            remove(self._file(steps_done - 1))
            remove(self._digest_file(steps_done - 1))
        self.processes.wait()

    def _is_whole(self, steps_done: int) -> bool:
        digest, latents = self._digest_file(steps_done), self._file(steps_done)
        return digest.is_file() and digest.read_bytes() == file_digest(latents).encode()

    def _digest_file(self, steps_done: int) -> Path:
        return self._file(steps_done).with_suffix(".digest")

    def _file(self, steps_done: int) -> Path:
        return self.folder / f"{steps_done}.npy"
