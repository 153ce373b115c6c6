"""Plug-and-Play, SDEdit and ControlNet, each reduced to what the denoiser needs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DDIMScheduler

from tokenflow.config import ControlNetConfig, PnPConfig, SDEditConfig
from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.stable_diffusion import Control
from tokenflow.editing.source import Source


@dataclass(frozen=True)
class Technique:
    """What makes an edit Plug-and-Play, SDEdit or ControlNet.

    initial: maps frame indices (n,) to latents (n, 4, h, w) at the schedule's first timestep.
    attention_steps, feature_steps: how many steps, from the first, inject the source's attention
    and features.
    control: maps frame indices (n,) to the conditions of the ControlNets, one for each stream.
    """

    initial: Callable[[torch.Tensor], torch.Tensor]
    schedule: Schedule
    attention_steps: int = 0
    feature_steps: int = 0
    control: Callable[[torch.Tensor], tuple[Control, Control, Control]] | None = None


def plug_and_play(config: PnPConfig, schedule: Schedule, source: Source) -> Technique:
    """Tumanyan et al., arXiv 2211.12572: the first steps take over the source's attention and features."""
    return Technique(
        partial(source.latents, schedule.timesteps[0]),
        schedule,
        attention_steps=int(config.n_timesteps * config.pnp_attn_t),
        feature_steps=int(config.n_timesteps * config.pnp_f_t),
    )


def sdedit(
    config: SDEditConfig, schedule: Schedule, source: Source, scheduler: DDIMScheduler
) -> Technique:
    """Meng et al., arXiv 2108.01073: the source is noised part of the way, and denoised from there."""
    schedule = schedule.last(int(config.n_timesteps * config.start))
    first = torch.tensor(schedule.timesteps[0])
    alpha = scheduler.alphas_cumprod[source.noisiest_timestep]

    def noised(frames: torch.Tensor) -> torch.Tensor:
        latents = source.latents(None, frames)
        if config.use_ddim_noise:  # the noise in the inverted latents
            noise = (source.noisiest_latents(frames) - alpha.sqrt() * latents) / (1 - alpha).sqrt()
        else:  # the same for all frames, so that it does not flicker
            generator = torch.Generator().manual_seed(config.seed)
            noise = torch.randn(latents[:1].shape, generator=generator).expand_as(latents)
        return scheduler.add_noise(latents, noise, first)

    return Technique(noised, schedule)


def controlnet(
    config: ControlNetConfig,
    schedule: Schedule,
    source: Source,
    images: Callable[[torch.Tensor], torch.Tensor],
) -> Technique:
    """Zhang et al., arXiv 2302.05543: images of each frame condition m ControlNets.

    images: maps frame indices (n,) to the control images (m, n, 3, H, W) in [0, 1].
    """
    edit_scales = config.control_scales
    # The source stream is denoised as it was inverted, which may have been without ControlNets.
    source_scales = source.control_scales or [0.0] * len(edit_scales)

    def control(frames: torch.Tensor) -> tuple[Control, Control, Control]:
        shown = images(frames)
        source, edited = (Control.of(shown, scales) for scales in (source_scales, edit_scales))
        return source, edited, edited

    return Technique(partial(source.latents, schedule.timesteps[0]), schedule, control=control)
