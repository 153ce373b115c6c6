"""The edit: at every step a joint pass over the keyframes, then propagation to every frame.

A technique is an initial latent, a schedule, how long the source is injected, and a ControlNet's
condition; nothing here knows which technique it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from diffusers import DDIMScheduler

from config import EditConfig
from diffusion import Control, Schedule, StableDiffusion, sample
from tokenflow_utils import (
    COND,
    SOURCE,
    STREAMS,
    UNCOND,
    Blend,
    Keyframes,
    SourceFeatures,
    TokenFlow,
    flanking_blend,
    install_tokenflow,
    previous_blend,
)

# Latent pixels in one pass from which on more of them are no faster, only larger.
FILLED, FILLED_GPU = {"cpu": 1 << 12}, 1 << 15


@dataclass(frozen=True)
class Technique:
    """What makes an edit Plug-and-Play, SDEdit or ControlNet.

    latents: (N, 4, h, w) at the schedule's first timestep.
    attention_steps, feature_steps: how many steps, from the first, inject the source's attention
    and features.
    control: for frame indices (n,), what conditions the ControlNet in each stream: three times (n).
    """

    latents: torch.Tensor
    schedule: Schedule
    attention_steps: int = 0
    feature_steps: int = 0
    control: Callable[[torch.Tensor], tuple[Control, Control, Control]] | None = None


@dataclass(frozen=True)
class Source:
    """What an inversion knows of the source video.

    latents: the inverted latents (n, 4, h, w) of a timestep for frame indices (n,).
    features: for frames that are no keyframes, likewise, what propagation needs of the source stream;
    without it that stream is denoised along with the others.
    """

    latents: Callable[[int, torch.Tensor], torch.Tensor]
    features: Callable[[int, torch.Tensor], SourceFeatures] | None = None


class Denoiser:
    """Predicts the guided noise of a video's frames at one timestep, in passes of some streams."""

    def __init__(
        self,
        sd: StableDiffusion,
        flow: TokenFlow,
        technique: Technique,
        source: Source,
        prompts: tuple[str, str, str],
        config: EditConfig,
    ) -> None:
        self.sd, self.flow, self.config = sd, flow, config
        self.technique, self.source = technique, source
        self.text = torch.cat([sd.encode_text(prompt) for prompt in prompts])  # 3 l d
        timesteps = technique.schedule.timesteps
        self.attention_timesteps = frozenset(timesteps[: technique.attention_steps])
        self.feature_timesteps = frozenset(timesteps[: technique.feature_steps])

    def guided_noise(
        self,
        latents: torch.Tensor,
        t: int,
        frames: torch.Tensor,
        passes: tuple[tuple[int, ...], ...] = (STREAMS,),
    ) -> torch.Tensor:
        """Guided noise (n, 4, h, w) of the frames (n,) of latents (N, 4, h, w).

        passes: which streams go through the UNet together; SOURCE may be in none.
        """
        controls = self.technique.control(frames) if self.technique.control else None
        noise = {}
        for streams in passes:
            self.flow.streams = streams
            predicted = self._pass(latents, t, frames, streams, controls)
            noise |= zip(streams, predicted, strict=True)
        return noise[UNCOND] + self.config.guidance_scale * (noise[COND] - noise[UNCOND])

    def _pass(
        self,
        latents: torch.Tensor,
        t: int,
        frames: torch.Tensor,
        streams: tuple[int, ...],
        controls: tuple[Control, Control, Control] | None,
    ) -> torch.Tensor:
        """The noise (streams, n, 4, h, w) that one UNet pass predicts."""
        edited = latents[frames]
        source = self.source.latents(t, frames).to(latents) if SOURCE in streams else None
        samples = torch.cat([source if stream == SOURCE else edited for stream in streams])
        text = self.text[list(streams)].repeat_interleave(len(frames), dim=0)
        control = Control.cat([controls[stream] for stream in streams]) if controls else None
        return self.sd.predict_noise(samples, t, text, control).unflatten(0, (len(streams), -1))


class TokenFlowDenoiser(Denoiser):
    """Joint edit of random keyframes, then propagation to all other frames."""

    @cached_property
    def plan(self) -> dict[int, torch.Tensor]:
        """The keyframes (k,) of each timestep."""
        keyframes = keyframes_of(self.config, self.sd.scheduler, len(self.technique.latents))
        if self.config.propagation == "previous":  # the authors' code draws none at skipped steps
            keyframes = replace(keyframes, timesteps=self.technique.schedule.timesteps)
        return keyframes.plan()

    def predict_noise(self, latents: torch.Tensor, t: int) -> torch.Tensor:
        """The guided noise (N, 4, h, w) of all frames' latents (N, 4, h, w) at timestep `t`."""
        keyframes, frames = self.plan[t], torch.arange(len(latents))
        blend = self._blend(frames, keyframes)
        inject_features = t in self.feature_timesteps
        self.flow.begin_joint_edit(t in self.attention_timesteps, inject_features)
        noise = torch.empty_like(latents)
        # The layers remember their tokens. A keyframe that takes itself whole is done with this.
        noise[keyframes] = self.guided_noise(latents, t, keyframes)
        done = keyframes[blend.of(keyframes).whole == torch.arange(len(keyframes))]
        rest = frames[~torch.isin(frames, done)]
        for start in range(0, len(rest), self.config.batch_size):
            chunk = rest[start : start + self.config.batch_size]
            source = self.source.features(t, chunk) if self.source.features else None
            self.flow.begin_propagation(blend.of(chunk), inject_features, source)
            passes = self._passes(len(chunk) * latents[0, 0].numel()) if source else (STREAMS,)
            noise[chunk] = self.guided_noise(latents, t, chunk, passes)
        return noise

    def _passes(self, pixels: int) -> tuple[tuple[int, ...], ...]:
        """The edited streams one by one where one has enough latent pixels for the device, else together."""
        large = pixels >= FILLED.get(self.sd.device.type, FILLED_GPU)
        return ((UNCOND,), (COND,)) if large else ((UNCOND, COND),)

    def _blend(self, frames: torch.Tensor, keyframes: torch.Tensor) -> Blend:
        if self.config.propagation == "previous":
            return previous_blend(frames, self.config.interval)
        return flanking_blend(frames, keyframes)


def keyframes_of(config: EditConfig, scheduler: DDIMScheduler, n_frames: int) -> Keyframes:
    """The keyframes of an edit; steps that a technique skips have theirs too."""
    timesteps = Schedule.of(scheduler, config.n_timesteps).timesteps
    return Keyframes(n_frames, config.interval, timesteps, config.seed)


def edit(
    sd: StableDiffusion,
    technique: Technique,
    source: Source,
    prompts: tuple[str, str, str],
    config: EditConfig,
    denoiser: type[Denoiser] = TokenFlowDenoiser,
) -> Iterator[torch.Tensor]:
    """Edit a video; yields the latents (N, 4, h, w) after each step.

    prompts: of the source, uncond and cond streams.
    denoiser: how frames are made consistent; benchmarks put what they compare with here.
    """
    with install_tokenflow(sd.unet) as flow:
        predictor = denoiser(sd, flow, technique, source, prompts, config)
        yield from sample(technique.latents, technique.schedule, predictor.predict_noise)
