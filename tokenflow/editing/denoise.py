"""The loop over the steps of an edit, and in each step joint passes over keyframes, then propagation.

A technique gives the initial latents, the schedule, the number of steps that inject the source, and the
ControlNets' conditions. Nothing here depends on which technique it is.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Self

import torch
from diffusers import DDIMScheduler

from tokenflow.config import EditConfig
from tokenflow.diffusion.ddim import Schedule, check_finite, ddim_step, predict_x0
from tokenflow.diffusion.stable_diffusion import Control, StableDiffusion, Text
from tokenflow.editing.checkpoint import EditCheckpoint
from tokenflow.editing.consensus import Consensus
from tokenflow.editing.mask import Mask
from tokenflow.editing.source import Source
from tokenflow.editing.techniques import Technique
from tokenflow.editing.windows import Window, divide_into_windows, find_shared, plan_joint_edits
from tokenflow.propagation.cache import BlendedRows
from tokenflow.propagation.correspondences import follow_flow_by_resolution
from tokenflow.runtime.ahead import read_ahead
from tokenflow.runtime.batching import MOST_SAMPLES, Batches, frames_per_pass, split_evenly
from tokenflow.runtime.frame_array import FrameArray
from tokenflow_utils import (
    COND,
    SOURCE,
    STREAMS,
    UNCOND,
    Blend,
    JointEdit,
    KeyframeSchedule,
    Propagation,
    SourceFeatures,
    TokenFlow,
    flanking_blend,
    guide,
    install_tokenflow,
    previous_blend,
)

FILLED_CPU = 1 << 12  # latent pixels: a larger pass takes more memory and is hardly more efficient

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
        with checkpoint.writing(0) as latents:
            for frames in share(all_frames.split(edit.config.frames_at_once)):
                latents[frames] = edit.technique.start(frames)
    yield done
    for step in range(done, len(schedule.timesteps)):
        t, alphas = schedule.timesteps[step], schedule.alphas[step : step + 2]
        latents = checkpoint.latents(step)
        consensus = edit.consensus.at(step) if edit.consensus else None
        with checkpoint.writing(step + 1) as cleaner:
            for frames, noise in denoiser.predict(latents, t, share(denoiser.plan(t))):
                moved = ddim_step(latents[frames], noise, *alphas)
                check_finite(moved, f"the edited latents at timestep {t}")
                cleaner[frames] = edit.confine(moved, step + 1, frames)
                if consensus:
                    consensus.note(frames, predict_x0(latents[frames], noise, alphas[0]))
            if consensus:
                for frames, correction in consensus.find_corrections(edit.config.frames_at_once):
                    moved = cleaner[frames] + math.sqrt(alphas[1]) * correction
                    cleaner[frames] = edit.confine(moved, step + 1, frames)
        yield step + 1


class Denoiser:
    """Predicts the guided noise of a video's frames at one timestep; subclasses plan the UNet passes."""

    def __init__(self, edit: Edit, tokenflow: TokenFlow) -> None:
        self.edit, self.tokenflow = edit, tokenflow
        self.sd, self.config = edit.sd, edit.config
        self.technique, self.source = edit.technique, edit.source
        n_streams = len(STREAMS) if self.source.features is None else len(STREAMS) - 1
        chosen, default = self.config.batch_size, self.config.frames_at_once
        self.at_once = frames_per_pass(chosen, default, n_streams, self.sd.device)
        self.batches = Batches(self.at_once, chosen is None, self.sd.limits, "propagation")
        with self.sd.original():
            source = self.sd.encode_text(edit.prompts[SOURCE])
        edited = (self.sd.encode_text(edit.prompts[stream]) for stream in (UNCOND, COND))
        self.text = [source, *edited]  # by stream
        timesteps = self.technique.schedule.timesteps
        self.attention_timesteps = frozenset(timesteps[: self.technique.attention_steps])
        self.feature_timesteps = frozenset(timesteps[: self.technique.feature_steps])

    @classmethod
    @contextmanager
    def install(cls, edit: Edit) -> Iterator[Self]:
        """Yield a denoiser, with TokenFlow in its UNet while the block lasts."""
        propagated = STREAMS if edit.config.propagation == "previous" else (UNCOND, COND)
        with install_tokenflow(edit.sd.unet, propagated, edit.source.features is None) as tokenflow:
            yield cls(edit, tokenflow)

    def plan(self, t: int) -> list:
        """The video's frames in chunks, which the processes divide; each takes neighbouring chunks."""
        return list(split_evenly(torch.arange(self.source.n_frames), self.at_once))

    def predict(
        self, latents: Latents, t: int, chunks: list
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the frames (n,) of each of some `chunks`, and their guided noise (n, 4, h, w)."""
        raise NotImplementedError

    def predict_guided_noise(
        self,
        latents: Latents,
        t: int,
        frames: torch.Tensor,
        streams: tuple[int, ...] = STREAMS,
        together: bool = True,
    ) -> torch.Tensor:
        """Guided noise (n, 4, h, w) of the frames (n,).

        streams: what passes the UNet, ascending; SOURCE may be left out. together: whether in one pass; with
        LoRAs, which do not concern the source, it passes alone.
        """
        passes = [streams] if together else [(stream,) for stream in streams]
        if together and self.sd.adapted and SOURCE in streams:
            passes = [(SOURCE,), streams[1:]]
        controls, depth = self.technique.control(frames), self.source.depth(frames)
        edited, noise = latents[frames], {}
        for passing in passes:
            self.tokenflow.streams = passing
            source = self.source.latents(t, frames).to(edited) if SOURCE in passing else None
            samples = torch.cat([source if stream == SOURCE else edited for stream in passing])
            text = Text.cat([self.text[stream].expand(len(frames)) for stream in passing])
            control = Control.cat([controls[stream] for stream in passing]) if controls else None
            seen = None if depth is None else depth.repeat(len(passing), 1, 1, 1)
            with self.sd.original() if SOURCE in passing else nullcontext():
                predicted = self.sd.predict_noise(samples, t, text, control, seen)
            noise |= zip(passing, predicted.chunk(len(passing)), strict=True)
        return guide(noise[UNCOND], noise[COND], self.config.guidance_scale)


@dataclass(frozen=True)
class Step:
    """The keyframes (k,) of a timestep, and which of them each frame of the video blends."""

    t: int
    keyframes: torch.Tensor
    blend: Blend

    @property
    def done(self) -> torch.Tensor:
        """Which frames are keyframes that take themselves alone, without propagation: bool (N,)."""
        whole = self.blend.whole
        return (whole >= 0) & (self.keyframes[whole] == torch.arange(len(whole)))


class TokenFlowDenoiser(Denoiser):
    """Joint edit of random keyframes, window by window, and propagation to all other frames."""

    def __init__(self, edit: Edit, tokenflow: TokenFlow) -> None:
        super().__init__(edit, tokenflow)
        schedule = plan_keyframes(edit.config, edit.sd.scheduler, edit.source.n_frames)
        if edit.config.propagation == "previous":  # the authors' code draws none for skipped steps
            schedule = replace(schedule, timesteps=edit.technique.schedule.timesteps)
        self._keyframes = schedule.draw()

    def plan(self, t: int) -> list[tuple[Window, torch.Tensor]]:
        """Each chunk's window and frames (n,).

        In a window, the keyframes that need no propagation are a chunk of their own.
        """
        step, chunks = self._step(t), []
        n_keyframes, size = len(step.keyframes), self.config.keyframe_window
        for window in divide_into_windows(step.blend, n_keyframes, size):
            done = step.done[window.frames]
            parts = window.frames[done], *split_evenly(window.frames[~done], self.at_once)
            chunks += [(window, part) for part in parts if len(part)]
        return chunks

    def predict(
        self, latents: Latents, t: int, chunks: list[tuple[Window, torch.Tensor]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the frames (n,) of each of some `chunks`, and their guided noise (n, 4, h, w)."""
        step, cache = self._step(t), self.tokenflow.cache
        n_keyframes, done = len(step.keyframes), step.done
        cache.keep([])
        for window, of_window in groupby(chunks, itemgetter(0)):
            shared = find_shared(window, n_keyframes)
            cache.keep([position for position in cache.positions if position in shared])
            for joint in plan_joint_edits(window, n_keyframes, cache.positions):
                self._edit_jointly(latents, step, joint)
            to_read = [frames for _, frames in of_window]
            read = partial(self._read_features, step)
            for frames, coming in read_ahead(read, to_read):
                if done[frames].all():
                    positions = step.blend.whole[frames].tolist()
                    yield frames, torch.stack(cache.read("noise", positions))
                else:
                    propagate = partial(self._propagate, latents, step, frames, coming)
                    yield frames, self.batches.map(propagate, torch.arange(len(frames)))

    def _edit_jointly(self, latents: Latents, step: Step, joint: JointEdit) -> None:
        """Edit keyframes jointly, and put their guided noise into the cache.

        Where memory runs out, the streams pass one by one.
        """
        frames = step.keyframes[joint.edited]
        joint.inject_attention = step.t in self.attention_timesteps
        joint.inject_features = step.t in self.feature_timesteps
        self.tokenflow.task = joint

        def predict(n_streams: int) -> torch.Tensor:
            return self.predict_guided_noise(latents, step.t, frames, together=n_streams > 1)

        n_streams = len(STREAMS) if self._fit_together(frames, latents, STREAMS) else 1
        noise = Batches(n_streams, limits=self.sd.limits, kind="joint").fit(predict, n_streams)
        self.tokenflow.cache.write("noise", joint.edited, noise)

    def _read_features(self, step: Step, frames: torch.Tensor) -> SourceFeatures | None:
        """The source features of a chunk's frames (n,), if they are kept and needed."""
        if self.source.features is None or step.done[frames].all():
            return None
        injects = step.t in self.feature_timesteps
        return self.source.features.read(step.t, frames, injects, self.sd.device)

    def _propagate(
        self,
        latents: Latents,
        step: Step,
        chunk: torch.Tensor,
        coming: Future[SourceFeatures | None],
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Guided noise (n, 4, h, w) of the frames at neighbouring places (n,) in a chunk, propagated.

        The keyframes are in the cache. coming: the chunk's source features, if they are kept.
        """
        frames, kept = chunk[places], coming.result()
        positions, weights = step.blend.positions[frames], step.blend.weights[frames]
        rows, sd, along_flow = self.tokenflow.cache.rows(positions), self.sd, {}
        if self.source.flow:
            # A keyframe of weight 0 need not be found: the frame itself stands in for it.
            keyframes = torch.where(weights > 0, step.keyframes[positions], frames[:, None])
            flow = self.source.flow.find_between(frames, keyframes)
            levels = range(len(sd.unet.config.block_out_channels))
            along_flow = follow_flow_by_resolution(flow, rows, weights, levels, sd.device)
        self.tokenflow.task = Propagation(
            BlendedRows.of(rows, weights, sd.device, sd.dtype),
            inject_features=step.t in self.feature_timesteps,
            source=kept.select(slice(places[0], places[-1] + 1)) if kept else SourceFeatures(),
            along_flow=along_flow,
        )
        streams = (UNCOND, COND) if kept else STREAMS
        together = self._fit_together(frames, latents, streams)
        return self.predict_guided_noise(latents, step.t, frames, streams, together)

    def _fit_together(
        self, frames: torch.Tensor, latents: Latents, streams: tuple[int, ...]
    ) -> bool:
        """Whether streams pass together: unless one fills a CPU, or all are too many for a GPU."""
        if self.sd.device.type == "cuda":
            return len(frames) * len(streams) <= MOST_SAMPLES
        return len(frames) * latents.shape[-2] * latents.shape[-1] < FILLED_CPU

    def _step(self, t: int) -> Step:
        keyframes, frames = self._keyframes[t], torch.arange(self.source.n_frames)
        if self.config.propagation == "previous":
            return Step(t, keyframes, previous_blend(frames, self.config.keyframe_interval))
        return Step(t, keyframes, flanking_blend(frames, keyframes))


def plan_keyframes(config: EditConfig, scheduler: DDIMScheduler, n_frames: int) -> KeyframeSchedule:
    """The keyframe schedule of an edit, which includes the steps that a technique skips."""
    timesteps = Schedule.of(scheduler, config.n_timesteps).timesteps
    return KeyframeSchedule(n_frames, config.keyframe_interval, timesteps, config.seed)
