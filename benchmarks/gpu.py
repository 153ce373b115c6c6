"""What a GPU can do at best, and the fused search for nearest tokens beside its reference."""

import time
from collections.abc import Callable
from functools import partial

import torch

from tokenflow.propagation.nearest import find_nearest, find_nearest_in_blocks


def seconds_of(function: Callable[[], torch.Tensor], repeats: int = 5) -> float:
    """The least time that a function takes on the GPU."""
    least = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        least = min(least, time.perf_counter() - start)
    return least


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Floating point operations a second of a large product of matrices."""
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds_of(lambda: matrix @ matrix)


def fused_kernel(device: torch.device) -> list[dict]:
    """The fused search for nearest tokens beside its reference, on a layer of each width."""
    rows = []
    for n_tokens, depth in ((4096, 320), (1024, 640), (256, 1280)):
        tokens = torch.randn(8, n_tokens, depth, device=device, dtype=torch.float16)
        keys = torch.randn(n_tokens, depth, device=device, dtype=torch.float16)
        ways = {"fused": find_nearest, "reference": find_nearest_in_blocks}
        found = {name: way(tokens, keys) for name, way in ways.items()}
        seconds = {name: seconds_of(partial(way, tokens, keys)) for name, way in ways.items()}
        equal = (found["fused"] == found["reference"]).float().mean().item()
        rows.append({"tokens": n_tokens, "depth": depth, "equal_share": equal} | seconds)
    return rows
