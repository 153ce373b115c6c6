"""Threads that work ahead: they read and write while the device computes, and share work on pictures."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

import torch

WAITING = 2  # calls to a `WriteBehind`

A = TypeVar("A")
R = TypeVar("R")


def read_ahead(read: Callable[[A], R], items: Sequence[A]) -> Iterator[tuple[A, "Future[R]"]]:
    """Yield each item with the future of what `read` returns for it; the item after it is being read, too.

    Whoever asks a future for its result gets the errors of `read`.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(read, item) for item in items[:1]]
        for index, item in enumerate(items):
            coming += [thread.submit(read, following) for following in items[index + 1 : index + 2]]
            yield item, coming.pop(0)


def in_parallel(function: Callable[[A], R], items: Iterable[A]) -> Iterator[R]:
    """Yield what `function` returns for each item, in order; as many threads as torch takes compute it ahead.

    For work that libraries do while they let other threads run, as OpenCV does. Few results wait at a time.
    """
    n_threads, coming = torch.get_num_threads(), deque()
    with ThreadPoolExecutor(n_threads) as threads:
        for item in items:
            coming.append(threads.submit(function, item))
            if len(coming) > n_threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


class WriteBehind:
    """Calls functions that write, one after the other, in a thread that ends with the `with` block.

    Few wait at a time, so that what is to be written does not fill the memory. After one that fails none is
    called.
    """

    def __enter__(self) -> Self:
        self._thread, self._waiting = ThreadPoolExecutor(1).__enter__(), deque()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._thread.__exit__(*exception)
        if exception[0] is None:
            self.flush()

    def later(self, write: Callable[..., Any], *arguments: Any) -> None:
        """Call `write` with these arguments when the calls before have ended. Raises the error of one."""
        if len(self._waiting) == WAITING:
            self._waiting.popleft().result()
        before = self._waiting[-1] if self._waiting else None
        self._waiting.append(self._thread.submit(self._call, before, write, arguments))

    def flush(self) -> None:
        """Wait until all is written. Raises the error of a call that failed."""
        while self._waiting:
            self._waiting.popleft().result()

    @staticmethod
    def _call(before: Future | None, write: Callable[..., Any], arguments: tuple) -> None:
        if before:
            before.result()  # or else its error
        write(*arguments)
