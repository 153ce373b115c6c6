"""The ControlNet stage: Canny edges steer the trained denoiser."""

import numpy as np
import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from control import canny
from shapes.unet import add_noise, denoising_loss

BATCH = 16
CANNY_THRESHOLDS = 100, 200  # the defaults of an edit


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
    noised, noise, times, weights = add_noise(scheduler, latents[chosen], generator)
    edges = torch.from_numpy(canny(frames[chosen.numpy()], *CANNY_THRESHOLDS)).permute(0, 3, 1, 2)
    edges, text = edges.to(device) / 255, text[chosen].to(device)
    with torch.autocast(device.type, torch.bfloat16):
        down, middle = controlnet(noised, times, text, edges, return_dict=False)
        predicted = unet(
            noised,
            times,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
    return denoising_loss(predicted, noise, weights)
