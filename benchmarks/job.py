"""One held-out clip with its inversion, ready for any edit."""

import dataclasses
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from batches import Batches
from benchmarks.clips import Clip
from config import PnPConfig, SDEditConfig
from control import canny
from denoiser import Denoiser, Source, TokenFlowDenoiser, keyframes_of
from diffusion import Schedule, StableDiffusion, invert, last, sample
from editor import edit
from metrics import frame_psnr
from predictor import FramesPredictor
from processes import Processes
from shapes.controlnet import CANNY_THRESHOLDS
from source_recorder import RecordingPredictor, install_recorder
from source_store import SourceStore
from techniques import Technique, controlnet, plug_and_play, sdedit
from trajectory import Trajectory

SDEDIT_START = 0.7
INVERSION_BATCH = 16  # frames


@dataclass(frozen=True)
class Job:
    """One clip with its inversion, ready for any method."""

    sd: StableDiffusion
    clip: Clip
    clean: torch.Tensor  # N 4 h w
    inverted: dict[int, torch.Tensor]  # by timestep, each N 4 h w
    folder: Path  # for files
    schedule: Schedule
    config: PnPConfig

    @classmethod
    def prepare(cls, sd: StableDiffusion, clip: Clip, config: PnPConfig, folder: Path) -> "Job":
        """Encode and invert a clip on the editing steps; files go to the `folder`."""
        schedule = Schedule.of(sd.scheduler, config.n_timesteps)
        clean, predictor = sd.encode_frames(clip.frames), predictor_of(sd, clip)
        inverted = dict(invert(clean, schedule, predictor, fixed_point=True))
        config = dataclasses.replace(config, prompt=clip.prompt)
        return cls(sd, clip, clean, inverted, folder, schedule, config)

    def reconstruct(self) -> torch.Tensor:
        """Latents (N, 4, h, w) sampled back; the source's features are kept on the way."""
        frames = torch.arange(self.clip.n_frames)
        keyframes = keyframes_of(self.config, self.sd.scheduler, self.clip.n_frames)
        self.store.create(self.sd.unet, self.clean.shape, self.schedule.timesteps)
        with install_recorder(self.sd.unet) as recorder:
            predictor = predictor_of(self.sd, self.clip)
            recording = RecordingPredictor(
                predictor, recorder, keyframes, self._source_latents, self.store
            )
            steps = sample(
                self.first_latents(frames), self.schedule, lambda x, t: recording(x, t, frames)
            )
            return last(steps)

    @property
    def store(self) -> SourceStore:
        """The source's features, once `reconstruct` has kept them."""
        return SourceStore(self.folder / "source")

    def with_settings(self, **changes) -> "Job":
        """The same job with other values in its configuration."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def edit_pnp(self, denoiser: type[Denoiser] = TokenFlowDenoiser) -> np.ndarray:
        """Frames (N, H, W, 3) edited with Plug-and-Play."""
        n_frames = self.clip.n_frames
        technique = plug_and_play(self.config, self.schedule, self.first_latents, n_frames)
        return self._edit(technique, denoiser)

    def edit_sdedit(self) -> np.ndarray:
        """Frames (N, H, W, 3) edited with SDEdit from the inversion's noise."""
        first = self.schedule.timesteps[0]
        steps = self.config.n_timesteps
        config = SDEditConfig(data_path="", prompt="unused", n_timesteps=steps, start=SDEDIT_START)
        scheduler, inverted, clean = self.sd.scheduler, self.first_latents, self.clean.__getitem__
        n_frames = self.clip.n_frames
        return self._edit(
            sdedit(config, self.schedule, scheduler, clean, inverted, first, n_frames)
        )

    def edit_controlnet(self) -> np.ndarray:
        """Frames (N, H, W, 3) edited with a Canny ControlNet, on an inversion without it."""
        edges = self.sd.to_images(canny(self.clip.frames, *CANNY_THRESHOLDS))
        inverted, n_frames, scales = self.first_latents, self.clip.n_frames, (0.0, 1.0)
        return self._edit(controlnet(self.schedule, inverted, n_frames, edges.__getitem__, *scales))

    def first_latents(self, frames: torch.Tensor) -> torch.Tensor:
        """The inverted latents (n, 4, h, w) of the first editing timestep, of the frames (n,)."""
        return self.inverted[self.schedule.timesteps[0]][frames]

    def _edit(
        self, technique: Technique, denoiser: type[Denoiser] = TokenFlowDenoiser
    ) -> np.ndarray:
        prompts = (self.clip.source_prompt, self.config.negative_prompt, self.config.prompt)
        source = self._source()
        with tempfile.TemporaryDirectory() as folder:
            trajectory = Trajectory(Path(folder), self.clean.shape, Processes(self.sd.device))
            steps = last(
                edit(self.sd, technique, source, prompts, self.config, trajectory, denoiser)
            )
            edited = trajectory.latents(steps)[torch.arange(self.clip.n_frames)]
        return self.sd.decode_latents(edited)

    def _source(self) -> Source:
        features = partial(self.store.read, device=self.sd.device)
        reused = self.config.reuse_source and self.config.propagation == "flanking"
        return Source(self._source_latents, features if reused else None)

    def _source_latents(self, t: int, frames: torch.Tensor) -> torch.Tensor:
        return self.inverted[t][frames]


def predictor_of(sd: StableDiffusion, clip: Clip) -> FramesPredictor:
    """Predicts the noise of a clip's frames under its own caption."""
    return FramesPredictor(sd, clip.source_prompt, Batches(INVERSION_BATCH, adapts=False))


def reconstruction_psnr(sd: StableDiffusion, clip: Clip, n_steps: int, fixed_point: bool) -> float:
    """PSNR (dB), against the VAE's round trip, of inverting and sampling in `n_steps` steps."""
    schedule, predictor = Schedule.of(sd.scheduler, n_steps), predictor_of(sd, clip)
    clean, frames = sd.encode_frames(clip.frames), torch.arange(clip.n_frames)
    _, noisiest = last(invert(clean, schedule, predictor, fixed_point))
    reconstructed = last(sample(noisiest, schedule, lambda x, t: predictor(x, t, frames)))
    pair = sd.decode_latents(reconstructed), sd.decode_latents(clean)
    return float(np.mean(frame_psnr(*pair)))
