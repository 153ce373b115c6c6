"""The ControlNet stage: Canny edges steer the trained denoiser."""

import numpy as np
import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from shapes.unet import add_noise, denoising_loss
from tokenflow.control.detectors import detect_canny

BATCH = 16
CANNY_THRESHOLDS = 100, 200  # the defaults of an edit
WEIGHT_CAP = 20.0


def edges_of(frames: np.ndarray, device: torch.device) -> Tensor:
    """Edges (B, 3, H, W), 0 or 1, of `frames` (B, H, W, 3)."""
    edges = torch.from_numpy(detect_canny(frames, *CANNY_THRESHOLDS)).permute(0, 3, 1, 2)
    return edges.to(device) / 255


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
    edges, text = edges_of(frames[chosen.numpy()], device), text[chosen].to(device)
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
    # The weights of a v-prediction loss: edges tell most where noise hides the scene.
    weights = (1 / scheduler.alphas_cumprod.to(device)[times]).clamp(max=WEIGHT_CAP)
    return denoising_loss(predicted, noise, weights)
