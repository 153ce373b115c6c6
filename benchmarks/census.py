"""Counts what a pass asks of a GPU, on a machine that has one or not.

Without a GPU its tensors are fakes: they have a shape, a precision and a device, and no values. Tensors on
the CPU stay real, so that what decides about passes runs as it is; what comes from the device is zeros.
"""

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from tokenflow.propagation import nearest
from tokenflow.runtime import ahead
from tokenflow.runtime.frame_array import FrameArray

aten = torch.ops.aten

# Operations whose result the host must have before it can go on.
DEPENDENT = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal}
DEPENDENT |= {aten.unique_dim, aten.repeat_interleave}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.lift_fresh}
FREE |= {aten.new_empty_strided, aten._unsafe_view, aten.detach}
CPU = torch.device("cpu")
FLASH_DEPTH = 256  # channels of a head, the most that flash attention takes


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors among an operation's arguments or results, and in lists of them."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is, or is a fake of being."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


@dataclass
class Counts:
    """What was asked of the device, and of the disk.

    blocking_copies: between host and device, for each of which the host waits until the device has done
    all it was told. dependent: those of them without which the host does not know what comes next.
    launches: operations that compute on the device, each at least one kernel.
    peak_bytes: of tensors on the device, at most at any time; what kernels need for themselves is not in it.
    """

    blocking_copies: int = 0
    dependent: int = 0
    launches: int = 0
    flops: int = 0
    disk_bytes: int = 0
    peak_bytes: int = 0


class Census(TorchDispatchMode):
    """While entered, counts what happens on `device`, which need not be there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.counts = device, Counts()
        self.is_fake = device.type == "cuda" and not torch.cuda.is_available()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._live_bytes, self._storages = 0, weakref.WeakSet()
        self._pinned = WeakIdKeyDictionary()  # of the tensors that pose as pinned
        self._stack = ExitStack()

    def take(self) -> Counts:
        """What was counted since the last time."""
        counts, self.counts = self.counts, Counts(peak_bytes=self._live_bytes)
        return counts

    def on_device(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """A module on the meta device, moved to the device with random weights, or as a fake."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    with self.fake if self.is_fake else ExitStack():
                        moved = torch.empty(parameter.shape, dtype=dtype, device=self.device)
                    if not self.is_fake and moved.ndim > 1:
                        # Half of what keeps the variance, lest float16 overflow.
                        moved.normal_(0, moved[0].numel() ** -0.5 / 2)
                    elif not self.is_fake:
                        moved.fill_(name == "weight")
                    part._parameters[name] = nn.Parameter(moved, requires_grad=False)
                    self._hold(moved)
        self.counts.peak_bytes = self._live_bytes
        return module.eval()

    def launch(self, flops: int = 0) -> None:
        """Count a kernel that torch knows nothing of."""
        self.counts.launches += 1
        self.counts.flops += flops

    def __enter__(self) -> "Census":
        with ExitStack() as stack:
            stack.enter_context(self._disk_reads())
            kernel = None if self.is_fake else nearest.nearest_triton
            if self.is_fake or kernel:
                noticed = FusedNearest(self, kernel)
                stack.enter_context(patch.object(nearest, "nearest_triton", noticed))
            if self.is_fake:
                stack.enter_context(patch.object(ahead, "ThreadPoolExecutor", Unhurried))
                stack.enter_context(_PythonSide(self))
                stack.enter_context(self.fake)
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet is torch.ops.prim.device:  # asked of every fake, very often
            return device_of(args[0])
        tensors = tensors_in((args, kwargs))
        devices = [device_of(tensor) for tensor in tensors]
        target = torch.device(kwargs.get("device") or (devices or [CPU])[0])
        if target != self.device and self.device not in devices:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        is_copy = False
        if packet in DEPENDENT:
            self.counts.blocking_copies += 1
            self.counts.dependent += 1
            if self.is_fake:
                return self._answer(packet, args)
        elif packet in (aten._to_copy, aten.copy_):
            source, to = (tensors[1], devices[0]) if packet is aten.copy_ else (args[0], target)
            is_copy = device_of(source) != to
            waits = not (kwargs.get("non_blocking") or args[2:3] == (True,)) or (
                to == self.device and not self._is_pinned(source)
            )
            self.counts.blocking_copies += is_copy and waits
        elif packet in INDEXING:  # indices on the host are copied, and those in a mask counted
            indices = [x for x in args[1] if x is not None]
            from_host = sum(device_of(x) != self.device for x in indices)
            masks = sum(device_of(x) == self.device and x.dtype == torch.bool for x in indices)
            self.counts.blocking_copies += from_host + masks
            self.counts.dependent += masks
        out = func(*args, **kwargs)
        if is_copy and to == CPU and self.is_fake:
            with unset_fake_temporarily():
                return torch.zeros(out.shape, dtype=out.dtype)
        made = [tensor for tensor in tensors_in(out) if device_of(tensor) == self.device]
        self.counts.launches += bool(made) and not (func.is_view or packet in FREE or is_copy)
        if packet in flop_registry:
            self.counts.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        for tensor in made:
            self._hold(tensor)
        return out

    def _answer(self, packet, args: tuple) -> Any:
        """What a device without values answers: yes."""
        if packet is aten.equal:
            return True
        if packet is aten._local_scalar_dense:
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        raise NotImplementedError(f"{packet} depends on values that only a GPU has")

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor in self._pinned if self.is_fake else tensor.is_pinned()

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._storages:
            return
        self._storages.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self._live_bytes += size
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._live_bytes)

    def _free(self, size: int) -> None:
        self._live_bytes -= size

    def _disk_reads(self) -> AbstractContextManager:
        """Counts all rows that frame arrays read in the block."""
        read = FrameArray.__getitem__

        def reading(array: FrameArray, frames: torch.Tensor) -> torch.Tensor:
            rows = read(array, frames)
            self.counts.disk_bytes += rows.nbytes
            return rows

        return patch.object(FrameArray, "__getitem__", reading)


class Unhurried:
    """In place of a thread, in which nothing would be counted: works when its result is asked for."""

    def __init__(self, n_threads: int) -> None:
        pass

    def __enter__(self) -> "Unhurried":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def submit(self, function: Callable, *arguments: Any) -> "Unhurried":
        """The future of a result."""
        self = Unhurried(1)
        self.result = functools.cache(functools.partial(function, *arguments))
        return self


class FusedNearest:
    """Counts the kernel of `nearest_triton`, and stands in for it on fakes, where `kernel` is None."""

    def __init__(self, census: Census, kernel: ModuleType | None) -> None:
        self.census, self.kernel = census, kernel

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """On a fake device it does, as on every GPU that triton knows."""
        return self.kernel is None or self.kernel.runs_on(device, dtype)

    def find_nearest_fused(self, tokens: torch.Tensor, key_tokens: torch.Tensor) -> torch.Tensor:
        """As `nearest_triton.find_nearest_fused`, with its copies: indices (n, s)."""
        n_frames, n_tokens, depth = tokens.shape
        self.census.launch(2 * n_frames * n_tokens * len(key_tokens) * depth)
        if self.kernel:
            return self.kernel.find_nearest_fused(tokens, key_tokens)
        tokens, key_tokens = tokens.contiguous(), key_tokens.contiguous()
        torch.linalg.vector_norm(key_tokens, dim=-1, dtype=torch.float32)
        nearest = torch.empty(n_frames * n_tokens, dtype=torch.int32, device=tokens.device)
        return nearest.view(n_frames, n_tokens).long()


class _PythonSide(TorchFunctionMode):
    """What torch without CUDA cannot do with a CUDA device's tensors before they are dispatched."""

    def __init__(self, census: Census) -> None:
        super().__init__()
        self.census = census

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            self.census._pinned[pinned] = None
            return pinned
        if args and isinstance(args[0], FakeTensor):
            if func is torch.Tensor.__getitem__:
                return _indexed(*args)
            if func is torch.Tensor.__setitem__:
                return _set(*args)
            if func is torch.Tensor.contiguous:
                is_there = args[0].is_contiguous(**kwargs)
                kwargs = {"memory_format": torch.contiguous_format} | kwargs
                return args[0] if is_there else args[0].clone(**kwargs)
            if func is F.scaled_dot_product_attention:
                return _fused_attention(*args, **kwargs)
            if func is F.grid_sample:  # one kernel, which fakes would take to pieces
                self.census.launch()
                images, grid = args
                return images.new_empty(*images.shape[:2], *grid.shape[1:-1])
        return func(*args, **kwargs)


def _fused_attention(query, key, value, attn_mask=None, **options) -> torch.Tensor:
    """The kernel that a GPU would choose for attention in half precision."""
    if query.dtype.itemsize == 2 and query.shape[-1] <= FLASH_DEPTH and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, False)[0]


def _sliced(tensor: torch.Tensor, key: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Slices, integers and None of an index, as a view; and tensors of indices, by its dimension."""
    key = key if isinstance(key, tuple) else (key,)
    if any(item is ... for item in key):
        place = [item is ... for item in key].index(True)
        named = sum(item is not None for item in key) - 1
        key = (*key[:place], *[slice(None)] * (tensor.ndim - named), *key[place + 1 :])
    dim, indices = 0, []
    for item in key:
        if item is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(item, int):
            tensor = tensor.select(dim, item)
            continue
        elif isinstance(item, slice):
            if item != slice(None):
                tensor = aten.slice(tensor, dim, item.start, item.stop, item.step or 1)
        else:
            indices += [None] * (dim - len(indices)) + [torch.as_tensor(item)]
        dim += 1
    return tensor, indices


def _indexed(tensor: torch.Tensor, key: Any) -> torch.Tensor:
    view, indices = _sliced(tensor, key)
    return aten.index(view, indices) if indices else view


def _set(tensor: torch.Tensor, key: Any, value: Any) -> None:
    view, indices = _sliced(tensor, key)
    if not isinstance(value, torch.Tensor):
        value = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
    if indices:
        aten.index_put_(view, indices, value.to(tensor.device))
    else:
        aten.copy_(view, value)
