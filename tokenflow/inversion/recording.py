"""Records source features in the UNet passes of an inversion, which evaluates the latents that it saves."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Self

import torch
from diffusers.models.attention_processor import Attention

from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.inversion.source_features import SourceFeatureFiles
from tokenflow.propagation.cache import BlendedRows, KeyframeCache
from tokenflow.propagation.keyframes import KeyframeSchedule
from tokenflow.runtime.ahead import WriteBehind
from tokenflow.runtime.batching import split_evenly
from tokenflow.runtime.frame_array import FrameArray
from tokenflow_utils import (
    LayerProcessor,
    SourceFeatures,
    find_correspondences,
    flanking_blend,
    frame_self_attention,
    replace_self_attentions,
)


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
        for position, tokens in zip(recorder.positions, hidden_states, strict=False):
            cache.write(self.name, [position], tokens[None])
        if recorder.blended:
            tokens, key_tokens = hidden_states[recorder.others], cache.tensor(self.name)
            nearest = find_correspondences(tokens, key_tokens, recorder.blended)
            recorder.features.nearest[self.name] = nearest
        return frame_self_attention(attn, hidden_states)


class RecordingPredictor:
    """Predicts noise as `predictor` does, and at the timesteps of a schedule keeps source features.

    Chunks pass in the order of `plan`, so that the keyframes that a frame blends pass before it. Frames that
    pass again are recorded again.
    schedule: of the keyframes; without it nothing is kept.
    writer: writes the features while later passes are computed.
    """

    def __init__(
        self,
        predictor: VideoNoisePredictor,
        schedule: KeyframeSchedule | None,
        files: SourceFeatureFiles,
        writer: WriteBehind,
    ) -> None:
        self.predictor, self.files, self.writer = predictor, files, writer
        self.keyframes = schedule.draw() if schedule else {}
        self.cache = KeyframeCache()  # of the keyframes that the begun chunk and the next may blend
        # Of the next pass: the positions of the keyframes that come first, and the frames that blend some.
        self.positions: list[int] = []
        self.others = slice(0)
        self.blended: BlendedRows | None = None
        self.features = SourceFeatures()

    @contextmanager
    def install(self) -> Iterator[Self]:
        """Record in every self-attention of the UNet, in all of its passes while the block lasts.

        Raises the errors of `replace_self_attentions`.
        """
        if not self.keyframes:
            yield self
            return
        with replace_self_attentions(
            self.predictor.sd.unet, partial(RecordingAttention, self), self._feature_hook
        ):
            yield self

    def arrays(self, t: int) -> list[FrameArray]:
        """The files that are written at a timestep."""
        return self.files.arrays(t) if t in self.keyframes else []

    def plan(self, t: int, n_frames: int, size: int) -> list[torch.Tensor]:
        """All frames in chunks of at most `size`, in the order in which they are to pass at timestep `t`."""
        self.cache.keep([])  # of the timestep before
        if t not in self.keyframes:
            return list(split_evenly(torch.arange(n_frames), size))
        return divide_by_keyframes(self.keyframes[t], n_frames, size)

    def begin(self, t: int, frames: torch.Tensor) -> list[torch.Tensor]:
        """What is to pass for a chunk of frames (n,): first the keyframes that it lacks, if any, then itself.

        It lacks those of the chunk before it if that did not pass, as when another process has it.
        """
        if t not in self.keyframes:
            return [frames]
        cache, keyframes = self.cache, self.keyframes[t]
        blended = flanking_blend(frames, keyframes).positions.unique().tolist()
        # Frames of the next chunk may still blend the keyframe before these.
        cache.keep([position for position in cache.positions if position >= blended[0] - 1])
        new = [position for position in blended if position not in cache.positions]
        cache.positions += new
        lacking = keyframes[new][~torch.isin(keyframes[new], frames)]
        return [lacking, frames] if len(lacking) else [frames]

    def __call__(self, latents: torch.Tensor, t: int, frames: torch.Tensor) -> torch.Tensor:
        """The noise (n, 4, h, w) in latents (n, 4, h, w) of frames (n,) of the chunk that was begun."""
        if t not in self.keyframes:
            return self.predictor(latents, t, frames)
        record = partial(self._predict_batch, t)
        return self.predictor.batches.map(record, latents, frames)

    def _predict_batch(self, t: int, latents: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        sd, keyframes, n = self.predictor.sd, self.keyframes[t], len(frames)
        n_keyframes = int(torch.isin(frames, keyframes).sum())
        others = frames[n_keyframes:]
        self.positions = torch.searchsorted(keyframes, frames[:n_keyframes]).tolist()
        if n_keyframes < n:
            blend, rows = flanking_blend(others, keyframes), self.cache.rows
            self.blended = BlendedRows.of(rows(blend.positions), blend.weights, sd.device, sd.dtype)
            self.others, self.features = slice(n_keyframes, n), SourceFeatures()
        try:
            noise = self.predictor.predict_batch(t, latents, frames)
            if self.blended:
                self.writer.later(self.files.write, t, others, self.features)
        finally:
            self.positions, self.blended = [], None  # until the next pass that is recorded
        return noise

    def _feature_hook(self, module, args, output: torch.Tensor) -> None:
        """Record the residual block's output of the frames that are no keyframes."""
        if self.blended:
            self.features.features = output[self.others].half()


def divide_by_keyframes(keyframes: torch.Tensor, n_frames: int, size: int) -> list[torch.Tensor]:
    """All frames in chunks of at most `size`, in which none comes before a keyframe (k,) that it blends.

    Within a chunk the keyframes come first.
    """
    # Each keyframe takes the place of the one before it, where the first frame that blends it follows.
    place = torch.arange(n_frames)
    place[keyframes] = torch.cat([torch.tensor([-1]), keyframes[:-1]])
    chunks = split_evenly(place.argsort(), size)
    is_first = [torch.isin(chunk, keyframes) for chunk in chunks]
    return [
        torch.cat([chunk[first], chunk[~first]])
        for chunk, first in zip(chunks, is_first, strict=True)
    ]
