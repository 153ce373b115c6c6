"""Files are read and written by a thread while the device computes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

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


class WriteBehind:
    """Calls functions that write, one after the other, in a thread that ends with the `with` block.

    Each waits for the one before it, so that what is to be written does not fill the memory.
    """

    def __enter__(self) -> Self:
        self._thread, self._last = ThreadPoolExecutor(1).__enter__(), None
        return self

    def __exit__(self, *exception: Any) -> None:
        self._thread.__exit__(*exception)
        if exception[0] is None:
            self.flush()

    def later(self, write: Callable[..., Any], *arguments: Any) -> None:
        """Wait for the call before, raise its error, and begin to call `write` with these arguments."""
        self.flush()
        self._last = self._thread.submit(write, *arguments)

    def flush(self) -> None:
        """Wait until all is written. Raises the error of a call that failed."""
        last, self._last = self._last, None
        if last:
            last.result()
