"""Moving frames along the motion of a video, and averaging them: pure functions."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d

from tokenflow.motion.optical_flow import find_consistent, find_targets, squared_length

# Grey levels by which two frames of the source may differ where the flow is right: compression, noise, light.
SOURCE_NOISE = 12.0
SMOOTHING = 1.0  # pixels; the standard deviation of the neighbourhood in which frames are compared
WINDOW = 7  # pixels; the side of that neighbourhood


def find_reliability(
    frame: np.ndarray, other: np.ndarray, forward: np.ndarray, backward: np.ndarray
) -> np.ndarray:
    """How far the pixels of a frame can be found in another one along a flow: float32 (H, W), 0 to 1.

    frame, other: uint8 RGB (H, W, 3). forward, backward: the flows (H, W, 2) between them, in pixels. It is
    0 where the flows disagree, and falls as exp(-d^2 / 2 SOURCE_NOISE^2) where the frames differ by d.
    """
    moved = cv2.remap(
        other, *find_targets(forward), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    squared = squared_length(moved.astype(np.float32) - frame) / frame.shape[-1]
    squared = cv2.GaussianBlur(squared, (0, 0), SMOOTHING)
    return find_consistent(forward, backward) * np.exp(-squared / (2 * SOURCE_NOISE**2))


def find_agreement(frame: torch.Tensor, moved: torch.Tensor, tolerance: float) -> torch.Tensor:
    """How far others, moved to a frame, show the same there: (k, H, W), 0 to 1.

    frame: (c, H, W). moved: (k, c, H, W). It falls as exp(-d^2 / 2 tolerance^2) where they differ by d.
    """
    squared = (moved - frame).square().mean(1, keepdim=True)
    squared = gaussian_blur2d(squared, WINDOW, (SMOOTHING, SMOOTHING), "replicate")
    return (-squared[:, 0] / (2 * tolerance**2)).exp()


def average(frame: torch.Tensor, moved: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mean of a frame (c, H, W), of weight 1, and k others (k, c, H, W), moved to it: (c, H, W).

    weights: (k, H, W).
    """
    weights = weights[:, None]
    return (frame + (weights * moved).sum(0)) / (1 + weights.sum(0))


def carry(values: torch.Tensor, motion: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """What is known of k frames, moved to one near them: (c, h, w).

    values: (k, c, h, w), which may be coarser than pixels. motion: (k, H, W, 3), from the one frame to each
    of them: the flow in pixels, and how far it can be relied on. distances: (k,), in frames; nearer ones
    count more, as in linear interpolation. The less even the most reliable one can be relied on, the closer
    the result is to 0.
    """
    cell = motion.shape[1] // values.shape[2]
    coarse = F.avg_pool2d(motion.permute(0, 3, 1, 2).float(), cell)
    flows, reliable = coarse[:, :2].permute(0, 2, 3, 1) / cell, coarse[:, 2]
    weights = (reliable / distances[:, None, None])[:, None]
    mean = (weights * warp(values, flows)).sum(0) / weights.sum(0).clamp(min=1e-6)
    return reliable.amax(0) * mean


def warp(images: torch.Tensor, flows: torch.Tensor) -> torch.Tensor:
    """Images (k, c, H, W) read where the flows (k, H, W, 2) lead, in pixels; its border goes on outside.

    Between pixels they are interpolated with cubic polynomials, which can exceed the range of the images:
    linear interpolation would blur them.
    """
    height, width = images.shape[-2:]
    x, y = (torch.arange(size, device=flows.device) for size in (width, height))
    grid_x = 2 * (x + flows[..., 0]) / (width - 1) - 1
    grid_y = 2 * (y[:, None] + flows[..., 1]) / (height - 1) - 1
    grid = torch.stack([grid_x, grid_y], -1)
    return F.grid_sample(images, grid, "bicubic", padding_mode="border", align_corners=True)
