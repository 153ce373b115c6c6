"""How close two sets of frames are."""

import numpy as np
import torch
from kornia.metrics import psnr, ssim

SSIM_WINDOW = 11  # pixels; the window of the SSIM paper


def _to_unit(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255  # n 3 H W


def frame_psnr(frames: np.ndarray, reference: np.ndarray) -> list[float]:
    """PSNR in dB of each of two stacks of uint8 frames (n, H, W, 3); inf where they are equal."""
    pairs = zip(_to_unit(frames), _to_unit(reference), strict=True)
    return [psnr(a, b, 1.0).item() for a, b in pairs]


def frame_ssim(frames: np.ndarray, reference: np.ndarray) -> list[float]:
    """Mean SSIM of each of two stacks of uint8 frames (n, H, W, 3); 1 where they are equal."""
    return ssim(_to_unit(frames), _to_unit(reference), SSIM_WINDOW).mean((1, 2, 3)).tolist()
