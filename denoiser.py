"""One step of an edit: a joint pass over the keyframes, then propagation to every frame.

A technique is its initial latents, a schedule, how long the source is injected, and a ControlNet's
condition; nothing here knows which technique it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter

import torch
from diffusers import DDIMScheduler

from batches import Batches, balanced
from config import EditConfig
from diffusion import Control, Schedule, StableDiffusion
from rows import Rows
from techniques import Technique
from tokenflow_utils import (
    COND,
    SOURCE,
    STREAMS,
    UNCOND,
    Blend,
    JointEdit,
    Keyframes,
    SourceFeatures,
    TokenFlow,
    flanking_blend,
    previous_blend,
)
from windows import Window, anchors, windows

FILLED_CPU, FILLED_GPU = 1 << 12, 1 << 15  # latent pixels

# Of all frames' latents, those of some frames (n,): (n, 4, h, w). A tensor or a file.
Latents = torch.Tensor | Rows


@dataclass(frozen=True)
class Source:
    """What an inversion knows of the source video.

    latents: the inverted latents (n, 4, h, w) of a timestep for frame indices (n,).
    features: for frames that are no keyframes, likewise, what propagation needs of the source stream;
    without it that stream is denoised along with the others.
    """

    latents: Callable[[int, torch.Tensor], torch.Tensor]
    features: Callable[[int, torch.Tensor], SourceFeatures] | None = None


class Denoiser:
    """Predicts the guided noise of a video's frames at one timestep, in passes of some streams."""

    def __init__(
        self,
        sd: StableDiffusion,
        flow: TokenFlow,
        technique: Technique,
        source: Source,
        prompts: tuple[str, str, str],
        config: EditConfig,
    ) -> None:
        self.sd, self.flow, self.config = sd, flow, config
        self.technique, self.source = technique, source
        self.batches = Batches(config.frames_at_once, adapts=config.batch_size is None)
        self.text = torch.cat([sd.encode_text(prompt) for prompt in prompts])  # 3 l d
        timesteps = technique.schedule.timesteps
        self.attention_timesteps = frozenset(timesteps[: technique.attention_steps])
        self.feature_timesteps = frozenset(timesteps[: technique.feature_steps])

    def chunks(self, t: int) -> list:
        """The frames of the video in chunks that processes may share; neighbours belong together."""
        return list(balanced(torch.arange(self.technique.n_frames), self.config.frames_at_once))

    def noise(
        self, latents: Latents, t: int, chunks: list
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For some of the `chunks`, one by one: frames (n,) and their guided noise (n, 4, h, w)."""
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

        passes: which streams go through the UNet together; SOURCE may be in none.
        """
        controls = self.technique.control(frames) if self.technique.control else None
        edited, noise = latents[frames], {}
        for streams in passes:
            self.flow.streams = streams
            source = self.source.latents(t, frames).to(edited) if SOURCE in streams else None
            samples = torch.cat([source if stream == SOURCE else edited for stream in streams])
            text = self.text[list(streams)].repeat_interleave(len(frames), dim=0)
            control = Control.cat([controls[stream] for stream in streams]) if controls else None
            predicted = self.sd.predict_noise(samples, t, text, control)
            noise |= zip(streams, predicted.chunk(len(streams)), strict=True)
        return noise[UNCOND] + self.config.guidance_scale * (noise[COND] - noise[UNCOND])


class TokenFlowDenoiser(Denoiser):
    """Joint edit of random keyframes, window by window, and propagation to all other frames."""

    def chunks(self, t: int) -> list[tuple[Window, torch.Tensor]]:
        """Frames of one window each, and that window.

        Those that are done with the joint edit are a chunk of their own.
        """
        keyframes, blend = self._step(t)
        done, chunks = done_with_joint_edit(keyframes, blend), []
        for window in windows(blend, len(keyframes), self.config.keyframe_window):
            frames, is_done = window.frames, done[window.frames]
            parts = frames[is_done], *balanced(frames[~is_done], self.config.frames_at_once)
            chunks += [(window, part) for part in parts if len(part)]
        return chunks

    def noise(
        self, latents: Latents, t: int, chunks: list[tuple[Window, torch.Tensor]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For some of the `chunks`, one by one: frames (n,) and their guided noise (n, 4, h, w)."""
        keyframes, blend = self._step(t)
        done = done_with_joint_edit(keyframes, blend)
        # Guided noise (4, h, w) of the keyframes that the layers remember, by position, in their order.
        edited: dict[int, torch.Tensor] = {}
        for window, of_window in groupby(chunks, itemgetter(0)):
            edited = self._edit_window(latents, t, keyframes, window.keyframes, edited)
            rows = torch.full_like(keyframes, -1)
            rows[list(edited)] = torch.arange(len(edited))

            def propagated(frames: torch.Tensor, rows: torch.Tensor = rows) -> torch.Tensor:
                of_frames = blend.of(frames)
                remembered = Blend(rows[of_frames.keyframes], of_frames.weights)
                return self._propagate(latents, t, frames, remembered)

            for _, frames in of_window:
                if done[frames].all():
                    positions = blend.of(frames).whole.tolist()
                    yield frames, torch.stack([edited[position] for position in positions])
                else:
                    yield frames, self.batches.map(propagated, frames)

    def _edit_window(
        self,
        latents: Latents,
        t: int,
        keyframes: torch.Tensor,
        window: list[int],
        edited: dict[int, torch.Tensor],
    ) -> dict[int, torch.Tensor]:
        """Edit a window's keyframes but those `edited` before, and forget what it has no use for."""
        shared, boundaries = anchors(len(keyframes)), [[window[0]], [window[-1]]]
        groups = [window] if len(window) == len(keyframes) else [shared, *boundaries, window]
        useful = {*shared, window[0], window[-1]}
        kept = tuple(place for place, position in enumerate(edited) if position in useful)
        edited = {position: edited[position] for position in edited if position in useful}
        for group in groups:
            if not (positions := [position for position in group if position not in edited]):
                continue
            inner = group is window
            joint = JointEdit(
                inject_attention=t in self.attention_timesteps,
                inject_features=t in self.feature_timesteps,
                # Boundaries attend to the anchors alone, so that they are the same in both windows.
                context=len(edited) if inner else min(len(edited), len(shared)),
                kept=kept,
                as_context=not inner,
                propagates_source=self.config.propagation == "previous",
                finds_correspondences=self.source.features is None,
            )
            self.flow.begin_joint_edit(joint)
            frames = keyframes[positions]
            noise = self.guided_noise(latents, t, frames, self._passes(frames, latents, STREAMS))
            edited |= zip(positions, noise, strict=True)
            kept = tuple(range(len(edited)))
        return edited

    def _propagate(
        self, latents: Latents, t: int, frames: torch.Tensor, blend: Blend
    ) -> torch.Tensor:
        """Guided noise (n, 4, h, w) of the frames (n,), which blend what the layers remember."""
        source = self.source.features(t, frames) if self.source.features else None
        self.flow.begin_propagation(blend, t in self.feature_timesteps, source)
        passes = self._passes(frames, latents, (UNCOND, COND) if source else STREAMS)
        return self.guided_noise(latents, t, frames, passes)

    def _passes(
        self, frames: torch.Tensor, latents: Latents, streams: tuple[int, ...]
    ) -> tuple[tuple[int, ...], ...]:
        """The streams one by one where one has enough latent pixels for the device, else together."""
        pixels = len(frames) * latents.shape[-2] * latents.shape[-1]
        large = pixels >= filling_pixels(self.sd.device)
        return tuple((stream,) for stream in streams) if large else (streams,)

    def _step(self, t: int) -> tuple[torch.Tensor, Blend]:
        """The keyframes (k,) of a timestep, and which of them each frame blends."""
        keyframes, frames = self._plan[t], torch.arange(self.technique.n_frames)
        if self.config.propagation == "previous":
            return keyframes, previous_blend(frames, self.config.interval)
        return keyframes, flanking_blend(frames, keyframes)

    @cached_property
    def _plan(self) -> dict[int, torch.Tensor]:
        keyframes = keyframes_of(self.config, self.sd.scheduler, self.technique.n_frames)
        if self.config.propagation == "previous":  # the authors' code draws none at skipped steps
            keyframes = replace(keyframes, timesteps=self.technique.schedule.timesteps)
        return keyframes.plan()


def filling_pixels(device: torch.device) -> int:
    """Latent pixels in one pass from which on more of them are hardly faster, only larger."""
    return FILLED_CPU if device.type == "cpu" else FILLED_GPU


def done_with_joint_edit(keyframes: torch.Tensor, blend: Blend) -> torch.Tensor:
    """Which frames of the video, bool (N,), are among the `keyframes` (k,) and take themselves whole."""
    whole = blend.whole
    return (whole >= 0) & (keyframes[whole] == torch.arange(len(whole)))


def keyframes_of(config: EditConfig, scheduler: DDIMScheduler, n_frames: int) -> Keyframes:
    """The keyframes of an edit; steps that a technique skips have theirs too."""
    timesteps = Schedule.of(scheduler, config.n_timesteps).timesteps
    return Keyframes(n_frames, config.interval, timesteps, config.seed)
