"""Frames pass a network in batches, whose size affects memory and speed but not the result."""

import gc
import logging
from collections.abc import Callable

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

log = logging.getLogger("tokenflow")


def balanced(items: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Split items (n,) into the fewest parts of at most `size`, of lengths as equal as possible.

    Libraries cache their kernels for each length that they meet, so fewer lengths take less memory.
    """
    return items.tensor_split(-(-len(items) // size)) if len(items) else ()


class Batches:
    """How many frames pass at once: a fixed number, or one that is halved when memory runs out."""

    def __init__(self, size: int, adapts: bool) -> None:
        self.size, self.adapts = size, adapts

    def map(self, function: Callable[..., torch.Tensor], *items: torch.Tensor) -> torch.Tensor:
        """Apply `function` to tensors of n items each, batch by batch; returns one tensor (n, ...)."""
        results, start, n_items = [], 0, len(items[0])
        while start < n_items:
            batch = [values[start : start + self.size] for values in items]
            length = len(batch[0])
            try:
                results.append(function(*batch))
                start += length
                continue
            except RuntimeError as error:
                if not (self.adapts and length > 1 and should_reduce_batch_size(error)):
                    raise
            # After the handler, because the error refers to the memory that must be freed.
            self.size = length // 2
            log.warning("out of memory with %d frames at once: now %d", length, self.size)
            gc.collect()
            clear_device_cache()
        return torch.cat(results)
