"""How close two sets of frames are."""

import cv2
import numpy as np
import torch
from kornia.metrics import psnr, ssim

SSIM_WINDOW = 11  # pixels; the window of the SSIM paper


CPU = torch.device("cpu")


def _to_unit(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 255  # n 3 H W


def frame_psnr(
    frames: np.ndarray, reference: np.ndarray, device: torch.device = CPU
) -> list[float]:
    """PSNR in dB between frames of two stacks, uint8 (n, H, W, 3), pair by pair; inf if equal."""
    pairs = zip(_to_unit(frames, device), _to_unit(reference, device), strict=True)
    return torch.stack([psnr(a, b, 1.0) for a, b in pairs]).tolist()


def frame_ssim(
    frames: np.ndarray, reference: np.ndarray, device: torch.device = CPU
) -> list[float]:
    """Mean SSIM between frames of two stacks, uint8 (n, H, W, 3), pair by pair; 1 if equal.

    Frame by frame, because the windows' sums take many times the memory of the frames.
    """
    pairs = zip(
        _to_unit(frames, device).split(1), _to_unit(reference, device).split(1), strict=True
    )
    # cuDNN would round to TF32, in which the differences of squares that make a variance are lost.
    with torch.backends.cudnn.flags(enabled=False):
        return torch.stack([ssim(a, b, SSIM_WINDOW).mean() for a, b in pairs]).tolist()


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
