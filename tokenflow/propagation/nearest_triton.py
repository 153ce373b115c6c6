"""Nearest tokens on CUDA: one kernel that never writes a similarity to memory.

In the manner of flash attention: a block of tokens stays on the chip while the keyframe's tokens stream
past it, and only the best similarity and its index are kept. `nearest.find_nearest_in_blocks` is the
reference, which is used wherever the kernel does not run.
"""

import functools
import logging
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tokenflow.errors import is_out_of_resources

log = logging.getLogger("tokenflow")


class Tiles(NamedTuple):
    """Sizes of the blocks, whether products are in the tokens' own precision, and how the kernel runs."""

    tokens: int
    keys: int
    depth: int
    is_half: bool
    warps: int
    stages: int


HALF = Tiles(128, 128, 64, is_half=True, warps=8, stages=2)
FULL = Tiles(64, 64, 32, is_half=False, warps=4, stages=3)
AMPERE = 8, 0  # the compute capability from which on HALF fits the tensor cores


def choose_tiles(dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """The tiles for tokens of a precision on a device of that compute capability."""
    return HALF if dtype.itemsize == 2 and capability >= AMPERE else FULL


@triton.jit
def _nearest_kernel(
    tokens,  # (n_tokens, DEPTH)
    key_tokens,  # (n_keys, DEPTH), in the same precision
    lengths,  # (n_keys,) fp32, of the key tokens
    nearest,  # (n_tokens,) int32, written
    n_tokens,
    n_keys,
    DEPTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    IS_HALF: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    best = tl.full((BLOCK_TOKENS,), float("-inf"), tl.float32)
    best_key = tl.zeros((BLOCK_TOKENS,), tl.int32)
    for first in range(0, n_keys, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        similarity = tl.zeros((BLOCK_TOKENS, BLOCK_KEYS), tl.float32)
        for start in range(0, DEPTH, BLOCK_DEPTH):
            depth = start + tl.arange(0, BLOCK_DEPTH)
            of_rows = (rows[:, None] < n_tokens) & (depth[None, :] < DEPTH)
            of_keys = (keys[None, :] < n_keys) & (depth[:, None] < DEPTH)
            a = tl.load(tokens + rows[:, None] * DEPTH + depth[None, :], mask=of_rows, other=0.0)
            b = tl.load(
                key_tokens + keys[None, :] * DEPTH + depth[:, None], mask=of_keys, other=0.0
            )
            if IS_HALF:  # the products are exact, and summed in fp32
                similarity = tl.dot(a, b, similarity)
            else:  # three products in TF32 are as exact as one in fp32, and run on the tensor cores
                a, b = a.to(tl.float32), b.to(tl.float32)
                similarity = tl.dot(a, b, similarity, input_precision="tf32x3")
        length = tl.maximum(tl.load(lengths + keys, mask=keys < n_keys, other=1.0), 1e-12)
        similarity *= (1.0 / length)[None, :]
        similarity = tl.where(keys[None, :] < n_keys, similarity, float("-inf"))
        value, key = tl.max(similarity, axis=1, return_indices=True)
        better = value > best  # the first of equal ones wins, as in torch
        best_key = tl.where(better, first + key, best_key)
        best = tl.where(better, value, best)
    tl.store(nearest + rows, best_key, mask=rows < n_tokens)


def find_nearest_fused(
    tokens: torch.Tensor, key_tokens: torch.Tensor, tiles: Tiles | None = None
) -> torch.Tensor:
    """As `nearest.find_nearest`: tokens (n, s, d), key_tokens (k, d) in the same precision: (n, s)."""
    n_frames, n_tokens, depth = tokens.shape
    tokens, key_tokens = tokens.contiguous(), key_tokens.contiguous()
    lengths = torch.linalg.vector_norm(key_tokens, dim=-1, dtype=torch.float32)
    nearest = torch.empty(n_frames * n_tokens, dtype=torch.int32, device=tokens.device)
    tiles = tiles or choose_tiles(tokens.dtype, torch.cuda.get_device_capability(tokens.device))
    grid, sizes = (triton.cdiv(len(nearest), tiles.tokens),), (len(nearest), len(key_tokens))
    launch = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    # Triton launches on the current device, wherever its arguments are.
    with torch.cuda.device_of(tokens):
        _nearest_kernel[grid](
            tokens, key_tokens, lengths, nearest, *sizes, depth, *tiles[:4], **launch
        )
    return nearest.view(n_frames, n_tokens).long()


@functools.cache
def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel compiles for this device and precision, and is right on a small example."""
    tokens = torch.eye(70, 40, device=device, dtype=dtype)[None]
    try:
        right = torch.equal(
            find_nearest_fused(tokens[:, :40], tokens[0, :40]).cpu()[0], torch.arange(40)
        )
    except Exception as error:  # a compiler has many ways to fail, and none may end an edit
        if is_out_of_resources(error):  # for now, while what is found here counts for the whole run
            raise
        log.info("the fused kernel does not run here (%s)", str(error).partition("\n")[0])
        return False
    return right
