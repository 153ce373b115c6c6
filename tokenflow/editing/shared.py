"""What the edits of a sweep have in common, so that it is made once."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Shared:
    """Things that an edit makes when it first needs them, and that the next one uses if it needs the same."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Hashable, Any]] = {}

    def get(self, name: str, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, or returned for the same `key` when something of that name was last made.

        key: all that decides what it is, and is not the same for all edits of a sweep.
        """
        if name not in self._made or self._made[name][0] != key:
            self._made.pop(name, None)  # before the next one takes memory
            self._made[name] = key, make()
        return self._made[name][1]
