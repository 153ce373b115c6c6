"""The loop over the steps of an edit.

A technique gives the initial latents, the schedule, the number of steps that inject the source, and the
ControlNets' conditions. A denoiser predicts the noise. Nothing here depends on which they are.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch

from tokenflow.config import EditConfig
from tokenflow.diffusion.ddim import check_finite, ddim_step, predict_x0
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.checkpoint import EditCheckpoint
from tokenflow.editing.consensus import Consensus
from tokenflow.editing.guidance import Guidance, find_difference, find_scale, plan_guidance
from tokenflow.editing.mask import Mask
from tokenflow.editing.source import Source
from tokenflow.editing.streams import Streams
from tokenflow.editing.techniques import Technique
from tokenflow.runtime.batching import frames_per_pass, split_evenly
from tokenflow.runtime.frame_array import FrameArray
from tokenflow_utils import COND, STREAMS, UNCOND, UNEDITED, TokenFlow, install_tokenflow

# The latents of all frames, in memory or in a file; frames (n,) index them: (n, 4, h, w).
Latents = torch.Tensor | FrameArray


@dataclass(frozen=True)
class Edit:
    """All that decides what an edited video looks like; prompts: for source, uncond and cond."""

    sd: StableDiffusion
    technique: Technique
    source: Source
    prompts: tuple[str, str, str]
    config: EditConfig
    consensus: Consensus | None = None
    mask: Mask | None = None

    def confine(self, latents: torch.Tensor, step: int, frames: torch.Tensor) -> torch.Tensor:
        """Latents (n, 4, h, w) of the frames (n,) after `step` steps, outside the mask the source's."""
        if self.mask is None:
            return latents
        timesteps = self.technique.schedule.timesteps
        t = timesteps[step] if step < len(timesteps) else None
        return self.mask.confine(latents, t, frames)


def denoise(denoiser: "Denoiser", checkpoint: EditCheckpoint) -> Iterator[int]:
    """Loop over the steps of an edit, starting after the last step in the `checkpoint`.

    Yields the number of steps done before the loop and after each step. Processes divide each step's frames.
    denoiser: what predicts the noise, and knows the edit.
    """
    edit, share = denoiser.edit, checkpoint.processes.share
    schedule, done = edit.technique.schedule, checkpoint.steps_done
    if done is None:
        done, all_frames = 0, torch.arange(edit.source.n_frames)
        with checkpoint.writing(0) as (latents, _):
            for frames in share(all_frames.split(edit.config.frames_at_once)):
                latents[frames] = edit.technique.start(frames)
    yield done
    for step in range(done, len(schedule.timesteps)):
        t, alphas = schedule.timesteps[step], schedule.alphas[step : step + 2]
        latents, memory = checkpoint.latents(step), None
        if denoiser.guidance[step].needs_memory:
            memory = checkpoint.memory(step)
        coming = denoiser.guidance[step + 1]
        consensus = edit.consensus.at(step) if edit.consensus else None
        with checkpoint.writing(step + 1, coming.needs_memory) as (cleaner, remembered):
            chunks = share(denoiser.plan(step))
            for frames, noise, difference in denoiser.predict(latents, step, chunks, memory):
                moved = ddim_step(latents[frames], noise, *alphas)
                check_finite(moved, f"the edited latents at timestep {t}")
                cleaner[frames] = edit.confine(moved, step + 1, frames)
                clean = predict_x0(latents[frames], noise, alphas[0])
                if consensus:
                    consensus.note(frames, clean)
                if remembered:
                    remembered[frames] = clean if coming is Guidance.ALONE else difference
            if consensus:
                for frames, correction in consensus.find_corrections(edit.config.frames_at_once):
                    moved = cleaner[frames] + math.sqrt(alphas[1]) * correction
                    cleaner[frames] = edit.confine(moved, step + 1, frames)
                    if coming is Guidance.ALONE:
                        remembered[frames] = remembered[frames] + correction
        yield step + 1


class Denoiser:
    """Predicts the guided noise of a video's frames at one step; subclasses plan the UNet passes.

    guidance: that of each step, and none after the last. strong: the difference between prompts from which on
    guidance has its whole scale, in all frames of a step; None until it is found.
    """

    def __init__(self, edit: Edit, tokenflow: TokenFlow) -> None:
        self.edit, self.tokenflow = edit, tokenflow
        self.sd, self.config = edit.sd, edit.config
        self.technique, self.source = edit.technique, edit.source
        self.streams = Streams(edit.sd, edit.technique, edit.source, edit.prompts, tokenflow)
        n_steps = len(self.technique.schedule.timesteps)
        averaged = edit.consensus.steps if edit.consensus else ()
        self.guidance = [*plan_guidance(self.config, n_steps, averaged), Guidance.NONE]
        inverted, _, prompt = edit.prompts
        self.compares_prompts = bool(
            self.config.relevance_quantile and inverted.strip() and inverted != prompt
        )
        self.strong: torch.Tensor | None = None

    @classmethod
    @contextmanager
    def install(cls, edit: Edit) -> Iterator[Self]:
        """Yield a denoiser, with TokenFlow in its UNet while the block lasts."""
        with install_tokenflow(
            edit.sd.unet, finds_correspondences=edit.source.features is None
        ) as tokenflow:
            yield cls(edit, tokenflow)

    def plan(self, step: int) -> list:
        """The video's frames in chunks, which the processes divide; each takes neighbouring chunks."""
        return list(split_evenly(torch.arange(self.source.n_frames), self.count_at_once(STREAMS)))

    def predict(
        self, latents: Latents, step: int, chunks: list, memory: FrameArray | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield the frames (n,) of each of some `chunks`, their guided noise, and its guiding difference.

        Noise and difference, which is what guidance adds to the prompt's noise: (n, 4, h, w).
        memory: (N, 4, h, w), what the step before left for this one, if its guidance needs that.
        """
        raise NotImplementedError

    def injects(self, step: int) -> tuple[bool, bool]:
        """Whether a step takes over the source's attention, and its features."""
        return step < self.technique.attention_steps, step < self.technique.feature_steps

    def count_at_once(self, streams: tuple[int, ...]) -> int:
        """How many frames pass the UNet together in these streams."""
        chosen, default = self.config.batch_size, self.config.frames_at_once
        return frames_per_pass(chosen, default, max(1, len(streams)), self.sd.device)

    def choose_streams(self, guidance: Guidance) -> tuple[int, ...]:
        """The edit's streams in which the frames that are evaluated whole pass the UNet."""
        if not guidance.evaluates_difference:
            return (COND,)
        return (UNCOND, COND, UNEDITED) if self.compares_prompts else (UNCOND, COND)

    def find_scale(self, noise: dict[int, torch.Tensor]) -> float | torch.Tensor:
        """The guidance scale; where it depends on the difference between prompts, by place: (n, 1, h, w).

        noise: of such frames, by stream. The first of a step decide what is a strong difference.
        """
        scale = self.config.guidance_scale
        if UNEDITED not in noise:
            return scale
        difference = find_difference(noise[COND], noise[UNEDITED])
        if self.strong is None:
            self.strong = difference.flatten().quantile(self.config.relevance_quantile)
        return find_scale(difference, self.strong, scale)
