"""The depth of a video's frames, for ControlNets and as the fifth channel of Stable Diffusion 2 depth."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from tokenflow.diffusion.parts import Repository
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.video.write import write_video

# MiDaS, the model whose depth Stable Diffusion 2 depth and the depth ControlNets were trained with.
DEPTH_MODEL = "Intel/dpt-hybrid-midas"
DEPTH_VIDEO = "depth.mp4"


@dataclass(frozen=True)
class DepthModel:
    """Estimates the relative inverse depth of frames: the nearer, the larger."""

    network: torch.nn.Module
    processor: Callable
    device: torch.device

    @torch.no_grad()
    def estimate(self, frame: np.ndarray, height: int, width: int) -> np.ndarray:
        """The depth, fp32 (height, width), of a frame, uint8 RGB (H, W, 3)."""
        pixels = self.processor(images=frame, return_tensors="pt").pixel_values.to(self.device)
        depth = self.network(pixels).predicted_depth.float()  # 1 h w
        resize = torch.nn.functional.interpolate
        return resize(depth[None], (height, width), mode="bicubic")[0, 0].cpu().numpy()

    def scale(
        self, frames: Callable[[], Iterable[np.ndarray]], height: int, width: int
    ) -> Iterator[np.ndarray]:
        """The depth of each frame, fp32 (height, width), from -1 at the farthest to 1 at the nearest.

        The farthest and the nearest are those of the whole video. With those of each frame by itself, as
        diffusers' pipeline for single images has it, the depth of everything would jump when something
        near enters. The frames, which `frames` gives anew, pass twice, so that only one is in memory.
        """
        bounds = [(d.min(), d.max()) for d in (self.estimate(f, height, width) for f in frames())]
        least, most = min(low for low, _ in bounds), max(high for _, high in bounds)
        range_ = (most - least) or 1  # nothing is near or far in a video of one colour
        for frame in frames():
            yield 2 * (self.estimate(frame, height, width) - least) / range_ - 1

    def draw(self, frames: Callable[[], Iterable[np.ndarray]]) -> Iterator[np.ndarray]:
        """The depth of each frame as an image, uint8 RGB (H, W, 3): white is the nearest."""
        height, width = next(iter(frames())).shape[:2]
        for depth in self.scale(frames, height, width):
            yield draw_depth(depth, height, width)

    def write(self, frames: Callable[[], Iterable[np.ndarray]], depth: FrameArray) -> None:
        """Write the depth of the frames to `depth`, whose shape is (N, 1, h, w)."""
        n_frames, _, height, width = depth.shape
        scaled = self.scale(frames, height, width)
        for index, row in enumerate(tqdm(scaled, "Finding depth", n_frames, unit="frame")):
            depth[torch.tensor([index])] = torch.from_numpy(row)[None, None]


def draw_depth(depth: np.ndarray, height: int, width: int) -> np.ndarray:
    """Depth (h, w) in [-1, 1] as an image, uint8 RGB (height, width, 3): white is the nearest."""
    grey = np.round((depth + 1) * 127.5).clip(0, 255).astype(np.uint8)
    grey = cv2.resize(grey, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.repeat(grey[..., None], 3, axis=-1)


def load_depth_model(
    model: str, device: torch.device, parts: tuple[str | None, str | None] = (None, None)
) -> DepthModel:
    """A depth model from a hub id or a folder. parts: the subfolders of its network and its processor."""
    where = Repository(model, "depth_model" if parts[0] is None else "model")
    safe = {"trust_remote_code": False}  # else transformers asks on standard input
    of_network, of_processor = parts
    network = where.load(AutoModelForDepthEstimation.from_pretrained, of_network, safe)
    processor = where.load(AutoImageProcessor.from_pretrained, of_processor, safe)
    return DepthModel(network.float().eval().to(device), processor, device)


def write_depth_video(
    path: Path, depth: FrameArray, n_frames: int, size: tuple[int, int], fps: Fraction
) -> None:
    """Show the depth of the first `n_frames` frames, enlarged to a size (H, W) in pixels, as a video."""
    rows = (depth[torch.tensor([index])][0, 0].numpy() for index in range(n_frames))
    write_video(path, (draw_depth(row, *size) for row in rows), fps)
