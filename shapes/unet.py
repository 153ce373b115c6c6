"""The denoiser stage: text encoder and UNet, trained together to predict noise."""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

BATCH = 16
EMPTY_CAPTIONS = 0.1  # what guidance steers away from
SNR_CAP = 5.0  # of min-SNR weighting


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
    with torch.autocast(device.type, torch.bfloat16):
        text = text_encoder(ids)[0]
        predicted = unet(noised, times, text, return_dict=False)[0]
    return denoising_loss(predicted, noise, weights)
