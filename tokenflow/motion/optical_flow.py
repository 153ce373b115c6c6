"""Optical flow between two frames of a video, and where it can be trusted."""

import cv2
import numpy as np
import torch

from tokenflow.errors import blame

RAFT_SMALLEST, RAFT_MULTIPLE = 128, 8  # pixels; the frame sizes that RAFT takes
SMALL = 256  # pixels; dense inverse search takes frames whose shorter side is no longer in full resolution


class OpticalFlow:
    """A way to find where each pixel of a frame, uint8 RGB (H, W, 3), is in another one."""

    def find(self, frame: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The flow from a frame to another one: float32 (H, W, 2), (dx, dy) in pixels."""
        raise NotImplementedError

    def find_valid(self, frame: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The flow (H, W, 2) to another frame, and where it agrees with the way back: bool (H, W)."""
        there = self.find(frame, other)
        return there, find_consistent(there, self.find(other, frame))


class DenseInverseSearch(OpticalFlow):
    """Kroeger et al., ECCV 2016, arXiv 1603.03590, by OpenCV, on the CPU; each thread needs one of its own.

    It works at half of the frames' resolution; in small frames, whose half shows too little, at the whole.
    """

    def __init__(self) -> None:
        self._search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def find(self, frame: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The flow from a frame to another one: float32 (H, W, 2), (dx, dy) in pixels."""
        self._search.setFinestScale(int(min(frame.shape[:2]) > SMALL))
        grey = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (frame, other))
        return self._search.calc(*grey, None)


class NetworkFlow(OpticalFlow):
    """The flow of a network that takes pairs (1, 3, H, W) in [-1, 1] and returns ever finer flows."""

    def __init__(self, network: torch.nn.Module, device: torch.device) -> None:
        self.network, self.device = network, device

    @torch.inference_mode()
    def find(self, frame: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The flow from a frame to another one: float32 (H, W, 2), (dx, dy) in pixels."""
        height, width = frame.shape[:2]
        fitting = [
            -(-max(RAFT_SMALLEST, n) // RAFT_MULTIPLE) * RAFT_MULTIPLE for n in (height, width)
        ]
        border = (0, fitting[0] - height, 0, fitting[1] - width)
        padded = (cv2.copyMakeBorder(f, *border, cv2.BORDER_REPLICATE) for f in (frame, other))
        images = (torch.from_numpy(f).to(self.device).permute(2, 0, 1)[None] for f in padded)
        flow = self.network(*(image / 127.5 - 1 for image in images))[-1][0, :, :height, :width]
        return flow.permute(1, 2, 0).float().cpu().numpy()


def load_raft(device: torch.device) -> NetworkFlow:
    """RAFT (Teed and Deng, ECCV 2020, arXiv 2003.12039), by torchvision.

    Raises UserError if torchvision is not installed or has no weights and cannot download them.
    """
    remedy = "install it for this torch, or use --flow dis"
    # RuntimeError: it was built for another torch.
    with blame("flow: raft needs torchvision", (ImportError, RuntimeError), remedy):
        from torchvision.models.optical_flow import Raft_Large_Weights, raft_large
    with blame("flow: the weights of raft cannot be downloaded", OSError, "use --flow dis"):
        network = raft_large(weights=Raft_Large_Weights.DEFAULT)
    return NetworkFlow(network.eval().to(device), device)


def find_targets(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel leads along a flow (H, W, 2), as OpenCV takes it: x and y, (H, W) each, in pixels."""
    y, x = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return x + flow[..., 0], y + flow[..., 1]


def find_consistent(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Where flows (H, W, 2) in both directions agree, and do not leave the frame: bool (H, W).

    The forward-backward test of Sundaram et al. (ECCV 2010), equation 5: following the flow and then the
    other one leads back to within a distance whose square is below 1 % of the squared lengths plus 0.5.
    """
    height, width = forward.shape[:2]
    x, y = find_targets(forward)
    back = cv2.remap(backward, x, y, cv2.INTER_LINEAR)
    apart = squared_length(forward + back)
    lengths = squared_length(forward) + squared_length(back)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return inside & (apart < 0.01 * lengths + 0.5)


def squared_length(vectors: np.ndarray) -> np.ndarray:
    """The squared lengths (...) of vectors (..., d); many times faster than a sum over the last axis."""
    return sum(np.square(vectors[..., axis]) for axis in range(vectors.shape[-1]))
