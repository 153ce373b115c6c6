"""Parts of a batch that pass a network in turns, and see each other where they must."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError, Lock
from typing import TypeVar

import torch

P = TypeVar("P")
R = TypeVar("R")
Gather = Callable[[torch.Tensor], torch.Tensor]


def in_turns(function: Callable[[P, Gather], R], parts: Sequence[P]) -> list[R]:
    """The results of `function(part, gather)` for parts that need what the others compute on the way.

    `gather` takes a tensor (n, ...) of one part and returns those of all parts, joined in their order; each
    part must call it equally often. A part runs in a thread of its own, unless it is the only one, and works
    alone until it calls `gather` again, so that what it needs for a moment is needed once.
    """
    if len(parts) == 1:
        return [function(parts[0], lambda tensor: tensor)]
    offered: list[torch.Tensor | None] = [None] * len(parts)
    joined: torch.Tensor | None = None

    def join() -> None:
        nonlocal joined
        joined = torch.cat(offered)

    meeting, work = Barrier(len(parts), join), Lock()

    def run(index: int) -> R:
        def gather(tensor: torch.Tensor) -> torch.Tensor:
            offered[index] = tensor
            work.release()
            try:
                meeting.wait()
            finally:
                work.acquire()
            return joined

        try:
            with work:
                return function(parts[index], gather)
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(len(parts)) as threads:
        futures = [threads.submit(run, index) for index in range(len(parts))]
    failures = [failure for future in futures if (failure := future.exception())]
    for failure in failures:
        if not isinstance(failure, BrokenBarrierError):  # which says that another part has failed
            raise failure
    return [future.result() for future in futures]
