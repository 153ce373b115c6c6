"""The loop over the steps of an edit, and in each step joint passes over keyframes, then propagation.

A technique gives the initial latents, the schedule, the number of steps that inject the source, and the
ControlNets' conditions. Nothing here depends on which technique it is.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
from tokenflow.editing.windows import Window, joint_passes, seen_by_all, windows
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
    """All that decides what an edited video looks like.

    prompts: for source, uncond and cond. consensus: maps a step, counted from 0, to the consensus that ends
    it, if one does.
    """

    sd: StableDiffusion
    technique: Technique
    source: Source
    prompts: tuple[str, str, str]
    config: EditConfig
    consensus: Callable[[int], Consensus | None] = lambda step: None
    mask: Mask | None = None

    def confined(self, latents: torch.Tensor, step: int, frames: torch.Tensor) -> torch.Tensor:
        """Latents (n, 4, h, w) of the frames (n,) after `step` steps, outside the mask the source's."""
        if self.mask is None:
            return latents
        timesteps = self.technique.schedule.timesteps
        t = timesteps[step] if step < len(timesteps) else None
        return self.mask.confined(latents, t, frames)


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
                latents[frames] = edit.technique.initial(frames)
    yield done
    for step in range(done, len(schedule.timesteps)):
        t, alphas = schedule.timesteps[step], schedule.alphas[step : step + 2]
        latents = checkpoint.latents(step)
        consensus = edit.consensus(step)
        with checkpoint.writing(step + 1) as cleaner:
            for frames, noise in denoiser.noise(latents, t, share(denoiser.chunks(t))):
                moved = ddim_step(latents[frames], noise, *alphas)
                check_finite(moved, f"the edited latents at timestep {t}")
                cleaner[frames] = edit.confined(moved, step + 1, frames)
                if consensus:
                    consensus.note(frames, predict_x0(latents[frames], noise, alphas[0]))
            if consensus:
                for frames, correction in consensus.corrections(edit.config.frames_at_once):
                    moved = cleaner[frames] + math.sqrt(alphas[1]) * correction
                    cleaner[frames] = edit.confined(moved, step + 1, frames)
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
        adapts = chosen is None
        self.batches = Batches(self.at_once, adapts, self.sd.limits, "propagation")
        prompts = edit.prompts
        with self.sd.original():
            source = self.sd.encode_text(prompts[SOURCE])
        edited = (self.sd.encode_text(prompts[stream]) for stream in (UNCOND, COND))
        self.text = [source, *edited]  # by stream
        timesteps = self.technique.schedule.timesteps
        self.attention_timesteps = frozenset(timesteps[: self.technique.attention_steps])
        self.feature_timesteps = frozenset(timesteps[: self.technique.feature_steps])

    @classmethod
    @contextmanager
    def installed(cls, edit: Edit) -> Iterator[Self]:
        """Yield a denoiser, with TokenFlow in its UNet while the block lasts."""
        propagated = STREAMS if edit.config.propagation == "previous" else (UNCOND, COND)
        with install_tokenflow(edit.sd.unet, propagated, edit.source.features is None) as tokenflow:
            yield cls(edit, tokenflow)

    def chunks(self, t: int) -> list:
        """The video's frames in chunks, which the processes divide; each takes neighbouring chunks."""
        return list(split_evenly(torch.arange(self.source.n_frames), self.at_once))

    def noise(
        self, latents: Latents, t: int, chunks: list
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the frames (n,) of each of some `chunks`, and their guided noise (n, 4, h, w)."""
        raise NotImplementedError

    def predict_noise(self, latents: Latents, t: int) -> torch.Tensor:
        """The guided noise (N, 4, h, w) of all frames' latents (N, 4, h, w) at timestep `t`."""
        noise = torch.empty(latents.shape)
        for frames, predicted in self.noise(latents, t, self.chunks(t)):
            noise[frames] = predicted
        return noise

    def guided_noise(
        self,
        latents: Latents,
        t: int,
        frames: torch.Tensor,
        passes: tuple[tuple[int, ...], ...] = (STREAMS,),
    ) -> torch.Tensor:
        """Guided noise (n, 4, h, w) of the frames (n,).

        passes: the streams of each UNet pass; SOURCE may be left out. With LoRAs, which do not concern the
        source, it passes alone.
        """
        if self.sd.adapted:
            passes = tuple(part for streams in passes for part in source_apart(streams))
        controls = self.technique.control(frames) if self.technique.control else None
        depth = self.source.depth(frames)
        edited, noise = latents[frames], {}
        for streams in passes:
            self.tokenflow.streams = streams
            source = self.source.latents(t, frames).to(edited) if SOURCE in streams else None
            samples = torch.cat([source if stream == SOURCE else edited for stream in streams])
            text = Text.cat([self.text[stream].expand(len(frames)) for stream in streams])
            control = Control.cat([controls[stream] for stream in streams]) if controls else None
            seen = None if depth is None else depth.repeat(len(streams), 1, 1, 1)
            with self.sd.original() if SOURCE in streams else nullcontext():
                predicted = self.sd.predict_noise(samples, t, text, control, seen)
            noise |= zip(streams, predicted.chunk(len(streams)), strict=True)
        return guide(noise[UNCOND], noise[COND], self.config.guidance_scale)


class TokenFlowDenoiser(Denoiser):
    """Joint edit of random keyframes, window by window, and propagation to all other frames."""

    def chunks(self, t: int) -> list[tuple[Window, torch.Tensor]]:
        """Each chunk's window and frames (n,).

        In a window, the keyframes that need no propagation are a chunk of their own.
        """
        keyframes, blend = self._keyframes_and_blend(t)
        done, chunks = done_with_joint_edit(keyframes, blend), []
        for window in windows(blend, len(keyframes), self.config.keyframe_window):
            frames, is_done = window.frames, done[window.frames]
            parts = frames[is_done], *split_evenly(frames[~is_done], self.at_once)
            chunks += [(window, part) for part in parts if len(part)]
        return chunks

    def noise(
        self, latents: Latents, t: int, chunks: list[tuple[Window, torch.Tensor]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the frames (n,) of each of some `chunks`, and their guided noise (n, 4, h, w)."""
        keyframes, blend = self._keyframes_and_blend(t)
        done, cache = done_with_joint_edit(keyframes, blend), self.tokenflow.cache
        cache.keep([])
        for window, of_window in groupby(chunks, itemgetter(0)):
            seen = seen_by_all(window, len(keyframes))
            cache.keep([position for position in cache.positions if position in seen])
            for joint in joint_passes(window, len(keyframes), cache.positions):
                self._edit_jointly(latents, t, keyframes[joint.edited], joint)

            def read(frames: torch.Tensor) -> SourceFeatures | None:
                if self.source.features is None or done[frames].all():
                    return None
                injects = t in self.feature_timesteps
                return self.source.features.read(t, frames, injects, self.sd.device)

            for frames, coming in read_ahead(read, [frames for _, frames in of_window]):
                if done[frames].all():
                    yield frames, torch.stack(cache.read("noise", blend.whole[frames].tolist()))
                else:
                    propagated = partial(self._propagate, latents, t, blend, frames, coming)
                    yield frames, self.batches.map(propagated, torch.arange(len(frames)))

    def _edit_jointly(
        self, latents: Latents, t: int, frames: torch.Tensor, joint: JointEdit
    ) -> None:
        """Edit the frames (k,), which are keyframes, and put their guided noise into the cache.

        Where memory runs out, the streams pass one by one.
        """
        joint.inject_attention = t in self.attention_timesteps
        joint.inject_features = t in self.feature_timesteps
        self.tokenflow.task = joint

        def edited(n_streams: int) -> torch.Tensor:
            passes = (STREAMS,) if n_streams == len(STREAMS) else one_by_one(STREAMS)
            return self.guided_noise(latents, t, frames, passes)

        most = len(self._passes(frames, latents, STREAMS)[0])  # streams
        noise = Batches(most, limits=self.sd.limits, kind="joint").fit(edited, most)
        self.tokenflow.cache.write("noise", joint.edited, noise)

    def _propagate(
        self,
        latents: Latents,
        t: int,
        blend: Blend,
        chunk: torch.Tensor,
        coming: Future[SourceFeatures | None],
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Guided noise (n, 4, h, w) of the frames at neighbouring places (n,) in a chunk, propagated.

        blend: of the whole video, whose keyframes are in the cache. coming: the chunk's source features, if
        they are kept.
        """
        frames, source = chunk[places], coming.result()
        positions, weights = blend.positions[frames], blend.weights[frames]
        rows, sd, along_flow = self.tokenflow.cache.rows(positions), self.sd, {}
        if self.source.flow:
            # A keyframe of weight 0 need not be found: the frame itself stands in for it.
            keyframes = torch.where(weights > 0, self._keyframes[t][positions], frames[:, None])
            flow = self.source.flow.find_between(frames, keyframes)
            levels = range(len(sd.unet.config.block_out_channels))
            along_flow = follow_flow_by_resolution(flow, rows, weights, levels, sd.device)
        self.tokenflow.task = Propagation(
            BlendedRows.of(rows, weights, sd.device, sd.dtype),
            inject_features=t in self.feature_timesteps,
            source=source.select(slice(places[0], places[-1] + 1)) if source else SourceFeatures(),
            along_flow=along_flow,
        )
        passes = self._passes(frames, latents, (UNCOND, COND) if source else STREAMS)
        return self.guided_noise(latents, t, frames, passes)

    def _passes(
        self, frames: torch.Tensor, latents: Latents, streams: tuple[int, ...]
    ) -> tuple[tuple[int, ...], ...]:
        """The streams one by one if a single one fills a CPU or all are too many for a GPU, else together."""
        if self.sd.device.type == "cuda":
            together = len(frames) * len(streams) <= MOST_SAMPLES
        else:
            together = len(frames) * latents.shape[-2] * latents.shape[-1] < FILLED_CPU
        return (streams,) if together else one_by_one(streams)

    def _keyframes_and_blend(self, t: int) -> tuple[torch.Tensor, Blend]:
        """The keyframes (k,) of a timestep, and which of them each frame of the video blends."""
        keyframes, frames = self._keyframes[t], torch.arange(self.source.n_frames)
        if self.config.propagation == "previous":
            return keyframes, previous_blend(frames, self.config.keyframe_interval)
        return keyframes, flanking_blend(frames, keyframes)

    @cached_property
    def _keyframes(self) -> dict[int, torch.Tensor]:
        schedule = keyframe_schedule(self.config, self.sd.scheduler, self.source.n_frames)
        if self.config.propagation == "previous":  # the authors' code draws none for skipped steps
            schedule = replace(schedule, timesteps=self.technique.schedule.timesteps)
        return schedule.draw()


def one_by_one(streams: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The streams of UNet passes that take one stream each."""
    return tuple((stream,) for stream in streams)


def source_apart(streams: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The streams of one UNet pass as those of two: the source, if it is there, and the rest."""
    rest = tuple(stream for stream in streams if stream != SOURCE)
    return [part for part in ((SOURCE,) if SOURCE in streams else (), rest) if part]


def done_with_joint_edit(keyframes: torch.Tensor, blend: Blend) -> torch.Tensor:
    """Whether a frame of the video is a keyframe that takes itself alone, without propagation: bool (N,)."""
    whole = blend.whole
    return (whole >= 0) & (keyframes[whole] == torch.arange(len(whole)))


def keyframe_schedule(
    config: EditConfig, scheduler: DDIMScheduler, n_frames: int
) -> KeyframeSchedule:
    """The keyframe schedule of an edit, which includes the steps that a technique skips."""
    timesteps = Schedule.of(scheduler, config.n_timesteps).timesteps
    return KeyframeSchedule(n_frames, config.keyframe_interval, timesteps, config.seed)
