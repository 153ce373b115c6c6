"""Source features: what edits need from the source stream, kept on disk with an inversion.

Keyframes do not depend on the prompt. Neither do the keyframe tokens that each frame takes (section 4.2)
or the features that Plug-and-Play injects. An edit that reads them denoises two streams instead of three.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from tokenflow.config import PreprocessConfig
from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.layouts import count_tokens, features_shape
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.transfer import to_device
from tokenflow_utils import SourceFeatures

log = logging.getLogger("tokenflow")

MAX_TOKENS = 1 << 15  # of a frame, as indices have 16 bits


@dataclass(frozen=True)
class SourceFeatureFiles:
    """Source features of all frames at each timestep: `nearest_<t>.npy` and `features_<t>.npy`."""

    folder: Path

    def create(
        self, unet: UNet2DConditionModel, latent_shape: tuple[int, ...], timesteps: Iterable[int]
    ) -> None:
        """Create the files for latents (N, 4, h, w) at the timesteps, unless they exist."""
        tokens, n_frames = count_tokens(unet, latent_shape), latent_shape[0]
        of_features = features_shape(unet, latent_shape)
        for t in timesteps:
            self._nearest(t).ensure((n_frames, 2, sum(tokens.values())), torch.int16)
            self._features(t).ensure((n_frames, *of_features), torch.float16)
        (self.folder / "layers.json").write_text(json.dumps(tokens, indent=2) + "\n")

    def write(self, t: int, frames: torch.Tensor, source: SourceFeatures) -> None:
        """Write the features of the frames (n,)."""
        nearest = torch.cat([source.nearest[name] for name in self._layers], dim=-1)  # n 2 tokens
        self._nearest(t)[frames] = nearest.short()  # before it leaves the device
        self._features(t)[frames] = source.features

    def read(
        self, t: int, frames: torch.Tensor, injected: bool, device: torch.device
    ) -> SourceFeatures:
        """Read the features of the frames (n,); most bytes are for Plug-and-Play, read only if `injected`."""
        nearest = to_device(self._nearest(t)[frames], device).long()
        per_layer = nearest.split(list(self._layers.values()), dim=-1)
        features = to_device(self._features(t)[frames], device) if injected else None
        return SourceFeatures(dict(zip(self._layers, per_layer, strict=True)), features)

    def arrays(self, t: int) -> list[FrameArray]:
        """The files of a timestep."""
        return [self._nearest(t), self._features(t)]

    @cached_property
    def _layers(self) -> dict[str, int]:
        return json.loads((self.folder / "layers.json").read_text())

    def _nearest(self, t: int) -> FrameArray:
        return FrameArray(self.folder / f"nearest_{t}.npy")

    def _features(self, t: int) -> FrameArray:
        return FrameArray(self.folder / f"features_{t}.npy")


def bytes_needed(unet: UNet2DConditionModel, latent_shape: tuple[int, ...], n_steps: int) -> int:
    """Bytes that a `SourceFeatureFiles` takes for latents (N, 4, h, w) at `n_steps` timesteps."""
    tokens = sum(count_tokens(unet, latent_shape).values())
    features = math.prod(features_shape(unet, latent_shape))
    return 2 * latent_shape[0] * n_steps * (2 * tokens + features)


def can_keep_source_features(
    sd: StableDiffusion,
    folder: Path,
    config: PreprocessConfig,
    latent_shape: tuple[int, ...],
    editing: Schedule,
) -> bool:
    """Whether source features are wanted and fit on the disk of `folder`; logs the space that they take."""
    if not config.keep_source or config.inversion != "fixed_point":
        return False  # naive inversion evaluates the UNet at other latents than it saves
    needed = bytes_needed(sd.unet, latent_shape, len(editing.timesteps))
    problem = None
    if latent_shape[-2] * latent_shape[-1] > MAX_TOKENS:
        problem = "frames are too large"
    elif needed > shutil.disk_usage(folder).free:
        problem = f"they take {needed / 1e6:.0f} MB, more disk than is free"
    if problem:
        log.warning(
            "source features are not kept, because %s: edits will denoise the source too", problem
        )
        return False
    log.info("source features, which make edits faster, take %.0f MB of disk", needed / 1e6)
    return True
