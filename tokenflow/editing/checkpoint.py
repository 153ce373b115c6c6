"""What a killed edit leaves for the run that resumes it: whole arrays, with digests that reveal damage."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenflow.runtime.digests import file_digest
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.run_folder import remove, unfinished_path


@dataclass(frozen=True)
class KeptArray:
    """A tensor of all frames on disk, which the processes of a run write together."""

    path: Path
    processes: Processes

    def find(self) -> FrameArray | None:
        """The array, if it is there and undamaged."""
        whole = self._digest.is_file() and self.path.is_file()
        whole = whole and self._digest.read_bytes() == file_digest(self.path).encode()
        return FrameArray(self.path) if whole else None

    @contextmanager
    def write(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[FrameArray]:
        """Yield the array for each process to write its frames; it is there when the block ends."""
        unfinished, is_main = FrameArray(unfinished_path(self.path)), self.processes.is_main
        if is_main:
            FrameArray.create(unfinished.path, shape, dtype)
        self.processes.wait()
        yield unfinished
        self.processes.wait()
        if is_main:
            self._digest.write_text(file_digest(unfinished.path))
            unfinished.path.replace(self.path)
        self.processes.wait()

    def remove(self) -> None:
        """Delete the array, if it is there."""
        remove(self.path)
        remove(self._digest)

    @property
    def _digest(self) -> Path:
        return self.path.with_suffix(".digest")


class EditCheckpoint:
    """Latents (N, 4, h, w) by the number of steps done; only those after the last step are kept."""

    def __init__(self, folder: Path, shape: tuple[int, ...], processes: Processes) -> None:
        self.folder, self.shape, self.processes = folder, shape, processes

    @property
    def steps_done(self) -> int | None:
        """The most steps whose latents are on disk, undamaged; None without even the initial latents."""
        written = (int(path.stem) for path in self.folder.glob("[0-9]*.npy"))
        return max((n for n in written if self._after(n).find() is not None), default=None)

    def latents(self, steps_done: int) -> FrameArray:
        """The latents after that many steps."""
        return FrameArray(self._after(steps_done).path)

    @contextmanager
    def writing(self, steps_done: int) -> Iterator[FrameArray]:
        """Yield an array in which all processes write their frames' latents after `steps_done` steps."""
        with self._after(steps_done).write(self.shape, torch.float32) as latents:
            yield latents
        if self.processes.is_main:
            self._after(steps_done - 1).remove()

    def _after(self, steps_done: int) -> KeptArray:
        return KeptArray(self.folder / f"{steps_done}.npy", self.processes)
