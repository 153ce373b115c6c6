"""Source features: what edits need from the source stream, recorded in a reconstruction, kept on disk.

Keyframes do not depend on the prompt. Neither do the keyframe tokens that each frame takes (section 4.2)
or the features that Plug-and-Play injects. An edit that reads them denoises two streams instead of three.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from tokenflow.config import PreprocessConfig
from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.layouts import count_tokens, features_shape
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.propagation.cache import BlendedRows, KeyframeCache
from tokenflow.propagation.keyframes import KeyframeSchedule
from tokenflow.runtime.ahead import WriteBehind
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.transfer import to_device
from tokenflow_utils import (
    LayerProcessor,
    SourceFeatures,
    find_correspondences,
    flanking_blend,
    frame_self_attention,
    replace_self_attentions,
)

log = logging.getLogger("tokenflow")

MAX_TOKENS = 1 << 15  # of a frame, as indices have 16 bits


class RecordingAttention(LayerProcessor):
    """Plain self-attention that records keyframes' tokens, and other frames' correspondences to them."""

    def __init__(self, recorder: "RecordingPredictor", name: str) -> None:
        super().__init__(name)
        self.recorder = recorder

    @torch.compiler.disable
    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """The layer's output for its input; both (n, s, d)."""
        recorder, cache = self.recorder, self.recorder.cache
        n_keyframes = len(recorder.positions)
        if n_keyframes:
            cache.write(self.name, recorder.positions, hidden_states[:n_keyframes])
        if recorder.blended:
            searched = hidden_states[n_keyframes:], cache.tensor(self.name), recorder.blended
            recorder.nearest[self.name] = find_correspondences(*searched)
        return frame_self_attention(attn, hidden_states)


class RecordingPredictor:
    """Predicts the noise of a segment's frames as `predictor` does, and keeps their source features.

    Keyframes pass the UNet first, so that the others find their tokens; both may be in one batch. Frames may
    blend keyframes outside the segment, one on each side, which then pass the UNet too.
    saved: maps a timestep and frame indices (n,) to the latents (n, 4, h, w) that the inversion found.
    writer: writes the features while later passes are computed; without it each pass writes its own.
    """

    def __init__(
        self,
        predictor: VideoNoisePredictor,
        schedule: KeyframeSchedule,
        saved: Callable[[int, torch.Tensor], torch.Tensor],
        files: "SourceFeatureFiles",
        writer: WriteBehind | None = None,
    ) -> None:
        self.predictor, self.keyframes = predictor, schedule.draw()
        self.saved, self.files, self.writer = saved, files, writer
        self.cache = KeyframeCache()  # of the keyframes that a segment's frames blend
        # The next pass is of keyframes at `positions` and then, if `blended` is set, frames that blend some.
        self.positions: list[int] = []
        self.blended: BlendedRows | None = None
        self.nearest: dict[str, torch.Tensor] = {}
        self.features: torch.Tensor | None = None

    @contextmanager
    def install(self) -> Iterator[Self]:
        """Record in every self-attention of the UNet, in all of its passes while the block lasts.

        Raises the errors of `replace_self_attentions`.
        """
        with replace_self_attentions(
            self.predictor.sd.unet, partial(RecordingAttention, self), self._feature_hook
        ):
            yield self

    def __call__(self, latents: torch.Tensor, t: int, frames: torch.Tensor) -> torch.Tensor:
        """The noise (n, 4, h, w) in latents (n, 4, h, w) of frames (n,) that are neighbours in the video."""
        all_keyframes, sd = self.keyframes[t], self.predictor.sd
        keyframes = all_keyframes[flanking_blend(frames, all_keyframes).positions.unique()]
        passing = torch.cat([keyframes, frames[~torch.isin(frames, keyframes)]])
        inside = torch.isin(passing, frames)
        place = torch.searchsorted(frames, passing).clamp(max=len(frames) - 1)
        samples = latents[place]
        samples[~inside] = self.saved(t, passing[~inside]).to(latents)

        def predict(samples: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
            are_keyframes = numbers < len(keyframes)
            self.positions = numbers[are_keyframes].tolist()
            others = passing[numbers[~are_keyframes]]
            blend = flanking_blend(others, keyframes)
            blended = BlendedRows.of(
                self.cache.rows(blend.positions), blend.weights, sd.device, sd.dtype
            )
            self.blended = blended if len(others) else None
            noise = self.predictor.predict_batch(t, samples, passing[numbers])
            if self.blended:
                features = SourceFeatures(dict(self.nearest), self.features)
                if self.writer:
                    self.writer.later(self.files.write, t, others, features)
                else:
                    self.files.write(t, others, features)
            return noise

        self.cache.keep([])
        self.cache.positions += range(len(keyframes))
        predictions = self.predictor.batches.map(predict, samples, torch.arange(len(passing)))
        noise = torch.empty_like(latents)
        noise[place[inside]] = predictions[inside]
        return noise

    def _feature_hook(self, module, args, output: torch.Tensor) -> None:
        """Record the residual block's output of the frames that are no keyframes."""
        if self.blended:
            self.features = output[len(self.positions) :].half()


@dataclass(frozen=True)
class SourceFeatureFiles:
    """Source features of all frames at each timestep: `nearest_<t>.npy` and `features_<t>.npy`."""

    folder: Path

    def create(
        self, unet: UNet2DConditionModel, latent_shape: tuple[int, ...], timesteps: Iterable[int]
    ) -> None:
        """Create the files for latents (N, 4, h, w) at the timesteps, unless they exist."""
        tokens, n_frames = count_tokens(unet, latent_shape), latent_shape[0]
        of_features = features_shape(unet, latent_shape)
        for t in timesteps:
            self._nearest(t).ensure((n_frames, 2, sum(tokens.values())), torch.int16)
            self._features(t).ensure((n_frames, *of_features), torch.float16)
        (self.folder / "layers.json").write_text(json.dumps(tokens, indent=2) + "\n")

    def write(self, t: int, frames: torch.Tensor, source: SourceFeatures) -> None:
        """Write the features of the frames (n,)."""
        nearest = torch.cat([source.nearest[name] for name in self._layers], dim=-1)  # n 2 tokens
        self._nearest(t)[frames] = nearest.short()  # before it leaves the device
        self._features(t)[frames] = source.features

    def read(
        self, t: int, frames: torch.Tensor, injected: bool, device: torch.device
    ) -> SourceFeatures:
        """Read the features of the frames (n,); most bytes are for Plug-and-Play, read only if `injected`."""
        nearest = to_device(self._nearest(t)[frames], device).long()
        per_layer = nearest.split(list(self._layers.values()), dim=-1)
        features = to_device(self._features(t)[frames], device) if injected else None
        return SourceFeatures(dict(zip(self._layers, per_layer, strict=True)), features)

    def arrays(self, timesteps: Iterable[int]) -> list[FrameArray]:
        """All files of the timesteps."""
        return [file(t) for t in timesteps for file in (self._nearest, self._features)]

    @cached_property
    def _layers(self) -> dict[str, int]:
        return json.loads((self.folder / "layers.json").read_text())

    def _nearest(self, t: int) -> FrameArray:
        return FrameArray(self.folder / f"nearest_{t}.npy")

    def _features(self, t: int) -> FrameArray:
        return FrameArray(self.folder / f"features_{t}.npy")


def bytes_needed(unet: UNet2DConditionModel, latent_shape: tuple[int, ...], n_steps: int) -> int:
    """Bytes that a `SourceFeatureFiles` takes for latents (N, 4, h, w) at `n_steps` timesteps."""
    tokens = sum(count_tokens(unet, latent_shape).values())
    features = math.prod(features_shape(unet, latent_shape))
    return 2 * latent_shape[0] * n_steps * (2 * tokens + features)


def can_keep_source_features(
    sd: StableDiffusion,
    folder: Path,
    config: PreprocessConfig,
    latent_shape: tuple[int, ...],
    editing: Schedule,
) -> bool:
    """Whether source features are wanted and fit on the disk of `folder`; logs the space that they take."""
    if not config.keep_source or config.inversion != "fixed_point":
        return False  # sampling does not retrace the latents of a naive inversion
    needed = bytes_needed(sd.unet, latent_shape, len(editing.timesteps))
    problem = None
    if latent_shape[-2] * latent_shape[-1] > MAX_TOKENS:
        problem = "frames are too large"
    elif needed > shutil.disk_usage(folder).free:
        problem = f"they take {needed / 1e6:.0f} MB, more disk than is free"
    if problem:
        log.warning(
            "source features are not kept, because %s: edits will denoise the source too", problem
        )
        return False
    log.info("source features, which make edits faster, take %.0f MB of disk", needed / 1e6)
    return True
