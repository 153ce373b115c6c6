"""Plug-and-Play, SDEdit and ControlNet, each reduced to what the denoiser needs."""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler

from tokenflow.config import ControlNetConfig, PnPConfig, SDEditConfig
from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.stable_diffusion import Control
from tokenflow.editing.source import Source


class Technique:
    """Where an edit starts, what it takes over from the source on its way, and what conditions it.

    attention_steps, feature_steps: how many steps, from the first, inject the source's attention or features.
    """

    attention_steps = feature_steps = 0

    def __init__(self, schedule: Schedule, source: Source) -> None:
        self.schedule, self.source = schedule, source

    def start(self, frames: torch.Tensor) -> torch.Tensor:
        """Latents (n, 4, h, w) of the frames (n,) at the schedule's first timestep: the inverted ones."""
        return self.source.latents(self.schedule.timesteps[0], frames)

    def control(self, frames: torch.Tensor) -> tuple[Control, Control] | None:
        """What conditions the frames (n,) of the source and of the edit; None without ControlNets."""
        return None


class PlugAndPlay(Technique):
    """Tumanyan et al., arXiv 2211.12572: the first steps take over the source's attention and features."""

    def __init__(self, config: PnPConfig, schedule: Schedule, source: Source) -> None:
        super().__init__(schedule, source)
        self.attention_steps = int(config.n_timesteps * config.pnp_attn_t)
        self.feature_steps = int(config.n_timesteps * config.pnp_f_t)


class SDEdit(Technique):
    """Meng et al., arXiv 2108.01073: the source is noised part of the way, and denoised from there."""

    def __init__(
        self, config: SDEditConfig, schedule: Schedule, source: Source, scheduler: DDIMScheduler
    ) -> None:
        super().__init__(schedule.last(int(config.n_timesteps * config.start)), source)
        self.config, self.scheduler = config, scheduler

    def start(self, frames: torch.Tensor) -> torch.Tensor:
        """Latents (n, 4, h, w) of the frames (n,), noised to the schedule's first timestep."""
        clean = self.source.latents(None, frames)
        if self.config.use_ddim_noise:  # the noise in the inverted latents
            noisiest, t = self.source.noisiest_latents(frames), self.source.noisiest_timestep
            alpha = self.scheduler.alphas_cumprod[t]
            noise = (noisiest - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        else:  # the same for all frames, so that it does not flicker
            generator = torch.Generator().manual_seed(self.config.seed)
            noise = torch.randn(clean[:1].shape, generator=generator).expand_as(clean)
        return self.scheduler.add_noise(clean, noise, torch.tensor(self.schedule.timesteps[0]))


class ControlNet(Technique):
    """Zhang et al., arXiv 2302.05543: control images of each frame condition m ControlNets.

    images: maps frames (n,) to their control images (m, n, 3, H, W) in [0, 1].
    """

    def __init__(
        self,
        config: ControlNetConfig,
        schedule: Schedule,
        source: Source,
        images: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__(schedule, source)
        self.images, self.scales = images, config.control_scales
        # The source stream is denoised as it was inverted, which may have been without ControlNets.
        self.source_scales = source.control_scales or [0.0] * len(self.scales)

    def control(self, frames: torch.Tensor) -> tuple[Control, Control]:
        """What conditions the frames (n,) of the source and of the edit."""
        images = self.images(frames)
        return Control.of(images, self.source_scales), Control.of(images, self.scales)
