"""The text stage: captions as tokens, and a text encoder that tells the attributes apart."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from shapes.world import VALUES

OTHER_WORDS = ("a", "on", "background", "behind", "grey", "bar")
BATCH = 64


def vocabulary() -> list[str]:
    """Every word of every caption."""
    return sorted({*OTHER_WORDS, *(word for values in VALUES.values() for word in values)})


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (N, prompt_tokens) of N captions, padded as Stable Diffusion pads them."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def text_loss(
    text_encoder: CLIPTextModel,
    heads: nn.Linear,
    token_ids: Tensor,
    labels: np.ndarray,
    generator: torch.Generator,
) -> Tensor:
    """Cross-entropy of attributes that `heads` reads off the mean embedding of a caption.

    The cross-attention of a new UNet takes about this mean. Where it tells all attributes apart
    already, the UNet follows captions after far fewer steps than with random embeddings.
    """
    device = heads.weight.device
    chosen = torch.randint(len(token_ids), (BATCH,), generator=generator)
    truth = torch.from_numpy(labels)[chosen].to(device)
    logits = heads(text_encoder(token_ids[chosen].to(device))[0].mean(1))
    split = logits.split([len(values) for values in VALUES.values()], dim=1)
    losses = [F.cross_entropy(part, truth[:, n]) for n, part in enumerate(split)]
    return torch.stack(losses).sum()
