"""The text stage: captions as tokens, and a text encoder that tells the attributes apart."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from shapes.world import VALUES

OTHER_WORDS = ("a", "on", "background", "behind", "black", "bar")
BATCH = 64


def vocabulary() -> list[str]:
    """Every word of every caption."""
    return sorted({*OTHER_WORDS, *(word for values in VALUES.values() for word in values)})


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (N, prompt_tokens) of N captions, padded as Stable Diffusion pads them."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def start_text_encoder(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Give `text_encoder` the weights of the checkpoint `folder`, in single precision.

    Embeddings go by token, as `tokenizer` may number tokens differently; a token that is new to the
    checkpoint keeps the embedding it has.
    """
    known = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer").get_vocab()
    stored = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    rows = text_encoder.get_input_embeddings().weight.detach().clone()
    for token, index in tokenizer.get_vocab().items():
        if token in known:
            rows[index] = stored.get_input_embeddings().weight.detach()[known[token]]
    stored.set_input_embeddings(nn.Embedding.from_pretrained(rows))
    text_encoder.load_state_dict(stored.state_dict())


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
