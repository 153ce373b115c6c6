"""How close frames are to each other, and how much detail they have."""

import cv2
import numpy as np
import torch
from kornia.metrics import psnr, ssim

from tokenflow.motion.optical_flow import find_targets

CPU = torch.device("cpu")
SSIM_WINDOW = 11  # pixels; the window of the SSIM paper
LUMINANCE = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue (ITU-R BT.601)
STILL_LEVELS = 2  # grey levels; what changes less may be called still
STILL_SHARE = 0.01  # of a frame's pixels; fewer still ones tell nothing


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
    stacks = (_to_unit(stack, device).split(1) for stack in (frames, reference))
    # cuDNN would round to TF32, in which the differences of squares that make a variance are lost.
    with torch.backends.cudnn.flags(enabled=False):
        pairs = zip(*stacks, strict=True)
        return torch.stack([ssim(a, b, SSIM_WINDOW).mean() for a, b in pairs]).tolist()


def gradient_energy(frames: np.ndarray) -> float:
    """How much detail frames have: mean square gradient of the luminance, in (grey levels / pixel)^2.

    frames: uint8 (n, H, W, 3). Gradients are central differences, one-sided at the borders; the squares of
    both components are added, and averaged over pixels and frames. Only differences within a frame count,
    so flicker leaves it as it is. Blur lowers it, and noise raises it (by the variance of noise that is
    independent from pixel to pixel): compare it with that of another edit of the same content, and look at
    the frames.
    """
    gradients = (np.gradient(frame @ LUMINANCE) for frame in frames)
    return float(np.mean([np.mean(np.square(dy) + np.square(dx)) for dy, dx in gradients]))


def warp_error(frame: np.ndarray, later: np.ndarray, flow: np.ndarray, valid: np.ndarray) -> float:
    """How much a video changes along its motion: mean square difference, in [0, 1], of two frames.

    frame, later: uint8 (H, W, 3). flow: float32 (H, W, 2), where in `later` each pixel of `frame` is,
    (dx, dy) in pixels. valid: bool (H, W), the pixels that are seen in both. The error of a blank video is
    0, so also measure what the video shows.
    """
    warped = cv2.remap(later, *find_targets(flow), cv2.INTER_LINEAR)
    return float(np.square((warped.astype(np.float64) - frame)[valid] / 255).mean())


def flicker(before: np.ndarray, now: np.ndarray, motionless: np.ndarray) -> np.ndarray:
    """Root mean square difference, in grey levels, of neighbouring frames where the source is still: (n,).

    before, now: frames of n videos, uint8 (n, H, W, 3), the source's first. Pixels are still that do not
    move (`motionless`, bool (H, W)) and whose luminance changes by at most two grey levels in the source.
    NaN where too few are. Our own definition.
    """
    grey = (frames[0].astype(np.float32).mean(-1) for frames in (now, before))
    still = motionless & (np.abs(np.subtract(*grey)) <= STILL_LEVELS)
    if still.mean() < STILL_SHARE:
        return np.full(len(now), np.nan)
    change = now[:, still].astype(np.float64) - before[:, still]  # n pixels 3
    return np.sqrt(np.square(change).mean((1, 2)))
