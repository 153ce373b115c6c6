"""Which frames are keyframes: a random one of each interval, drawn anew at each timestep."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KeyframeSchedule:
    """What decides which frames are keyframes at each timestep."""

    n_frames: int
    interval: int  # frames per keyframe
    timesteps: tuple[int, ...]  # the noisiest first
    seed: int

    def draw(self) -> dict[int, torch.Tensor]:
        """The keyframes (k,) of each timestep: one random frame of each interval, in ascending order."""
        generator = torch.Generator().manual_seed(self.seed)  # used for nothing else
        starts = torch.arange(0, self.n_frames, self.interval)
        last = self.n_frames - 1  # a draw may lie beyond a short last interval
        interval, shape = self.interval, starts.shape
        draws = [torch.randint(interval, shape, generator=generator) for _ in self.timesteps]
        return {t: (starts + d).clamp(max=last) for t, d in zip(self.timesteps, draws, strict=True)}
