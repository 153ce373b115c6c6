"""Parts of a batch that pass a network in turns, and see each other where they must."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

P = TypeVar("P")
R = TypeVar("R")
Gather = Callable[[torch.Tensor], torch.Tensor]


class _Abandoned(Exception):
    """Another part has failed."""


class _Turns:
    """Whose turn it is: one of n threads works at any time, from the first to the last and over again."""

    def __init__(self, n: int) -> None:
        self._wakes = [threading.Semaphore(0) for _ in range(n)]
        self._met: list[torch.Tensor] = []
        self.failed = False

    def begin(self, index: int) -> None:
        """Wait for the turn of part `index`."""
        self._wakes[index].acquire()
        if self.failed:
            raise _Abandoned

    def end(self, index: int) -> None:
        """Give the turn to the next part."""
        self._wakes[(index + 1) % len(self._wakes)].release()

    def gather(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """Offer a tensor (n, ...), wait until every part has, and return all of them, joined."""
        met = self._met
        met.append(tensor)
        if len(met) == len(self._wakes):
            self._met = []
        self.end(index)
        self.begin(index)
        return torch.cat(met)


def in_turns(function: Callable[[P, Gather], R], parts: Sequence[P]) -> list[R]:
    """The results of `function(part, gather)` for parts that need what the others compute on the way.

    `gather` takes a tensor (n, ...) of one part and returns those of all parts, joined in their order. Each
    part must call it equally often. Between two calls only one part works, so that what it needs for a
    moment is needed once; each part runs in a thread of its own, unless there is only one.
    """
    if len(parts) == 1:
        return [function(parts[0], lambda tensor: tensor)]
    turns = _Turns(len(parts))

    def work(index: int) -> R:
        try:
            turns.begin(index)
            return function(parts[index], lambda tensor: turns.gather(index, tensor))
        except BaseException:
            turns.failed = True
            raise
        finally:
            turns.end(index)

    with ThreadPoolExecutor(len(parts)) as pool:
        working = [pool.submit(work, index) for index in range(len(parts))]
        turns.end(-1)  # the first part's turn
        failures = [failure for future in working if (failure := future.exception())]
    for failure in failures:
        if not isinstance(failure, _Abandoned):
            raise failure
    return [future.result() for future in working]
