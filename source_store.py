"""The source stream's part in every edit of a video, on disk.

Keyframes depend on the seed alone, so which tokens of them each frame takes (section 4.2), and the
features that Plug-and-Play injects, are the same for every prompt. An edit that finds them here
denoises two streams instead of three.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from rows import Rows
from tokenflow_utils import INJECTED_RESNET, SourceFeatures

MAX_TOKENS = 1 << 15  # of a frame: indices have 16 bits
LEVELS = 4  # resolutions of the UNet, each half the one before
LEVEL = re.compile(r"(down|up)_blocks\.(\d)|mid_block")


@dataclass(frozen=True)
class SourceStore:
    """Source features of all frames at each timestep: `nearest_<t>.npy` and `features_<t>.npy`."""

    folder: Path

    def create(
        self,
        unet: UNet2DConditionModel,
        latent_shape: tuple[int, ...],
        timesteps: Iterable[int],
    ) -> None:
        """Make room for a video of latents (N, 4, h, w) at the timesteps, where there is none."""
        tokens = tokens_by_layer(unet, latent_shape)
        n_frames = latent_shape[0]
        for t in timesteps:
            shape = (n_frames, 2, sum(tokens.values()))
            Rows(self._file("nearest", t)).ensure(shape, torch.int16)
            shape = (n_frames, *features_shape(unet, latent_shape))
            Rows(self._file("features", t)).ensure(shape, torch.float16)
        (self.folder / "layers.json").write_text(json.dumps(tokens, indent=2) + "\n")

    def write(self, t: int, frames: torch.Tensor, source: SourceFeatures) -> None:
        """Keep the features of the frames (n,)."""
        nearest = torch.cat([source.nearest[name] for name in self._layers()], dim=-1)  # n 2 tokens
        Rows(self._file("nearest", t))[frames] = nearest
        Rows(self._file("features", t))[frames] = source.features

    def read(self, t: int, frames: torch.Tensor, device: torch.device) -> SourceFeatures:
        """The features of the frames (n,)."""
        layers = self._layers()
        nearest = Rows(self._file("nearest", t))[frames].to(device)
        features = Rows(self._file("features", t))[frames].to(device)
        per_layer = nearest.long().split(list(layers.values()), dim=-1)
        return SourceFeatures(dict(zip(layers, per_layer, strict=True)), features)

    def written(self, timesteps: Iterable[int], frames: torch.Tensor) -> Iterator[bytes]:
        """What is kept of the frames (n,), as it lies in the files."""
        for t in timesteps:
            for kind in ("nearest", "features"):
                yield Rows(self._file(kind, t)).bytes_of(frames)

    def _layers(self) -> dict[str, int]:
        return json.loads((self.folder / "layers.json").read_text())

    def _file(self, kind: str, t: int) -> Path:
        return self.folder / f"{kind}_{t}.npy"


def tokens_by_layer(unet: UNet2DConditionModel, latent_shape: tuple[int, ...]) -> dict[str, int]:
    """Tokens of a frame in each self-attention, by name, for latents (N, 4, h, w)."""
    height, width = latent_shape[-2:]
    tokens = {}
    for name in unet.attn_processors:
        if name.endswith(".attn1.processor"):
            side, block = LEVEL.match(name).groups()
            down = {"down": int(block or 0), "up": LEVELS - 1 - int(block or 0)}.get(
                side, LEVELS - 1
            )
            tokens[name] = height * width // 4**down
    return tokens


def features_shape(unet: UNet2DConditionModel, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (c, h, w) of what Plug-and-Play injects in a frame, for latents (N, 4, h, w)."""
    down = LEVELS - 1 - INJECTED_RESNET[0]
    channels = unet.config.block_out_channels[down]
    return channels, latent_shape[-2] // 2**down, latent_shape[-1] // 2**down


def bytes_needed(unet: UNet2DConditionModel, latent_shape: tuple[int, ...], n_steps: int) -> int:
    """Bytes that a `SourceStore` takes for latents (N, 4, h, w) at `n_steps` timesteps."""
    tokens = sum(tokens_by_layer(unet, latent_shape).values())
    features = math.prod(features_shape(unet, latent_shape))
    return 2 * latent_shape[0] * n_steps * (2 * tokens + features)
