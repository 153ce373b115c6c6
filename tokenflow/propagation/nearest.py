"""Nearest tokens by cosine similarity, without ever holding the whole similarity matrix."""

import torch
import torch.nn.functional as F

try:
    from tokenflow.propagation import nearest_triton
except ImportError:  # triton comes with CUDA builds of torch only
    nearest_triton = None

# Similarities held at once: 64 MiB in fp32.
SIMILARITY_BLOCK = 1 << 24


def find_nearest(tokens: torch.Tensor, key_tokens: torch.Tensor) -> torch.Tensor:
    """For each of `tokens` (n, s, d) the index of the most similar of `key_tokens` (k, d): (n, s).

    The similarity is the cosine. The length of `tokens` is left out of it, because it does not change which
    key token is nearest.
    """
    if tokens.is_cuda and nearest_triton and nearest_triton.runs_on(tokens.device, tokens.dtype):
        return nearest_triton.find_nearest_fused(tokens, key_tokens)
    return find_nearest_in_blocks(tokens, key_tokens)


def find_nearest_in_blocks(tokens: torch.Tensor, key_tokens: torch.Tensor) -> torch.Tensor:
    """As `find_nearest`, on any device: only a block of the similarities exists at any time."""
    keys = F.normalize(key_tokens.float(), dim=-1)
    blocks = tokens.flatten(0, 1).split(max(1, SIMILARITY_BLOCK // len(keys)))
    nearest = [(block.float() @ keys.T).argmax(-1) for block in blocks]
    return torch.cat(nearest).view(tokens.shape[:2])
