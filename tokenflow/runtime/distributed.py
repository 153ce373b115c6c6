"""The processes of one run (`accelerate launch`, `torchrun`), which share its work through its files."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState

from tokenflow.errors import UserError

T = TypeVar("T")

# A dead process ends the others at once, so a long wait means long work, such as reading a whole video.
PATIENCE = timedelta(days=7)


class Processes:
    """This process and the others of its run, which may be this process alone.

    device: where this process computes. Each thread has its own current GPU, at first the one of index 0, so
    the index stands in it.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises UserError for more processes on this machine than GPUs."""
        n_here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # of torchrun and accelerate
        n_gpus = torch.cuda.device_count() if device.index is None else 1  # `cuda:1` is one
        if device.type == "cuda" and n_here > max(1, n_gpus):
            raise UserError(
                f"device: {n_here} processes were started on {device}, where {n_gpus} can have a GPU of its "
                f"own; use --num_processes {n_gpus}"
            )
        self._state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        is_any_gpu = device == torch.device("cuda")
        self.device = torch.device("cuda", torch.cuda.current_device()) if is_any_gpu else device

    @property
    def is_main(self) -> bool:
        """Whether this process does the work that is done only once."""
        return self._state.is_main_process

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """This process's parts of the work: neighbours, as many as any other process has, or one fewer."""
        count, index = self._state.num_processes, self._state.process_index
        return parts[len(parts) * index // count : len(parts) * (index + 1) // count]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process enters the block alone; the others follow when it has left."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def wait(self) -> None:
        """Wait until all processes are here. Raises ConnectionError when one of them is gone."""
        try:
            self._state.wait_for_everyone()
        except RuntimeError as error:
            raise ConnectionError("another process of this run has failed") from error
