"""What stages cost: seconds, UNet evaluations and peak memory; on a GPU operations and waits, too."""

import ctypes
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets the peak to what is resident now
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Cost:
    """What a stage took.

    evaluations: of single samples by the UNet. peak_mb: memory beyond what was held when the stage began.
    tflop and blocking, of a meter that counts: operations of matrix products, convolutions and attention;
    operations for which the host waited for the GPU.
    """

    seconds: float
    evaluations: int
    peak_mb: float
    tflop: float = 0.0
    blocking: int = 0


def find_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The mean number of seconds that a call takes, after one that does not count."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.timeit(repeats).mean


def find_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The operations per second of large products of matrices, which no pass exceeds."""
    width = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(width, width, device=device, dtype=dtype)
    return 2 * width**3 / find_seconds(lambda: matrix @ matrix)


class Meter:
    """Measures stages by name. One that `counts` takes more time than it would without."""

    def __init__(self, device: torch.device = CPU, counts: bool = False) -> None:
        self.device, self.counts = device, counts
        self.stages: dict[str, Cost] = {}
        self.evaluations = 0

    def watch(self, unet: nn.Module) -> None:
        """Count what passes this UNet, too."""
        unet.register_forward_pre_hook(self._count)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block as the stage `name`."""
        began, evaluations = self._begin_memory(), self.evaluations
        flops = FlopCounterMode(display=False)
        start = time.perf_counter()
        if self.counts:
            with flops, self._waits() as waits:
                yield
        else:
            waits = []
            yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        peak, evaluations = self._peak() - began, self.evaluations - evaluations
        tflop = flops.get_total_flops() / 1e12
        self.stages[name] = Cost(seconds, evaluations, peak, tflop, len(waits))

    def _count(self, module: nn.Module, args: tuple) -> None:
        self.evaluations += len(args[0])

    @contextmanager
    def _waits(self) -> Iterator[list[warnings.WarningMessage]]:
        """One warning for each time that the host waits for the GPU in the block."""
        with warnings.catch_warnings(record=True) as waits:
            warnings.filterwarnings("ignore")
            warnings.filterwarnings("always", "called a synchronizing CUDA operation")
            if self.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                if self.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")

    def _begin_memory(self) -> float:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device) / 1e6
        if CLEAR_REFS.exists():  # Linux alone
            # What the last stage left must not serve this one unseen.
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR_REFS.write_text(RESET_PEAK)
        return self._peak()

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        if not STATUS.exists():
            return 0.0
        (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
