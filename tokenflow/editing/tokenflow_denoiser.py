"""In each step of an edit: joint passes over keyframes, then propagation to all other frames."""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter

import torch
from diffusers import DDIMScheduler

from tokenflow.config import EditConfig
from tokenflow.diffusion.ddim import Schedule, find_noise, predict_x0
from tokenflow.diffusion.layouts import find_finest_self_attention
from tokenflow.editing.denoise import Denoiser, Edit, Latents
from tokenflow.editing.guidance import Guidance, guide_streams, propagate_maps
from tokenflow.editing.windows import Window, divide_into_windows, find_shared, plan_joint_edits
from tokenflow.propagation.cache import BlendedRows
from tokenflow.propagation.correspondences import follow_flow_by_resolution
from tokenflow.propagation.keyframes import KeyframeSchedule
from tokenflow.runtime.ahead import read_ahead
from tokenflow.runtime.batching import MOST_SAMPLES, Batches, split_evenly
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.transfer import to_device
from tokenflow_utils import (
    COND,
    SOURCE,
    UNCOND,
    Blend,
    JointEdit,
    Propagation,
    SourceFeatures,
    TokenFlow,
    flanking_blend,
    previous_blend,
)

FILLED_CPU = 1 << 12  # latent pixels: a larger pass takes more memory and is hardly more efficient
# What the cache remembers of keyframes, besides what their layers do: their guided noise, and maps that are
# propagated, of what guidance adds to the noise, of its scale, and of the changes of their predicted x0.
NOISE, DIFFERENCE, SCALE, CHANGE = "noise", "difference", "scale", "change"
# The edit's streams in which frames pass the UNet that are no keyframes, if not cond alone.
EVALUATED = {Guidance.EVERY_FRAME: (UNCOND, COND), Guidance.ALONE: ()}


@dataclass(frozen=True)
class Step:
    """One step of an edit: its keyframes (k,), and which of them each frame of the video blends.

    key_streams, streams: in which keyframes and other frames pass the UNet.
    memory: (N, 4, h, w), what the step before left for this one, if the guidance needs it.
    """

    t: int
    alpha: float
    keyframes: torch.Tensor
    blend: Blend
    injects: tuple[bool, bool]  # the source's attention, its features
    guidance: Guidance
    key_streams: tuple[int, ...]
    streams: tuple[int, ...]
    memory: FrameArray | None

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
        self._finest = find_finest_self_attention(edit.sd.unet)

    def plan(self, step: int) -> list[tuple[Window, torch.Tensor]]:
        """Each chunk's window and frames (n,).

        In a window, the keyframes that need no propagation are a chunk of their own.
        """
        planned, chunks = self._plan_step(step), []
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
        planned, cache = self._plan_step(step, memory), self.tokenflow.cache
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
        self.strong = None
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

    def _plan_step(self, step: int, memory: FrameArray | None = None) -> Step:
        """What a step does. Without the memory that it needs, which was damaged, it evaluates more."""
        schedule, config = self.technique.schedule, self.config
        t, injects = schedule.timesteps[step], self.injects(step)
        frames, keyframes = torch.arange(self.source.n_frames), self._keyframes[t]
        if config.propagation == "previous":
            blend = previous_blend(frames, config.keyframe_interval)
        else:
            blend = flanking_blend(frames, keyframes)
        guidance = self.guidance[step]
        if guidance.needs_memory and memory is None:
            guidance = Guidance.KEYFRAMES
        source = () if self.source.features else (SOURCE,)
        return Step(
            t=t,
            alpha=schedule.alphas[step],
            keyframes=keyframes,
            blend=blend,
            injects=injects,
            guidance=guidance,
            key_streams=((SOURCE,) if any(injects) else source) + self.choose_streams(guidance),
            streams=source + EVALUATED.get(guidance, (COND,)),
            memory=memory,
        )

    def _edit_jointly(self, latents: Latents, planned: Step, joint: JointEdit) -> None:
        """Edit keyframes jointly, and put their guided noise into the cache, with what guides other frames.

        Where memory runs out, the streams pass one by one.
        """
        frames, streams = planned.keyframes[joint.edited], planned.key_streams
        joint.inject_attention, joint.inject_features = planned.injects
        joint.own_weight = self.config.own_token_weight
        self.tokenflow.task, edited = joint, latents[frames]

        def predict(n_streams: int) -> dict[int, torch.Tensor]:
            together = n_streams > 1
            return self.streams.predict_noise(edited, planned.t, frames, streams, together)

        n_streams = len(streams) if self._fit_together(edited, streams) else 1
        noise = Batches(n_streams, limits=self.sd.limits, kind="joint").fit(predict, n_streams)
        scale = self.find_scale(noise)
        if planned.guidance is Guidance.REUSED:
            difference = planned.memory[frames]
            guided = noise[COND] + difference
        else:
            guided, difference = guide_streams(noise, scale)
        maps = {NOISE: guided, DIFFERENCE: difference}
        if self.compares_prompts and planned.guidance is Guidance.EVERY_FRAME:
            maps[SCALE] = scale
        if planned.guidance is Guidance.ALONE:
            maps[CHANGE] = predict_x0(edited, guided, planned.alpha) - planned.memory[frames]
        for name, of_keyframes in maps.items():
            self.tokenflow.cache.write(name, joint.edited, of_keyframes)

    def _read_features(self, planned: Step, frames: torch.Tensor) -> SourceFeatures | None:
        """The source features of a chunk's frames (n,), if they are kept and needed."""
        if self.source.features is None or planned.done[frames].all():
            return None
        injects = planned.injects[1] and bool(planned.streams)
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
            inject_features=planned.injects[1],
            source=kept.select(slice(places[0], places[-1] + 1)) if kept else SourceFeatures(),
            along_flow=along_flow,
        )
        self.tokenflow.task, edited = task, latents[frames]
        together = self._fit_together(edited, planned.streams)
        noise = self.streams.predict_noise(edited, planned.t, frames, planned.streams, together)
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
                scale = self.config.guidance_scale
                if self.compares_prompts:
                    scale = self._propagate_map(SCALE, task).to(edited)
                return guide_streams(noise, scale)
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


def plan_keyframes(config: EditConfig, scheduler: DDIMScheduler, n_frames: int) -> KeyframeSchedule:
    """The keyframe schedule of an edit, which includes the steps that a technique skips."""
    timesteps = Schedule.of(scheduler, config.n_timesteps).timesteps
    return KeyframeSchedule(n_frames, config.keyframe_interval, timesteps, config.seed)
