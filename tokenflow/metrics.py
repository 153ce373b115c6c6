"""How close two sets of frames are."""

import cv2
import numpy as np
import torch
from kornia.metrics import psnr, ssim

SSIM_WINDOW = 11  # pixels; the window of the SSIM paper


def _to_unit(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255  # n 3 H W


def frame_psnr(frames: np.ndarray, reference: np.ndarray) -> list[float]:
    """PSNR in dB between frames of two stacks, uint8 (n, H, W, 3), pair by pair; inf if equal."""
    pairs = zip(_to_unit(frames), _to_unit(reference), strict=True)
    return [psnr(a, b, 1.0).item() for a, b in pairs]


def frame_ssim(frames: np.ndarray, reference: np.ndarray) -> list[float]:
    """Mean SSIM between frames of two stacks, uint8 (n, H, W, 3), pair by pair; 1 if equal."""
    return ssim(_to_unit(frames), _to_unit(reference), SSIM_WINDOW).mean((1, 2, 3)).tolist()


def warp_error(frame: np.ndarray, later: np.ndarray, flow: np.ndarray, valid: np.ndarray) -> float:
    """How much a video changes along its motion: mean square difference, in [0, 1], of two frames.

    frame, later: uint8 (H, W, 3). flow: float32 (H, W, 2), where in `later` each pixel of `frame` is,
    (dx, dy) in pixels. valid: bool (H, W), the pixels that are seen in both. The error of a blank video is
    0, so also measure what the video shows.
    """
    y, x = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    warped = cv2.remap(later, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR)
    difference = (warped.astype(np.float64) - frame)[valid] / 255
    return float(np.square(difference).mean())
