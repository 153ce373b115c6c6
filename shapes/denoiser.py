"""The stages that learn to denoise: captions as tokens, the text encoder, the UNet and a Canny ControlNet."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from shapes.world import VALUES
from tokenflow.control.detectors import detect_canny

OTHER_WORDS = ("a", "on", "background", "behind", "black", "bar")
TEXT_BATCH = 64
CANNY_THRESHOLDS = 100, 200  # the defaults of an edit
WEIGHT_CAP = 20.0
BATCH = 16
EMPTY_CAPTIONS = 0.1  # what guidance steers away from
SNR_CAP = 5.0  # of min-SNR weighting


def list_words() -> list[str]:
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
    chosen = torch.randint(len(token_ids), (TEXT_BATCH,), generator=generator)
    truth = torch.from_numpy(labels)[chosen].to(device)
    logits = heads(text_encoder(token_ids[chosen].to(device))[0].mean(1))
    split = logits.split([len(values) for values in VALUES.values()], dim=1)
    losses = [F.cross_entropy(part, truth[:, n]) for n, part in enumerate(split)]
    return torch.stack(losses).sum()


def add_noise(
    scheduler: DDIMScheduler, latents: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised latents, the noise, the times (B,), and the weights (B,) of the times' losses."""
    # One time out of each of B equal spans: a loss of less variance than B independent times.
    spans = torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)
    times = (spans / len(latents) * len(scheduler.alphas_cumprod)).long()
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    alphas = scheduler.alphas_cumprod[times]
    snr = alphas / (1 - alphas)
    weights = (snr.clamp(max=SNR_CAP) / snr).to(latents.device)
    times = times.to(latents.device)
    return scheduler.add_noise(latents, noise, times), noise, times, weights


def denoising_loss(predicted: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean square error of predicted noise (B, 4, h, w)."""
    return (weights * (predicted.float() - noise).square().mean((1, 2, 3))).mean()


def unet_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    latents: Tensor,
    token_ids: Tensor,
    empty_ids: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Denoising loss on random ones of scaled `latents` (N, 4, h, w) with `token_ids` (N, L).

    `empty_ids` (1, L), the tokens of the empty caption, take the place of some captions.
    """
    device = latents.device
    chosen = torch.randint(len(latents), (BATCH,), generator=generator)
    noised, noise, times, weights = add_noise(scheduler, latents[chosen], generator)
    empty = torch.rand(BATCH, 1, generator=generator) < EMPTY_CAPTIONS
    ids = torch.where(empty, empty_ids, token_ids[chosen]).to(device)
    text = text_encoder(ids)[0]
    predicted = unet(noised, times, text, return_dict=False)[0]
    return denoising_loss(predicted, noise, weights)


def open_embedding(controlnet: ControlNetModel) -> None:
    """Give the embedding of edges random weights in place of those that let nothing through.

    The ControlNet's outputs still start at zero. With both at zero, edges matter only after
    thousands of steps.
    """
    for layer in controlnet.controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)


def controlnet_loss(
    controlnet: ControlNetModel,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    frames: np.ndarray,
    latents: Tensor,
    text: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Denoising loss of the frozen `unet` with the edges of random `frames` (N, H, W, 3).

    `latents` (N, 4, h, w), scaled, and the captions' embeddings `text` (N, L, D) belong to them.
    """
    device = latents.device
    chosen = torch.randint(len(latents), (BATCH,), generator=generator)
    noised, noise, times, _ = add_noise(scheduler, latents[chosen], generator)
    edges = torch.from_numpy(detect_canny(frames[chosen.numpy()], *CANNY_THRESHOLDS))
    edges, text = edges.permute(0, 3, 1, 2).to(device) / 255, text[chosen].to(device)
    down, middle = controlnet(noised, times, text, edges, return_dict=False)
    predicted = unet(
        noised,
        times,
        text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        return_dict=False,
    )[0]
    # The weights of a v-prediction loss: edges tell most where noise hides the scene.
    weights = (1 / scheduler.alphas_cumprod.to(device)[times]).clamp(max=WEIGHT_CAP)
    return denoising_loss(predicted, noise, weights)
