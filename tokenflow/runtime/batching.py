"""Frames pass a network in batches, whose size affects memory and speed but not the result."""

import gc
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache

from tokenflow.errors import is_out_of_memory

log = logging.getLogger("tokenflow")

MOST_SAMPLES = 32  # of a pass on a GPU; more are not expected to be more efficient


def frames_per_pass(chosen: int | None, default: int, n_streams: int, device: torch.device) -> int:
    """The frames that pass the UNet together: as many as were `chosen`, or else as suit the device.

    It is the same in all processes of a run. default: for a device that is no GPU.
    """
    if chosen is None and device.type == "cuda":
        return MOST_SAMPLES // n_streams
    return chosen or default


def split_evenly(items: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Split items (n,) into the fewest parts of at most `size`, of lengths as equal as possible.

    Libraries cache their kernels for each length that they meet, so fewer lengths take less memory.
    """
    return items.tensor_split(-(-len(items) // size)) if len(items) else ()


class Limits:
    """How many items fit in memory at once, by the kind of pass, as far as failures have taught.

    folder: of a run's progress files, where a resumed run finds them; without it they end with the process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self._known = folder, {}

    def of(self, kind: str) -> int:
        """The most items that a pass of that kind may take."""
        if kind not in self._known and self.folder:
            with suppress(OSError, ValueError):  # no pass has failed, or the file is damaged
                self._known[kind] = max(1, int(self._file(kind).read_bytes()))
        return self._known.get(kind, sys.maxsize)

    def lower(self, kind: str, size: int) -> None:
        """Passes of that kind take at most `size` items from now on."""
        self._known[kind] = size
        if self.folder:
            self.folder.mkdir(exist_ok=True)
            self._file(kind).write_bytes(str(size).encode())

    def keep_in(self, folder: Path) -> "Limits":
        """These limits, which stay common; what fails from now on is kept in the folder of another run."""
        limits = Limits(folder)
        limits._known = self._known
        return limits

    def _file(self, kind: str) -> Path:
        return self.folder / f"at_once_{kind}"


class Batches:
    """How many items pass at once: a fixed number, or one that is halved when memory runs out.

    limits: what passes of this `kind` have taught, before and from now on.
    """

    def __init__(
        self, size: int, adapts: bool = True, limits: Limits | None = None, kind: str = "any"
    ) -> None:
        self._size, self.adapts, self.kind = size, adapts, kind
        self._limits = limits or Limits()

    @property
    def size(self) -> int:
        """The most items that pass at once."""
        return min(self._size, self._limits.of(self.kind)) if self.adapts else self._size

    def map(self, function: Callable[..., torch.Tensor], *items: torch.Tensor) -> torch.Tensor:
        """Apply `function` to tensors of n items each, batch by batch; returns one tensor (n, ...)."""

        def run(size: int) -> torch.Tensor:
            return function(*(values[done : done + size] for values in items))

        results, done = [], 0
        while done < len(items[0]):
            results.append(self.fit(run, len(items[0]) - done))
            done += len(results[-1])
        return torch.cat(results)

    def fit(self, function: Callable[[int], torch.Tensor], n_items: int) -> torch.Tensor:
        """The result of `function` for the largest number of items, up to `n_items`, that fits."""
        while True:
            size = min(self.size, n_items)
            try:
                return function(size)
            except RuntimeError as error:
                if not (self.adapts and size > 1 and is_out_of_memory(error)):
                    raise
            # After the handler, because the error refers to the memory that must be freed.
            self._limits.lower(self.kind, size // 2)
            log.warning("out of memory with %d at once (%s): now %d", size, self.kind, self.size)
            gc.collect()
            clear_device_cache()
