"""Notes the source's features in the passes of an inversion, so that no edit need compute them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from source_store import SourceStore
from tokenflow_utils import (
    Blend,
    Keyframes,
    LayerProcessor,
    SourceFeatures,
    attention,
    correspondences,
    flanking_blend,
    output_projection,
    self_attentions_replaced,
)


class SourceRecorder:
    """What the layers of a UNet note of the frames that pass it, in passes of the source alone."""

    def __init__(self, keyframes: Keyframes, store: SourceStore) -> None:
        self.plan = keyframes.plan()
        self.n_frames, self.store = keyframes.n_frames, store
        self.n_keyframes = len(next(iter(self.plan.values())))
        # Of the pass: positions among the keyframes, or the blend of other frames; neither outside `noting`.
        self.positions: torch.Tensor | None = None
        self.blend: Blend | None = None
        self.nearest: dict[str, torch.Tensor] = {}
        self.features: torch.Tensor | None = None

    def in_order(self, t: int, frames: torch.Tensor) -> list[torch.Tensor]:
        """Positions of the frames (n,) in groups that may pass one after the other: keyframes first."""
        is_keyframe = torch.isin(frames, self.plan[t])
        groups = is_keyframe.nonzero().flatten(), (~is_keyframe).nonzero().flatten()
        return [group for group in groups if len(group)]

    @contextmanager
    def noting(self, t: int, frames: torch.Tensor) -> Iterator[None]:
        """Keep the features of the frames (n,) that pass the UNet in the block.

        Either all or none are keyframes of `t`; see `in_order`.
        """
        keyframes = self.plan[t]
        if torch.isin(frames, keyframes).all():
            self.positions = torch.searchsorted(keyframes, frames)
        else:
            self.blend = flanking_blend(frames, keyframes)
        yield
        if self.blend is not None:
            source = SourceFeatures(dict(self.nearest), self.features)
            self.store.write(t, frames, source, self.n_frames)
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
        blend, positions = self.recorder.blend, self.recorder.positions
        if blend is not None:
            nearest = correspondences(hidden_states, self.key_tokens, blend)
            self.recorder.nearest[self.name] = nearest
        elif positions is not None:
            tokens = F.normalize(hidden_states.float(), dim=-1)
            if self.key_tokens is None:
                shape = (self.recorder.n_keyframes, *tokens.shape[1:])
                self.key_tokens = tokens.new_empty(shape)
            self.key_tokens[positions] = tokens
        query, key, value = (
            project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        return output_projection(attn, attention(query, key, value, attn.heads))


@contextmanager
def install_recorder(
    unet: UNet2DConditionModel, keyframes: Keyframes, store: SourceStore
) -> Iterator[SourceRecorder]:
    """Let every self-attention of `unet` note the source's features, until the end of the block.

    Raises as `self_attentions_replaced` does.
    """
    recorder = SourceRecorder(keyframes, store)
    with self_attentions_replaced(
        unet, lambda name: RecordingAttention(recorder, name), recorder.feature_hook
    ):
        yield recorder
