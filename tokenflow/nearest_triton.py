"""Nearest tokens on CUDA: one kernel that never writes a similarity to memory.

In the manner of flash attention: a block of tokens stays on the chip while the keyframe's tokens stream
past it, and only the best similarity and its index are kept. `nearest.nearest_in_blocks` is the
reference, which is used wherever the kernel does not run.
"""

import functools
import logging

import torch
import triton
import triton.language as tl

log = logging.getLogger("tokenflow")

BLOCK_TOKENS, BLOCK_KEYS, BLOCK_DEPTH = 64, 64, 32


@triton.jit
def _nearest_kernel(
    tokens,  # (n_tokens, DEPTH), any precision
    key_tokens,  # (n_keys, DEPTH), fp32, of unit length
    nearest,  # (n_tokens,) int32, written
    n_tokens,
    n_keys,
    DEPTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
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
            # Three products in TF32 are as exact as one in fp32, and run on the tensor cores.
            similarity += tl.dot(a.to(tl.float32), b, input_precision="tf32x3")
        similarity = tl.where(keys[None, :] < n_keys, similarity, float("-inf"))
        value, key = tl.max(similarity, axis=1, return_indices=True)
        better = value > best  # the first of equal ones wins, as in torch
        best_key = tl.where(better, first + key, best_key)
        best = tl.where(better, value, best)
    tl.store(nearest + rows, best_key, mask=rows < n_tokens)


def nearest_fused(tokens: torch.Tensor, key_tokens: torch.Tensor) -> torch.Tensor:
    """As `nearest.nearest_tokens`: tokens (n, s, d), key_tokens (k, d) of unit length: (n, s)."""
    n_frames, n_tokens, depth = tokens.shape
    tokens, key_tokens = tokens.contiguous(), key_tokens.float().contiguous()
    nearest = torch.empty(n_frames * n_tokens, dtype=torch.int32, device=tokens.device)
    grid, sizes = (triton.cdiv(len(nearest), BLOCK_TOKENS),), (len(nearest), len(key_tokens))
    blocks = BLOCK_TOKENS, BLOCK_KEYS, BLOCK_DEPTH
    # Triton launches on the current device, wherever its arguments are.
    with torch.cuda.device_of(tokens):
        _nearest_kernel[grid](tokens, key_tokens, nearest, *sizes, depth, *blocks)
    return nearest.view(n_frames, n_tokens).long()


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernel compiles for this device and is right on a small example."""
    tokens = torch.eye(70, 40, device=device)[None]
    try:
        right = torch.equal(
            nearest_fused(tokens[:, :40], tokens[0, :40]).cpu()[0], torch.arange(40)
        )
    except Exception as error:  # a compiler has many ways to fail, and none may end an edit
        log.info("the fused kernel does not run here (%s)", str(error).partition("\n")[0])
        return False
    return right
