"""One held-out clip with its inversion, ready for any edit."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.clips import Clip
from config import PnPConfig, SDEditConfig
from control import canny
from diffusion import Schedule, StableDiffusion, invert, last, sample
from editor import Denoiser, Source, Technique, TokenFlowDenoiser, edit, keyframes_of
from metrics import frame_psnr
from predictor import FramesPredictor
from shapes.controlnet import CANNY_THRESHOLDS
from source_recorder import install_recorder
from source_store import SourceStore
from techniques import controlnet, plug_and_play, sdedit

SDEDIT_START = 0.7
INVERSION_BATCH = 16  # frames


@dataclass(frozen=True)
class Job:
    """One clip with its inversion, ready for any method."""

    sd: StableDiffusion
    clip: Clip
    clean: torch.Tensor  # N 4 h w
    inverted: dict[int, torch.Tensor]  # by timestep, each N 4 h w
    store: SourceStore
    schedule: Schedule
    config: PnPConfig

    @classmethod
    def prepare(cls, sd: StableDiffusion, clip: Clip, config: PnPConfig, folder: Path) -> "Job":
        """Encode and invert a clip on the editing steps; the source's features go to `folder`."""
        schedule = Schedule.of(sd.scheduler, config.n_timesteps)
        clean, store = sd.encode_frames(clip.frames), SourceStore(folder)
        keyframes = keyframes_of(config, sd.scheduler, clip.n_frames)
        with install_recorder(sd.unet, keyframes, store) as recorder:
            predict_noise = FramesPredictor(sd, clip.source_prompt, INVERSION_BATCH, None, recorder)
            inverted = dict(invert(clean, schedule, predict_noise, fixed_point=True))
        config = dataclasses.replace(config, prompt=clip.prompt)
        return cls(sd, clip, clean, inverted, store, schedule, config)

    def with_settings(self, **changes) -> "Job":
        """The same job with other values in its configuration."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def edit_pnp(self, denoiser: type[Denoiser] = TokenFlowDenoiser) -> np.ndarray:
        """Frames (N, H, W, 3) edited with Plug-and-Play."""
        return self._edit(plug_and_play(self.config, self.schedule, self.first_latents), denoiser)

    def edit_sdedit(self) -> np.ndarray:
        """Frames (N, H, W, 3) edited with SDEdit from the inversion's noise."""
        first = self.schedule.timesteps[0]
        steps = self.config.n_timesteps
        config = SDEditConfig(data_path="", prompt="", n_timesteps=steps, start=SDEDIT_START)
        scheduler, inverted = self.sd.scheduler, self.first_latents
        return self._edit(sdedit(config, self.schedule, scheduler, self.clean, inverted, first))

    def edit_controlnet(self) -> np.ndarray:
        """Frames (N, H, W, 3) edited with a Canny ControlNet, on an inversion without it."""
        edges = self.sd.to_images(canny(self.clip.frames, *CANNY_THRESHOLDS))
        scales = 0.0, 1.0
        return self._edit(
            controlnet(self.schedule, self.first_latents, lambda frames: edges[frames], *scales)
        )

    @property
    def first_latents(self) -> torch.Tensor:
        """The inverted latents (N, 4, h, w) of the first editing timestep."""
        return self.inverted[self.schedule.timesteps[0]]

    def _edit(
        self, technique: Technique, denoiser: type[Denoiser] = TokenFlowDenoiser
    ) -> np.ndarray:
        prompts = (self.clip.source_prompt, self.config.negative_prompt, self.config.prompt)
        steps = edit(self.sd, technique, self._source(), prompts, self.config, denoiser)
        return self.sd.decode_latents(last(steps))

    def _source(self) -> Source:
        features = partial(self.store.read, device=self.sd.device)
        reused = self.config.reuse_source and self.config.propagation == "flanking"
        return Source(lambda t, f: self.inverted[t][f], features if reused else None)


def reconstruction_psnr(sd: StableDiffusion, clip: Clip, n_steps: int, fixed_point: bool) -> float:
    """PSNR (dB), against the VAE's round trip, of inverting and sampling in `n_steps` steps."""
    schedule = Schedule.of(sd.scheduler, n_steps)
    predict_noise = FramesPredictor(sd, clip.source_prompt, INVERSION_BATCH)
    clean = sd.encode_frames(clip.frames)
    _, noisiest = last(invert(clean, schedule, predict_noise, fixed_point))
    reconstructed = last(sample(noisiest, schedule, predict_noise))
    pair = sd.decode_latents(reconstructed), sd.decode_latents(clean)
    return float(np.mean(frame_psnr(*pair)))
