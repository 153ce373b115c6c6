"""What each step of an edit does: its keyframes, the streams of its passes, and how frames are guided."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum

import torch
from diffusers import DDIMScheduler

from tokenflow.config import EditConfig
from tokenflow.diffusion.ddim import Schedule
from tokenflow.editing.consensus import Consensus
from tokenflow.editing.source import Source
from tokenflow.editing.techniques import Technique
from tokenflow.propagation.keyframes import KeyframeSchedule
from tokenflow.runtime.frame_array import FrameArray
from tokenflow_utils import COND, SOURCE, UNCOND, Blend, flanking_blend, previous_blend

LATE = 0.44  # share of the steps, the last ones, in which propagated differences lose fine detail
ALONE = 0.3  # share of the steps, the first ones, in which no frame can do without an evaluation


class Guidance(Enum):
    """Where the frames of a step have their guiding differences from."""

    NONE = "no difference, since the guidance scale is 1"
    EVERY_FRAME = "each frame's own"
    KEYFRAMES = "that of the keyframes, propagated"
    REUSED = "each frame's in the step before"
    ALONE = "as KEYFRAMES; other frames are not evaluated, but moved by what the keyframes change"

    @property
    def needs_memory(self) -> bool:
        """Whether each frame needs something of the step before, besides its latents."""
        return self in (Guidance.REUSED, Guidance.ALONE)


# The edit's streams in which keyframes pass the UNet, if not uncond and cond; and other frames, if not cond.
JOINT = {Guidance.NONE: (COND,), Guidance.REUSED: (COND,)}
PROPAGATED = {Guidance.EVERY_FRAME: (UNCOND, COND), Guidance.ALONE: ()}


def plan_guidance(
    config: EditConfig, n_steps: int, consensus_steps: Collection[int]
) -> list[Guidance]:
    """The guidance of each of the steps of an edit, of which some end with a consensus."""
    if config.guidance_scale == 1:
        plan = [Guidance.NONE] * n_steps
    elif config.resolve("guidance") == "every_frame":
        plan = [Guidance.EVERY_FRAME] * n_steps
    else:
        plan = [Guidance.KEYFRAMES] * n_steps
        late = 0 if config.alternate else int(LATE * n_steps)
        for before_last in range(late):
            kinds = Guidance.REUSED, Guidance.EVERY_FRAME
            plan[n_steps - 1 - before_last] = kinds[before_last % 2]
    if config.alternate:  # never two steps in a row, and never the last one
        for step in range(max(1, int(ALONE * n_steps)), n_steps - 1):
            if step not in consensus_steps and plan[step - 1] is not Guidance.ALONE:
                plan[step] = Guidance.ALONE
    return plan


def plan_keyframes(config: EditConfig, scheduler: DDIMScheduler, n_frames: int) -> KeyframeSchedule:
    """The keyframe schedule of an edit, which includes the steps that a technique skips."""
    timesteps = Schedule.of(scheduler, config.n_timesteps).timesteps
    return KeyframeSchedule(n_frames, config.keyframe_interval, timesteps, config.seed)


@dataclass(frozen=True)
class Step:
    """One step of an edit: its keyframes (k,), and which of them each frame of the video blends.

    key_streams, streams: in which keyframes and other frames pass the UNet, ascending.
    memory: (N, 4, h, w), what the step before left for this one, if its guidance needs that.
    """

    t: int
    alpha: float
    keyframes: torch.Tensor
    blend: Blend
    injects_attention: bool
    injects_features: bool
    guidance: Guidance
    key_streams: tuple[int, ...]
    streams: tuple[int, ...]
    memory: FrameArray | None = None

    @property
    def done(self) -> torch.Tensor:
        """Which frames are keyframes that take themselves alone, without propagation: bool (N,)."""
        whole = self.blend.whole
        return (whole >= 0) & (self.keyframes[whole] == torch.arange(len(whole)))


class Steps:
    """All steps of an edit, counted from 0. guidance: of each step, and none after the last."""

    def __init__(
        self,
        config: EditConfig,
        technique: Technique,
        source: Source,
        consensus: Consensus | None,
        scheduler: DDIMScheduler,
    ) -> None:
        self.config, self.technique, self.source = config, technique, source
        n_steps = len(technique.schedule.timesteps)
        averaged = consensus.steps if consensus else ()
        self.guidance = [*plan_guidance(config, n_steps, averaged), Guidance.NONE]
        schedule = plan_keyframes(config, scheduler, source.n_frames)
        if config.propagation == "previous":  # the authors' code draws none for skipped steps
            schedule = replace(schedule, timesteps=technique.schedule.timesteps)
        self._keyframes = schedule.draw()

    def plan(self, step: int, memory: FrameArray | None = None) -> Step:
        """What a step does. If the memory that it needs was lost, it evaluates more."""
        schedule, config, guidance = self.technique.schedule, self.config, self.guidance[step]
        if guidance.needs_memory and memory is None:
            guidance = Guidance.KEYFRAMES
        t = schedule.timesteps[step]
        frames, keyframes = torch.arange(self.source.n_frames), self._keyframes[t]
        if config.propagation == "previous":
            blend = previous_blend(frames, config.keyframe_interval)
        else:
            blend = flanking_blend(frames, keyframes)
        injects = step < self.technique.attention_steps, step < self.technique.feature_steps
        source = () if self.source.features else (SOURCE,)
        return Step(
            t=t,
            alpha=schedule.alphas[step],
            keyframes=keyframes,
            blend=blend,
            injects_attention=injects[0],
            injects_features=injects[1],
            guidance=guidance,
            key_streams=((SOURCE,) if any(injects) else source)
            + JOINT.get(guidance, (UNCOND, COND)),
            streams=source + PROPAGATED.get(guidance, (COND,)),
            memory=memory,
        )
