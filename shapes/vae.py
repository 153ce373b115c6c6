"""The autoencoder stage: training, its round trip, and the encoding of all frames."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

CROP = 64  # training crops, in pixels
BATCH = 8
KL_WEIGHT = 1e-3


def to_images(frames: np.ndarray, device: torch.device) -> Tensor:
    """uint8 frames (B, H, W, 3) as images (B, 3, H, W) in [-1, 1]."""
    images = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2)
    return (images.float() / 127.5 - 1).contiguous()


def vae_loss(vae: AutoencoderKL, frames: np.ndarray, generator: torch.Generator) -> Tensor:
    """Reconstruction and KL loss on random crops of random `frames` (N, H, W, 3)."""
    device = vae.device
    rows, columns = torch.randint(frames.shape[1] - CROP + 1, (2, BATCH), generator=generator)
    chosen = torch.randint(len(frames), (BATCH,), generator=generator)
    crops = [
        frames[n, y : y + CROP, x : x + CROP]
        for n, y, x in zip(chosen.tolist(), rows.tolist(), columns.tolist(), strict=True)
    ]
    images = to_images(np.stack(crops), device)
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    decoded, mean, logvar = decoded.float(), posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.l1_loss(decoded, images) + 4 * F.mse_loss(decoded, images) + KL_WEIGHT * kl


@torch.no_grad()
def measure_round_trip(vae: AutoencoderKL, frames: np.ndarray) -> float:
    """Mean PSNR (dB) of decoded latents of `frames` (N, H, W, 3), one value per frame averaged."""
    values = []
    for batch in np.array_split(frames, max(1, len(frames) // BATCH)):
        images = to_images(batch, vae.device)
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        errors = ((decoded - images) / 2).square().mean((1, 2, 3))
        values.append(-10 * errors.log10())
    return torch.cat(values).mean().item()


@torch.no_grad()
def encode(vae: AutoencoderKL, frames: np.ndarray) -> Tensor:
    """Latents (N, 4, H / 8, W / 8) of `frames`, not scaled yet: the means of their posteriors."""
    latents = []
    for batch in tqdm(np.array_split(frames, max(1, len(frames) // BATCH)), desc="encode"):
        latents.append(vae.encode(to_images(batch, vae.device)).latent_dist.mean)
    return torch.cat(latents)
