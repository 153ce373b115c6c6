"""What a killed edit leaves for the run that resumes it: whole arrays, with digests that reveal damage."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    """Latents (N, 4, h, w) by the number of steps done; only those after the last step are kept.

    Where the next step needs more of the last one than latents, that is its memory: (N, 4, h, w) as well.
    """

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

    def memory(self, steps_done: int) -> FrameArray | None:
        """The memory of the last of that many steps, if it is there and undamaged."""
        return self._memory_after(steps_done).find()

    @contextmanager
    def writing(
        self, steps_done: int, remembers: bool = False
    ) -> Iterator[tuple[FrameArray, FrameArray | None]]:
        """Yield the arrays in which all processes write their frames' latents and memory.

        They are those after `steps_done` steps; the memory is None unless the step `remembers`.
        """
        latents, memory = self._after(steps_done), self._memory_after(steps_done)
        with (
            latents.write(self.shape, torch.float32) as to_latents,
            memory.write(self.shape, torch.float32) if remembers else nullcontext() as to_memory,
        ):
            yield to_latents, to_memory
        if self.processes.is_main:
            self._after(steps_done - 1).remove()
            self._memory_after(steps_done - 1).remove()

    def _after(self, steps_done: int) -> KeptArray:
        return KeptArray(self.folder / f"{steps_done}.npy", self.processes)

    def _memory_after(self, steps_done: int) -> KeptArray:
        return KeptArray(self.folder / f"memory_{steps_done}.npy", self.processes)
