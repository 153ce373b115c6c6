"""Noise prediction for any frames of one video under one prompt, as inverting and sampling it need."""

from collections.abc import Callable
from contextlib import nullcontext

import torch

from diffusion import Control, StableDiffusion
from source_recorder import SourceRecorder


class FramesPredictor:
    """Predicts the noise of frames in batches; a recorder may note what their passes show.

    control: for frame indices (n,), what conditions the ControlNet.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        prompt: str,
        batch_size: int,
        control: Callable[[torch.Tensor], Control] | None = None,
        recorder: SourceRecorder | None = None,
    ) -> None:
        self.sd, self.batch_size = sd, batch_size
        self.control, self.recorder = control, recorder
        self.text = sd.encode_text(prompt)  # 1 l d

    def __call__(
        self, latents: torch.Tensor, t: int, frames: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The noise (n, 4, h, w) in latents (n, 4, h, w) of the frames (n,), by default of all."""
        if frames is None:
            frames = torch.arange(len(latents))
        noise = torch.empty_like(latents)
        recorder = self.recorder if self.recorder and t in self.recorder.plan else None
        groups = recorder.in_order(t, frames) if recorder else [torch.arange(len(frames))]
        for group in groups:
            for part in group.split(self.batch_size):
                with recorder.noting(t, frames[part]) if recorder else nullcontext():
                    noise[part] = self._pass(latents[part], t, frames[part])
        return noise

    def _pass(self, latents: torch.Tensor, t: int, frames: torch.Tensor) -> torch.Tensor:
        control = self.control(frames) if self.control else None
        return self.sd.predict_noise(latents, t, self.text.expand(len(frames), -1, -1), control)
