"""Plug-and-Play, SDEdit and ControlNet, each as what the editor needs to know of it."""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler

from config import PnPConfig, SDEditConfig
from diffusion import Control, Schedule
from editor import Technique


def plug_and_play(config: PnPConfig, schedule: Schedule, latents: torch.Tensor) -> Technique:
    """Tumanyan et al., arXiv 2211.12572: the first steps take over the source's attention and features.

    latents: (N, 4, h, w), inverted to the schedule's first timestep.
    """
    return Technique(
        latents,
        schedule,
        attention_steps=int(config.n_timesteps * config.pnp_attn_t),
        feature_steps=int(config.n_timesteps * config.pnp_f_t),
    )


def sdedit(
    config: SDEditConfig,
    schedule: Schedule,
    scheduler: DDIMScheduler,
    clean: torch.Tensor,
    inverted: torch.Tensor,
    inverted_timestep: int,
) -> Technique:
    """Meng et al., arXiv 2108.01073: the source is noised part of the way, and denoised from there.

    clean: the encoded frames, (N, 4, h, w). inverted: their inversion, at `inverted_timestep`.
    """
    if config.use_ddim_noise:  # what the inversion's end holds beyond the clean latents
        alpha = scheduler.alphas_cumprod[inverted_timestep]
        noise = (inverted - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    else:  # the same for all frames, so that it does not flicker
        generator = torch.Generator().manual_seed(config.seed)
        noise = torch.randn(clean[:1].shape, generator=generator).expand_as(clean)
    schedule = schedule.last(int(config.n_timesteps * config.start))
    first = torch.tensor(schedule.timesteps[0])
    return Technique(scheduler.add_noise(clean, noise, first), schedule)


def controlnet(
    schedule: Schedule,
    latents: torch.Tensor,
    images: Callable[[torch.Tensor], torch.Tensor],
    source_scale: float,
    edit_scale: float,
) -> Technique:
    """Zhang et al., arXiv 2302.05543: an image of each frame conditions a ControlNet.

    latents: (N, 4, h, w), inverted to the schedule's first timestep.
    images: for frame indices (n,), the conditions (n, 3, H, W) in [0, 1].
    source_scale, edit_scale: factors on the residuals; the source stream must see what the inversion
    saw, which is 0 where that was not conditioned.
    """

    def control(frames: torch.Tensor) -> tuple[Control, Control, Control]:
        shown = images(frames)
        source, edited = (
            Control(shown, torch.full((len(frames),), scale))
            for scale in (source_scale, edit_scale)
        )
        return source, edited, edited

    return Technique(latents, schedule, control=control)
