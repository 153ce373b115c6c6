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

    def edit(
        self,
        technique: Technique,
        denoiser: type[Denoiser] = TokenFlowDenoiser,
        **changes: str,
    ) -> np.ndarray:
        """Edited frames (N, H, W, 3), with other values of the configuration in `changes`."""
        config = dataclasses.replace(self.config, **changes)
        prompts = (self.clip.source_prompt, config.negative_prompt, config.prompt)
        steps = edit(self.sd, technique, self.source(config), prompts, config, denoiser)
        return self.sd.decode_latents(last(steps))

    def source(self, config: PnPConfig) -> Source:
        """What the inversion knows of the source, as an edit with that configuration takes it."""
        features = partial(self.store.read, device=self.sd.device)
        reused = config.reuse_source and config.propagation == "flanking"
        return Source(lambda t, f: self.inverted[t][f], features if reused else None)

    @property
    def first_latents(self) -> torch.Tensor:
        """The inverted latents (N, 4, h, w) of the first editing timestep."""
        return self.inverted[self.schedule.timesteps[0]]

    def pnp(self) -> Technique:
        """Plug-and-Play."""
        return plug_and_play(self.config, self.schedule, self.first_latents)

    def sdedit(self) -> Technique:
        """SDEdit from the inversion's noise."""
        config = SDEditConfig(
            data_path="", prompt="", n_timesteps=self.config.n_timesteps, start=SDEDIT_START
        )
        first = self.schedule.timesteps[0]
        scheduler, inverted = self.sd.scheduler, self.first_latents
        return sdedit(config, self.schedule, scheduler, self.clean, inverted, first)

    def controlnet(self) -> Technique:
        """A Canny ControlNet on an inversion without it."""
        edges = self.sd.to_images(canny(self.clip.frames, *CANNY_THRESHOLDS))
        return controlnet(self.schedule, self.first_latents, lambda frames: edges[frames], 0.0, 1.0)


def reconstruction_psnr(sd: StableDiffusion, clip: Clip, n_steps: int, fixed_point: bool) -> float:
    """PSNR (dB), against the VAE's round trip, of inverting and sampling in `n_steps` steps."""
    schedule = Schedule.of(sd.scheduler, n_steps)
    predict_noise = FramesPredictor(sd, clip.source_prompt, INVERSION_BATCH)
    clean = sd.encode_frames(clip.frames)
    _, noisiest = last(invert(clean, schedule, predict_noise, fixed_point))
    reconstructed = last(sample(noisiest, schedule, predict_noise))
    pair = sd.decode_latents(reconstructed), sd.decode_latents(clean)
    return float(np.mean(frame_psnr(*pair)))
