"""The source stream's part in every edit of a video, on disk.

Keyframes depend on the seed alone, so which tokens of them each frame takes (section 4.2), and the
features that Plug-and-Play injects, are the same for every prompt. An edit that finds them here
denoises two streams instead of three.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from tokenflow_utils import SourceFeatures

MAX_TOKENS = 1 << 15  # of a frame: indices have 16 bits


@dataclass(frozen=True)
class SourceStore:
    """Source features of all frames at each timestep: `nearest_<t>.npy` and `features_<t>.npy`."""

    folder: Path

    def write(self, t: int, frames: torch.Tensor, source: SourceFeatures, n_frames: int) -> None:
        """Keep the features of the frames (n,) of a video of `n_frames`."""
        layers = {name: nearest.shape[-1] for name, nearest in source.nearest.items()}
        index = self.folder / "layers.json"
        if not index.exists():
            self.folder.mkdir(exist_ok=True)
            index.write_text(json.dumps(layers, indent=2) + "\n")
        nearest = torch.cat(list(source.nearest.values()), dim=-1).short()  # n 2 tokens
        for path, values in ((self._nearest(t), nearest), (self._features(t), source.features)):
            values = values.cpu().numpy()
            if not path.exists():
                shape = (n_frames, *values.shape[1:])
                np.lib.format.open_memmap(path, "w+", values.dtype, shape)
            np.load(path, mmap_mode="r+")[frames.numpy()] = values

    def read(self, t: int, frames: torch.Tensor, device: torch.device) -> SourceFeatures:
        """The features of the frames (n,)."""
        layers = json.loads((self.folder / "layers.json").read_text())
        nearest, features = (
            torch.from_numpy(np.load(path, mmap_mode="r")[frames.numpy()]).to(device)
            for path in (self._nearest(t), self._features(t))
        )
        per_layer = nearest.long().split(list(layers.values()), dim=-1)
        return SourceFeatures(dict(zip(layers, per_layer, strict=True)), features)

    def _nearest(self, t: int) -> Path:
        return self.folder / f"nearest_{t}.npy"

    def _features(self, t: int) -> Path:
        return self.folder / f"features_{t}.npy"


def bytes_needed(unet: UNet2DConditionModel, latent_shape: tuple[int, ...], n_steps: int) -> int:
    """Bytes that a `SourceStore` takes for latents (N, 4, h, w) at `n_steps` timesteps."""
    n_frames, _, h, w = latent_shape
    # Five self-attentions at each of the first three of SD's four levels, one at the last.
    tokens = 5 * (h * w + h * w // 4 + h * w // 16) + h * w // 64
    features = unet.config.block_out_channels[-2] * h * w // 16
    return 2 * n_frames * n_steps * (2 * tokens + features)
