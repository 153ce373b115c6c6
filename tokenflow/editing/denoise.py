"""The loop over the steps of an edit, and in each step joint passes over keyframes, then propagation.

A technique gives the initial latents, the schedule, the number of steps that inject the source, and the
ControlNets' conditions. Nothing here depends on which technique it is.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Self

import torch

from tokenflow.config import EditConfig
from tokenflow.diffusion.ddim import check_finite, ddim_step, find_noise, predict_x0
from tokenflow.diffusion.layouts import find_finest_self_attention
from tokenflow.diffusion.stable_diffusion import Control, StableDiffusion, Text
from tokenflow.editing.checkpoint import EditCheckpoint
from tokenflow.editing.consensus import Consensus
from tokenflow.editing.guidance import guide, propagate_maps
from tokenflow.editing.mask import Mask
from tokenflow.editing.relevance import Relevance
from tokenflow.editing.source import Source
from tokenflow.editing.steps import Guidance, Step, Steps
from tokenflow.editing.techniques import Technique
from tokenflow.editing.windows import Window, divide_into_windows, find_shared, plan_joint_edits
from tokenflow.propagation.cache import BlendedRows
from tokenflow.propagation.correspondences import follow_flow_by_resolution
from tokenflow.runtime.ahead import read_ahead
from tokenflow.runtime.batching import MOST_SAMPLES, Batches, frames_per_pass, split_evenly
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.transfer import to_device
from tokenflow_utils import (
    COND,
    SOURCE,
    STREAMS,
    JointEdit,
    Propagation,
    SourceFeatures,
    TokenFlow,
    install_tokenflow,
)

FILLED_CPU = 1 << 12  # latent pixels: a larger pass takes more memory and is hardly more efficient
# What the cache remembers of keyframes, besides what their layers do: their guided noise, and maps that are
# propagated, of what guidance adds to the noise, and of the changes of their predicted x0.
NOISE, DIFFERENCE, CHANGE = "noise", "difference", "change"

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
    relevance: Relevance | None = None

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
        if denoiser.steps.guidance[step].needs_memory:
            memory = checkpoint.memory(step)
        coming = denoiser.steps.guidance[step + 1]
        consensus = edit.consensus.at(step) if edit.consensus else None
        with checkpoint.writing(step + 1, coming.needs_memory) as (cleaner, remembered):
            chunks = share(denoiser.divide(step))
            for frames, noise, difference in denoiser.predict(latents, step, chunks, memory):
                edited = latents[frames]
                moved = ddim_step(edited, noise, *alphas)
                check_finite(moved, f"the edited latents at timestep {t}")
                cleaner[frames] = edit.confine(moved, step + 1, frames)
                if consensus:
                    consensus.note(frames, predict_x0(edited, noise, alphas[0]))
                if coming is Guidance.ALONE:
                    remembered[frames] = predict_x0(edited, noise, alphas[0])
                elif coming is Guidance.REUSED:
                    remembered[frames] = difference
            if consensus:
                for frames, correction in consensus.find_corrections(edit.config.frames_at_once):
                    moved = cleaner[frames] + math.sqrt(alphas[1]) * correction
                    cleaner[frames] = edit.confine(moved, step + 1, frames)
                    if coming is Guidance.ALONE:
                        remembered[frames] = remembered[frames] + correction
        yield step + 1


class Denoiser:
    """Predicts the guided noise of a video's frames at one step; subclasses plan the UNet passes."""

    def __init__(self, edit: Edit, tokenflow: TokenFlow) -> None:
        self.edit, self.tokenflow = edit, tokenflow
        self.sd, self.config = edit.sd, edit.config
        self.technique, self.source = edit.technique, edit.source
        self.steps = Steps(
            edit.config, edit.technique, edit.source, edit.consensus, edit.sd.scheduler
        )
        with self.sd.original():
            source = self.sd.encode_text(edit.prompts[SOURCE])
        uncond, cond = (self.sd.encode_text(prompt) for prompt in edit.prompts[1:])
        self.text = source, uncond, cond  # by stream

    @classmethod
    @contextmanager
    def install(cls, edit: Edit) -> Iterator[Self]:
        """Yield a denoiser, with TokenFlow in its UNet while the block lasts."""
        searches = edit.source.features is None
        with install_tokenflow(edit.sd.unet, finds_correspondences=searches) as tokenflow:
            yield cls(edit, tokenflow)

    def divide(self, step: int) -> list:
        """The video's frames in chunks, which the processes divide; each takes neighbouring chunks."""
        return list(split_evenly(torch.arange(self.source.n_frames), self.count_at_once(STREAMS)))

    def predict(
        self, latents: Latents, step: int, chunks: list, memory: FrameArray | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield the frames (n,) of each of some `chunks`, their guided noise, and what guidance adds to it.

        Both are (n, 4, h, w). memory: (N, 4, h, w), what the step before left for this one, if its guidance
        needs that.
        """
        raise NotImplementedError

    def count_at_once(self, streams: tuple[int, ...]) -> int:
        """How many frames pass the UNet together in these streams."""
        chosen, default = self.config.batch_size, self.config.frames_at_once
        return frames_per_pass(chosen, default, max(1, len(streams)), self.sd.device)

    def find_scale(self, frames: torch.Tensor) -> float | torch.Tensor:
        """The guidance scale of the frames (n,); by place, (n, 1, h, w), if the edit has a relevance."""
        scale = self.config.guidance_scale
        if self.edit.relevance is None:
            return scale
        relevance = self.edit.relevance.at(frames)
        return 1 + (scale - 1) * to_device(relevance, self.sd.device, torch.float32)

    def predict_noise(
        self,
        edited: torch.Tensor,
        t: int,
        frames: torch.Tensor,
        streams: tuple[int, ...],
        together: bool = True,
    ) -> dict[int, torch.Tensor]:
        """The noise (n, 4, h, w) of the frames (n,), by stream.

        edited: the edit's latents (n, 4, h, w). streams: those that pass the UNet, ascending. together:
        whether in one pass; the source passes apart if LoRAs change the network.
        """
        if not streams:  # nor are their conditions read
            return {}
        passes = [streams] if together else [(stream,) for stream in streams]
        if together and self.sd.adapted:
            passes = [streams[:1], streams[1:]] if streams[0] == SOURCE else [streams]
        controls, depth, noise = self.technique.control(frames), self.source.depth(frames), {}
        for passing in filter(None, passes):
            self.tokenflow.streams = passing
            source = self.source.latents(t, frames).to(edited) if SOURCE in passing else None
            samples = torch.cat([source if stream == SOURCE else edited for stream in passing])
            text = Text.cat([self.text[stream].expand(len(frames)) for stream in passing])
            control = None
            if controls:
                control = Control.cat([controls[stream != SOURCE] for stream in passing])
            seen = None if depth is None else depth.repeat(len(passing), 1, 1, 1)
            with self.sd.original() if passing[0] == SOURCE else nullcontext():
                predicted = self.sd.predict_noise(samples, t, text, control, seen)
            noise |= zip(passing, predicted.chunk(len(passing)), strict=True)
        return noise


class TokenFlowDenoiser(Denoiser):
    """Joint edit of random keyframes, window by window, and propagation to all other frames."""

    def __init__(self, edit: Edit, tokenflow: TokenFlow) -> None:
        super().__init__(edit, tokenflow)
        self._finest = find_finest_self_attention(edit.sd.unet)

    def divide(self, step: int) -> list[tuple[Window, torch.Tensor]]:
        """Each chunk's window and frames (n,).

        In a window, the keyframes that need no propagation are a chunk of their own.
        """
        planned, chunks = self.steps.plan(step), []
        n_keyframes, size = len(planned.keyframes), self.config.keyframe_window
        for window in divide_into_windows(planned.blend, n_keyframes, size):
            done, at_once = planned.done[window.frames], self.count_at_once(planned.streams)
            parts = window.frames[done], *split_evenly(window.frames[~done], at_once)
            chunks += [(window, part) for part in parts if len(part)]
        return chunks

    def predict(
        self,
        latents: Latents,
        step: int,
        chunks: list[tuple[Window, torch.Tensor]],
        memory: FrameArray | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """As `Denoiser.predict`."""
        planned, cache = self.steps.plan(step, memory), self.tokenflow.cache
        n_keyframes, done, propagated = len(planned.keyframes), planned.done, planned.streams
        if self.config.propagation == "flanking":
            propagated = tuple(stream for stream in propagated if stream != SOURCE)
        self.tokenflow.propagated = propagated
        batches = Batches(
            self.count_at_once(planned.streams),
            adapts=self.config.batch_size is None,
            limits=self.sd.limits,
            kind="propagation",
        )
        cache.keep([])
        for window, of_window in groupby(chunks, itemgetter(0)):
            shared = find_shared(window, n_keyframes)
            cache.keep([position for position in cache.positions if position in shared])
            for joint in plan_joint_edits(window, n_keyframes, cache.positions):
                self._edit_jointly(latents, planned, joint)
            to_read = [frames for _, frames in of_window]
            read = partial(self._read_features, planned)
            for frames, coming in read_ahead(read, to_read):
                if done[frames].all():
                    positions = planned.blend.whole[frames].tolist()
                    noise, difference = (
                        torch.stack(cache.read(name, positions)) for name in (NOISE, DIFFERENCE)
                    )
                else:
                    propagate = partial(self._propagate, latents, planned, frames, coming)
                    both = batches.map(propagate, torch.arange(len(frames)))
                    noise, difference = both.unbind(1)
                yield frames, noise, difference

    def _edit_jointly(self, latents: Latents, planned: Step, joint: JointEdit) -> None:
        """Edit keyframes jointly, and put their guided noise into the cache, with what guides other frames.

        Where memory runs out, the streams pass one by one.
        """
        frames, streams = planned.keyframes[joint.edited], planned.key_streams
        joint.inject_attention = planned.injects_attention
        joint.inject_features = planned.injects_features
        joint.own_weight = self.config.resolve("own_weight")
        self.tokenflow.task, edited = joint, latents[frames]

        def predict(n_streams: int) -> dict[int, torch.Tensor]:
            together = n_streams > 1
            return self.predict_noise(edited, planned.t, frames, streams, together)

        n_streams = len(streams) if self._fit_together(edited, streams) else 1
        noise = Batches(n_streams, limits=self.sd.limits, kind="joint").fit(predict, n_streams)
        if planned.guidance is Guidance.REUSED:
            difference = planned.memory[frames]
            guided = noise[COND] + difference
        else:
            guided, difference = guide(noise, self.find_scale(frames))
        maps = {NOISE: guided, DIFFERENCE: difference}
        if planned.guidance is Guidance.ALONE:
            maps[CHANGE] = predict_x0(edited, guided, planned.alpha) - planned.memory[frames]
        for name, of_keyframes in maps.items():
            self.tokenflow.cache.write(name, joint.edited, of_keyframes)

    def _read_features(self, planned: Step, frames: torch.Tensor) -> SourceFeatures | None:
        """The source features of a chunk's frames (n,), if they are kept and needed."""
        if self.source.features is None or planned.done[frames].all():
            return None
        injects = planned.injects_features and bool(planned.streams)
        return self.source.features.read(planned.t, frames, injects, self.sd.device)

    def _propagate(
        self,
        latents: Latents,
        planned: Step,
        chunk: torch.Tensor,
        coming: Future[SourceFeatures | None],
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Guided noise and guiding difference (n, 2, 4, h, w) of neighbouring frames, propagated.

        The keyframes are in the cache. places: (n,), of the frames in the chunk. coming: the chunk's source
        features, if they are kept.
        """
        frames, kept = chunk[places], coming.result()
        positions, weights = planned.blend.positions[frames], planned.blend.weights[frames]
        rows, sd, along_flow = self.tokenflow.cache.rows(positions), self.sd, {}
        if self.source.flow:
            # A keyframe of weight 0 need not be found: the frame itself stands in for it.
            keyframes = torch.where(weights > 0, planned.keyframes[positions], frames[:, None])
            flow = self.source.flow.find_between(frames, keyframes)
            levels = range(len(sd.unet.config.block_out_channels))
            along_flow = follow_flow_by_resolution(flow, rows, weights, levels, sd.device)
        task = Propagation(
            BlendedRows.of(rows, weights, sd.device, sd.dtype),
            inject_features=planned.injects_features,
            source=kept.select(slice(places[0], places[-1] + 1)) if kept else SourceFeatures(),
            along_flow=along_flow,
        )
        self.tokenflow.task, edited = task, latents[frames]
        together = self._fit_together(edited, planned.streams)
        noise = self.predict_noise(edited, planned.t, frames, planned.streams, together)
        return torch.stack(self._guide(planned, frames, edited, noise, task), dim=1)

    def _guide(
        self,
        planned: Step,
        frames: torch.Tensor,
        edited: torch.Tensor,
        noise: dict[int, torch.Tensor],
        task: Propagation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Guided noise and guiding difference (n, 4, h, w) of propagated frames (n,)."""
        match planned.guidance:
            case Guidance.EVERY_FRAME:
                return guide(noise, self.find_scale(frames))
            case Guidance.ALONE:
                clean = planned.memory[frames] + self._propagate_map(CHANGE, task).to(edited)
                return find_noise(edited, clean, planned.alpha), torch.zeros_like(edited)
            case Guidance.KEYFRAMES:
                difference = self._propagate_map(DIFFERENCE, task).to(edited)
            case Guidance.REUSED:
                difference = planned.memory[frames]
            case Guidance.NONE:
                difference = torch.zeros_like(edited)
        return noise[COND] + difference, difference

    def _propagate_map(self, name: str, task: Propagation) -> torch.Tensor:
        """A map of the keyframes in the cache, propagated along the finest layer's correspondences."""
        nearest = task.source.nearest[self._finest]
        if along_flow := task.along_flow.get(nearest.shape[-1]):
            nearest = along_flow.complete(nearest)
        of_keyframes = self.tokenflow.cache.tensor(name)
        return propagate_maps(
            to_device(of_keyframes, self.sd.device, self.sd.dtype), nearest, task.blended
        )

    def _fit_together(self, latents: torch.Tensor, streams: tuple[int, ...]) -> bool:
        """Whether streams of latents (n, 4, h, w) pass together.

        They do unless one fills a CPU, or all are too many for a GPU.
        """
        if self.sd.device.type == "cuda":
            return len(latents) * len(streams) <= MOST_SAMPLES
        return len(latents) * latents.shape[-2] * latents.shape[-1] < FILLED_CPU
