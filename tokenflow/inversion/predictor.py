"""Noise prediction for any frames of one video under one prompt, for inversion and reconstruction."""

from collections.abc import Sequence
from functools import partial

import torch

from tokenflow.control.control_images import ControlImages
from tokenflow.diffusion.stable_diffusion import Control, StableDiffusion
from tokenflow.runtime.batching import Batches
from tokenflow.runtime.frame_array import FrameArray


class VideoNoisePredictor:
    """Predicts the noise of a video's frames in batches, throughout a run.

    depth: of all frames, (N, 1, h, w), if the UNet takes it.
    images, scales: what conditions the ControlNets, if there are any.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        prompt: str,
        batches: Batches,
        depth: FrameArray | None = None,
        images: ControlImages | None = None,
        scales: Sequence[float] = (),
    ) -> None:
        self.sd, self.batches, self.depth = sd, batches, depth
        self.images, self.scales = images, scales
        self.text = sd.encode_text(prompt)
        self._planned: set[int] = set()  # sizes of passes

    def __call__(self, latents: torch.Tensor, t: int, frames: torch.Tensor) -> torch.Tensor:
        """The noise (n, 4, h, w) in latents (n, 4, h, w) of the frames (n,)."""
        return self.batches.map(partial(self.predict_batch, t), latents, frames)

    def predict_batch(self, t: int, latents: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """The noise of one batch, in one UNet pass, in which the last sample may be repeated at the end."""
        n = len(frames)
        places = torch.arange(self._size_for(n)).clamp(max=n - 1)
        latents, frames = latents[places], frames[places]
        depth = None if self.depth is None else self.depth[frames]
        control = None
        if self.images:
            control = Control.of(self.sd.to_images(self.images[frames]), self.scales)
        text = self.text.expand(len(frames))
        return self.sd.predict_noise(latents, t, text, control, depth)[:n]

    def measure_error(self, clean: torch.Tensor, seed: int) -> float:
        """Mean square error of the noise predicted in the first n frames' `clean` latents, after noising."""
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        t = self.sd.scheduler.config.num_train_timesteps // 2  # where the prompt matters most
        noised = self.sd.scheduler.add_noise(clean, noise, torch.tensor(t))
        return (self(noised, t, torch.arange(len(clean))) - noise).square().mean().item()

    def _size_for(self, n: int) -> int:
        """The samples that pass for n of them: where sizes are planned, a near one that has a plan."""
        if not self.sd.plans_by_shape:
            return n
        most = min(n + n // 2, self.batches.size)
        near = [size for size in self._planned if n <= size <= most]
        if not near:
            self._planned.add(n)
        return min(near, default=n)
