"""Notes the source's features while a video is sampled back, so that no edit need compute them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from predictor import FramesPredictor
from source_store import SourceStore
from tokenflow_utils import (
    Blend,
    Keyframes,
    LayerProcessor,
    SourceFeatures,
    correspondences,
    flanking_blend,
    frame_self_attention,
    self_attentions_replaced,
)


class SourceRecorder:
    """What the layers of a UNet note of the frames of the next pass, if anything."""

    def __init__(self) -> None:
        self.keyframes = torch.empty(0)  # (k,), those that the frames of the segment blend
        # Positions among the keyframes, for passes of those; the blend of other frames; or neither.
        self.positions: torch.Tensor | None = None
        self.blend: Blend | None = None
        self.nearest: dict[str, torch.Tensor] = {}
        self.features: torch.Tensor | None = None

    @contextmanager
    def noting(self, frames: torch.Tensor) -> Iterator[None]:
        """Note the features of the frames (n,) that pass the UNet in the block: all keyframes, or none."""
        if torch.isin(frames, self.keyframes).all():
            self.positions = torch.searchsorted(self.keyframes, frames)
        else:
            self.blend = flanking_blend(frames, self.keyframes)
        try:
            yield
        finally:
            self.positions, self.blend = None, None

    def feature_hook(self, module, args, output: torch.Tensor) -> None:
        """Note the residual block's output."""
        self.features = output.half()


class RecordingAttention(LayerProcessor):
    """Plain self-attention that notes the keyframes' tokens, and which of them other frames take."""

    def __init__(self, recorder: SourceRecorder, name: str) -> None:
        super().__init__(name)
        self.recorder = recorder

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """Input of the layer, (n, s, d), to its output."""
        recorder = self.recorder
        if recorder.blend is not None:
            nearest = correspondences(hidden_states, self.key_tokens, recorder.blend)
            recorder.nearest[self.name] = nearest
        elif recorder.positions is not None:
            tokens = F.normalize(hidden_states.float(), dim=-1)
            shape = (len(recorder.keyframes), *tokens.shape[1:])
            if self.key_tokens is None or self.key_tokens.shape != shape:
                self.key_tokens = tokens.new_empty(shape)
            self.key_tokens[recorder.positions] = tokens
        return frame_self_attention(attn, hidden_states)


class RecordingPredictor:
    """Predicts the noise of a segment's frames as `predictor` does, and keeps their source features.

    Keyframes that lie outside the segment are looked at too: two for each step, one on each side.
    saved: for a timestep and frame indices (n,), the latents (n, 4, h, w) that the inversion found.
    """

    def __init__(
        self,
        predictor: FramesPredictor,
        recorder: SourceRecorder,
        keyframes: Keyframes,
        saved: Callable[[int, torch.Tensor], torch.Tensor],
        store: SourceStore,
    ) -> None:
        self.predictor, self.recorder = predictor, recorder
        self.plan, self.saved, self.store = keyframes.plan(), saved, store

    def __call__(self, latents: torch.Tensor, t: int, frames: torch.Tensor) -> torch.Tensor:
        """The noise (n, 4, h, w) in latents (n, 4, h, w) of the frames (n,), neighbours in the video."""
        blend = flanking_blend(frames, self.plan[t])
        keyframes = self.plan[t][blend.keyframes.unique()]
        self.recorder.keyframes = keyframes
        position = torch.searchsorted(frames, keyframes).clamp(max=len(frames) - 1)
        inside = frames[position] == keyframes
        of_keyframes = self.saved(t, keyframes).to(latents)
        of_keyframes[inside] = latents[position[inside]]

        def predict(samples: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
            def noted(batch: torch.Tensor) -> torch.Tensor:
                with self.recorder.noting(which[batch]):
                    noise = self.predictor.predict_batch(samples[batch], t, which[batch])
                source = SourceFeatures(dict(self.recorder.nearest), self.recorder.features)
                if which is not keyframes:
                    self.store.write(t, which[batch], source)
                return noise

            return self.predictor.batches.map(noted, torch.arange(len(which)))

        noise = torch.empty_like(latents)
        noise[position[inside]] = predict(of_keyframes, keyframes)[inside]
        rest = ~torch.isin(frames, keyframes)
        if rest.any():
            noise[rest] = predict(latents[rest], frames[rest])
        return noise


@contextmanager
def install_recorder(unet: UNet2DConditionModel) -> Iterator[SourceRecorder]:
    """Let every self-attention of `unet` note what passes, where the recorder says so.

    Raises as `self_attentions_replaced` does.
    """
    recorder = SourceRecorder()
    with self_attentions_replaced(
        unet, lambda name: RecordingAttention(recorder, name), recorder.feature_hook
    ):
        yield recorder
