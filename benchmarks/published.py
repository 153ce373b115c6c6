"""The published algorithm, straightforwardly written: what the speed benchmark compares with.

Attention head by head on keys and values repeated for every frame, whole similarity matrices, three
streams throughout and every keyframe evaluated twice. It computes what `propagation: previous` does.
"""

from collections.abc import Iterator
from functools import partial

import torch
from diffusers.models.attention_processor import Attention

from tokenflow.diffusion.ddim import sample
from tokenflow.diffusion.layouts import find_layout
from tokenflow.editing.denoise import Denoiser, Edit
from tokenflow_utils import (
    STREAMS,
    KeyframeSchedule,
    LayerProcessor,
    TokenFlow,
    replace_self_attentions,
)


class PublishedAttention(LayerProcessor):
    """Extended attention over the keyframes, or propagation from the last two of them."""

    def __init__(self, state: "Published", name: str) -> None:
        super().__init__(name)
        self.state = state
        self.injected = bool(state.injected.match(name))
        self.key_outputs: torch.Tensor | None = None  # 3 k s d

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """Input of the layer, (3n, s, d), to its output."""
        streams = hidden_states.unflatten(0, (3, -1))
        if self.state.chunk is None:
            return self._joint_edit(attn, streams).flatten(0, 1)
        return self._propagation(streams[0], self.state.chunk).flatten(0, 1)

    def _joint_edit(self, attn: Attention, streams: torch.Tensor) -> torch.Tensor:
        n_frames = streams.shape[1]
        queries, keys, values = attn.to_q(streams), attn.to_k(streams), attn.to_v(streams)
        if self.injected and self.state.inject_attention:
            queries, keys = (torch.stack([x[0]] * 3) for x in (queries, keys))
        outputs = [attend(queries[0], keys[0], values[0], attn.heads)]
        for stream in (1, 2):
            key, value = (
                x[stream].flatten(0, 1).repeat(n_frames, 1, 1) for x in (keys, values)
            )  # n ns d
            outputs.append(attend(queries[stream], key, value, attn.heads))
        self.key_tokens = streams[0]
        self.key_outputs = attn.to_out[0](torch.stack(outputs))
        return self.key_outputs

    def _propagation(self, source: torch.Tensor, chunk: int) -> torch.Tensor:
        n_frames, n_tokens, _ = source.shape
        tokens = source.flatten(0, 1)
        tokens = tokens / tokens.norm(dim=-1, keepdim=True)
        gathered = []
        for keyframe in (chunk, chunk - 1)[: 1 if chunk == 0 else 2]:
            keys = self.key_tokens[keyframe]
            similarity = tokens @ (keys / keys.norm(dim=-1, keepdim=True)).T  # ns s
            nearest = similarity.argmax(dim=-1)
            gathered.append(
                self.key_outputs[:, keyframe, nearest].unflatten(1, (n_frames, n_tokens))
            )
        if chunk == 0:
            return gathered[0]
        interval = self.state.interval
        frames = chunk * interval + torch.arange(n_frames)
        d_own = (frames - (chunk * interval + interval // 2)).abs()
        d_previous = (frames - ((chunk - 1) * interval + interval // 2)).abs()
        w = torch.sigmoid(d_previous / (d_own + d_previous)).to(source)[:, None, None]
        return w * gathered[0] + (1 - w) * gathered[1]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Multi-head attention (n, s, d), one head after the other."""
    outputs = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        scores = torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5
        outputs.append(torch.bmm(scores.softmax(dim=-1), v))
    return torch.cat(outputs, dim=-1)


class Published(Denoiser):
    """Predicts guided noise in one joint pass and one pass of three streams for each chunk."""

    def __init__(self, edit: Edit) -> None:
        super().__init__(edit, TokenFlow(STREAMS, True))
        timesteps, n_frames = edit.technique.schedule.timesteps, edit.source.n_frames
        self.interval, seed = edit.config.interval, edit.config.seed
        self.keyframes = KeyframeSchedule(n_frames, self.interval, timesteps, seed).draw()
        self.injected = find_layout(edit.sd.unet.config).injected_attention
        self.chunk: int | None = None  # None: the joint edit
        self.inject_attention = self.inject_features = False

    def predict_noise(
        self, latents: torch.Tensor, t: int, frames: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The guided noise (N, 4, h, w) of all frames' latents (N, 4, h, w) at timestep `t`."""
        self.inject_attention = t in self.attention_timesteps
        self.inject_features = t in self.feature_timesteps
        self.chunk = None
        self.guided_noise(latents, t, self.keyframes[t])
        noise = []
        for chunk, frames in enumerate(torch.arange(len(latents)).split(self.interval)):
            self.chunk = chunk
            noise.append(self.guided_noise(latents, t, frames))
        return torch.cat(noise)

    def feature_hook(self, module, args, output: torch.Tensor) -> torch.Tensor:
        """Give uncond and cond the source's features."""
        return torch.cat([output.chunk(3)[0]] * 3) if self.inject_features else output


def published_edit(edit: Edit) -> Iterator[torch.Tensor]:
    """As `editing.denoise.denoise`, in memory: yields the latents (N, 4, h, w) after each step."""
    published, frames = Published(edit), torch.arange(edit.source.n_frames)
    with replace_self_attentions(
        edit.sd.unet, partial(PublishedAttention, published), published.feature_hook
    ):
        initial, schedule = edit.technique.initial(frames), edit.technique.schedule
        yield from sample(initial, frames, schedule, published.predict_noise)
