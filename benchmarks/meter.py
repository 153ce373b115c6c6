"""What a stage costs: seconds, UNet evaluations of one sample, and peak memory beyond what it began with."""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets the peak to what is resident now


@dataclass
class Cost:
    """Seconds, evaluations of single samples, and MB."""

    seconds: float = 0.0
    evaluations: int = 0
    peak_mb: float = 0.0


class Meter:
    """Counts what passes a UNet, and measures stages by name."""

    def __init__(self, device: torch.device, unet: nn.Module | None = None) -> None:
        self.device = device
        self.stages: dict[str, Cost] = {}
        self.evaluations = 0
        if unet:
            self.watch(unet)

    def watch(self, unet: nn.Module) -> None:
        """Count what passes this UNet, too."""
        unet.register_forward_pre_hook(self._count)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block as the stage `name`."""
        began, evaluations = self._begin_memory(), self.evaluations
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        peak = self._peak() - began
        self.stages[name] = Cost(seconds, self.evaluations - evaluations, peak)

    def _count(self, module: nn.Module, args: tuple) -> None:
        self.evaluations += len(args[0])

    def _begin_memory(self) -> float:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device) / 1e6
        ctypes.CDLL(None).malloc_trim(0)  # what the last stage left must not serve this one unseen
        CLEAR_REFS.write_text(RESET_PEAK)
        return self._peak()

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
