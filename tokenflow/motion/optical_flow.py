"""Optical flow between two frames of a video, and where it can be trusted."""

from collections.abc import Callable

import cv2
import numpy as np
import torch

from tokenflow.errors import UserError

# From two frames, uint8 RGB (H, W, 3), where in the second each pixel of the first is: float32
# (H, W, 2), (dx, dy) in pixels.
Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]

RAFT_SMALLEST, RAFT_MULTIPLE = 128, 8  # pixels; the frame sizes that RAFT takes
SMALL = 256  # pixels; dense inverse search takes frames whose shorter side is no longer in full resolution


def dis_flow() -> Flow:
    """Dense inverse search (Kroeger et al., ECCV 2016, arXiv 1603.03590), by OpenCV, on the CPU.

    It works at half of the frames' resolution; in small frames, whose half shows too little, at the whole.
    """
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def flow(frame: np.ndarray, later: np.ndarray) -> np.ndarray:
        grey = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (frame, later))
        dis.setFinestScale(int(min(frame.shape[:2]) > SMALL))
        return dis.calc(*grey, None)

    return flow


def raft_flow(device: torch.device) -> Flow:
    """RAFT (Teed and Deng, ECCV 2020, arXiv 2003.12039), by torchvision.

    Raises UserError if torchvision is not installed or has no weights and cannot download them.
    """
    try:
        from torchvision.models.optical_flow import Raft_Large_Weights, raft_large
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        raise UserError(
            f"flow: raft needs torchvision ({error}); install it for this torch, or use --flow dis"
        ) from error
    try:
        network = raft_large(weights=Raft_Large_Weights.DEFAULT)
    except OSError as error:
        raise UserError(
            f"flow: the weights of raft cannot be downloaded ({error}); use --flow dis"
        ) from error
    return flow_of_network(network.eval().to(device), device)


def flow_of_network(network: torch.nn.Module, device: torch.device) -> Flow:
    """The flow of a network that takes pairs (1, 3, H, W) in [-1, 1] and returns ever finer flows."""

    @torch.inference_mode()
    def flow(frame: np.ndarray, later: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        fitting = [
            -(-max(RAFT_SMALLEST, n) // RAFT_MULTIPLE) * RAFT_MULTIPLE for n in (height, width)
        ]
        border = (0, fitting[0] - height, 0, fitting[1] - width)
        padded = (cv2.copyMakeBorder(f, *border, cv2.BORDER_REPLICATE) for f in (frame, later))
        pair = (torch.from_numpy(f).to(device).permute(2, 0, 1)[None] / 127.5 - 1 for f in padded)
        return network(*pair)[-1][0, :, :height, :width].permute(1, 2, 0).float().cpu().numpy()

    return flow


def targets(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel leads along a flow (H, W, 2), as OpenCV takes it: x and y, (H, W) each, in pixels."""
    y, x = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return x + flow[..., 0], y + flow[..., 1]


def consistent(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Where flows (H, W, 2) in both directions agree, and do not leave the frame: bool (H, W).

    The forward-backward test of Sundaram et al. (ECCV 2010), equation 5: following the flow and then the
    other one leads back to within a distance whose square is below 1 % of the squared lengths plus 0.5.
    """
    height, width = forward.shape[:2]
    x, y = targets(forward)
    back = cv2.remap(backward, x, y, cv2.INTER_LINEAR)
    apart = squared_length(forward + back)
    lengths = squared_length(forward) + squared_length(back)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return inside & (apart < 0.01 * lengths + 0.5)


def squared_length(vectors: np.ndarray) -> np.ndarray:
    """The squared lengths (...) of vectors (..., d); many times faster than a sum over the last axis."""
    return sum(np.square(vectors[..., axis]) for axis in range(vectors.shape[-1]))


def valid_flow(flow: Flow, frame: np.ndarray, later: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The flow (H, W, 2) from one frame to another, and where it is `consistent` with the way back."""
    forward = flow(frame, later)
    return forward, consistent(forward, flow(later, frame))


def both_ways(flow: Flow, frame: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The flows (H, W, 2) between two frames, there and back; NaN where they are not `consistent`."""
    there, back = flow(frame, other), flow(other, frame)
    agree = consistent(there, back), consistent(back, there)
    return where_valid(there, agree[0]), where_valid(back, agree[1])


def where_valid(flow: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """A flow (H, W, 2) that is NaN where it is not valid, which is (H, W)."""
    return np.where(valid[..., None], flow, np.nan)
