"""The edit: at every step a joint pass over the keyframes, then propagation to every frame.

A technique is an initial latent, a schedule, how long the source is injected, and a ControlNet's
condition; nothing here knows which technique it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from config import EditConfig
from diffusion import Control, Schedule, StableDiffusion, sample
from tokenflow_utils import (
    COND,
    N_STREAMS,
    UNCOND,
    TokenFlow,
    draw_keyframes,
    flanking_weights,
    install_tokenflow,
    previous_weights,
)


@dataclass(frozen=True)
class Technique:
    """What makes an edit Plug-and-Play, SDEdit or ControlNet.

    latents: (N, 4, h, w) at the schedule's first timestep.
    attention_steps, feature_steps: how many steps, from the first, inject the source's attention
    and features.
    control: for frame indices (n,), what conditions the ControlNet for their three streams (3n).
    """

    latents: torch.Tensor
    schedule: Schedule
    attention_steps: int = 0
    feature_steps: int = 0
    control: Callable[[torch.Tensor], Control] | None = None


SourceLatents = Callable[[int, torch.Tensor], torch.Tensor]


class Denoiser:
    """Predicts the guided noise of a video's frames at one timestep, in passes of three streams."""

    def __init__(
        self,
        sd: StableDiffusion,
        flow: TokenFlow,
        technique: Technique,
        source_latents: SourceLatents,
        prompts: tuple[str, str, str],
        config: EditConfig,
    ) -> None:
        self.sd, self.flow, self.config = sd, flow, config
        self.source_latents = source_latents
        self.control = technique.control
        self.text = torch.cat([sd.encode_text(prompt) for prompt in prompts])  # 3 l d
        timesteps = technique.schedule.timesteps
        self.attention_timesteps = frozenset(timesteps[: technique.attention_steps])
        self.feature_timesteps = frozenset(timesteps[: technique.feature_steps])

    def guided_noise(self, latents: torch.Tensor, t: int, frames: torch.Tensor) -> torch.Tensor:
        """One UNet pass over the frames (n,) of latents (N, 4, h, w): guided noise (n, 4, h, w)."""
        source = self.source_latents(t, frames).to(latents)
        streams = torch.cat([source, latents[frames], latents[frames]])  # 3n 4 h w
        text = self.text.repeat_interleave(len(frames), dim=0)  # 3n l d
        control = self.control(frames) if self.control else None
        noise = self.sd.predict_noise(streams, t, text, control).unflatten(0, (N_STREAMS, -1))
        return noise[UNCOND] + self.config.guidance_scale * (noise[COND] - noise[UNCOND])


class TokenFlowDenoiser(Denoiser):
    """Joint edit of random keyframes, then propagation to every chunk of frames."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # Draws keyframes and nothing else, so that a run can be repeated.
        self.generator = torch.Generator().manual_seed(self.config.seed)

    def predict_noise(self, latents: torch.Tensor, t: int) -> torch.Tensor:
        """The guided noise (N, 4, h, w) of all frames' latents (N, 4, h, w) at timestep `t`."""
        frames = torch.arange(len(latents))
        keyframes = draw_keyframes(len(latents), self.config.batch_size, self.generator)
        weights = self._weights(frames, keyframes)  # N k
        inject_features = t in self.feature_timesteps
        self.flow.begin_joint_edit(t in self.attention_timesteps, inject_features)
        joint = self.guided_noise(latents, t, keyframes)  # and the layers remember their tokens
        noise = torch.empty_like(latents)
        noise[keyframes] = joint
        # A keyframe that takes itself whole would only repeat its joint pass.
        repeated = keyframes[weights[keyframes, torch.arange(len(keyframes))] == 1]
        rest = frames[~torch.isin(frames, repeated)]
        for start in range(0, len(rest), self.config.batch_size):
            chunk = rest[start : start + self.config.batch_size]
            self.flow.begin_propagation(weights[chunk], inject_features)
            noise[chunk] = self.guided_noise(latents, t, chunk)
        return noise

    def _weights(self, frames: torch.Tensor, keyframes: torch.Tensor) -> torch.Tensor:
        if self.config.propagation == "previous":
            return previous_weights(frames, keyframes, self.config.batch_size)
        return flanking_weights(frames, keyframes)


def edit(
    sd: StableDiffusion,
    technique: Technique,
    source_latents: SourceLatents,
    prompts: tuple[str, str, str],
    config: EditConfig,
    denoiser: type[Denoiser] = TokenFlowDenoiser,
) -> Iterator[torch.Tensor]:
    """Edit a video; yields the latents (N, 4, h, w) after each step.

    source_latents: the inverted latents (n, 4, h, w) of a timestep for frame indices (n,).
    prompts: of the source, uncond and cond streams.
    denoiser: how frames are made consistent; benchmarks put what they compare with here.
    """
    with install_tokenflow(sd.unet) as flow:
        predictor = denoiser(sd, flow, technique, source_latents, prompts, config)
        yield from sample(technique.latents, technique.schedule, predictor.predict_noise)
