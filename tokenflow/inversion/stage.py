"""One stage of a run: chunks of frames that the processes divide, each of which is done once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from tokenflow.inversion.files import FrameFiles
from tokenflow.runtime.ahead import WriteBehind
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.run_folder import Progress


@dataclass(frozen=True)
class Stage:
    """What this process does of a stage, and remembers in `progress`.

    bar: the caller counts the steps of the chunks there. writer: writes while the device computes.
    """

    name: str
    progress: Progress
    processes: Processes
    writer: WriteBehind
    bar: tqdm

    def missing(
        self, chunks: Sequence[torch.Tensor], files: FrameFiles, part: str = "all", n_steps: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield those chunks (n,) of a part of the stage that this process has yet to do.

        A chunk is recorded as done when the caller asks for the next one. files: what is written of it.
        n_steps: of each chunk in this part.
        """
        for frames in self.processes.share(chunks):
            name = f"{self.name}_{part}_{frames[0].item()}_{len(frames)}"
            if self.progress.is_done(name, files.read(frames)):
                self.bar.update(n_steps)
                continue
            yield frames
            self.writer.later(self.progress.record, name, files.read(frames))
