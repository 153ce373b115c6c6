"""TokenFlow: joint editing of keyframes and propagation of their tokens to all other frames.

The algorithm of Geyer et al., TokenFlow (ICLR 2024, arXiv 2307.10373):

    for each timestep, the noisiest first:
        keyframes = one random frame of each interval              propagation.keyframes
        pass the keyframes through the UNet, and in every self-attention:
            source: each frame attends to itself                   attention
            the edit: each frame attends to all keyframes          extended_attention
            remember the source's inputs and the edit's outputs    KeyframeCache
        pass all other frames through the UNet, and in every self-attention:
            source: find each token in two keyframes               flanking_blend, find_correspondences
            the edit: blend the outputs of those tokens            propagate
        noise = uncond + guidance_scale * (cond - uncond)          editing.guidance
        latents = one DDIM step along the noise                    diffusion.ddim.ddim_step

In the first steps Plug-and-Play gives the edit the source's queries, keys and features. Pure tensor functions
come first in this file; then `install_tokenflow` puts them into a diffusers UNet.

Streams: the source, and the edit under the negative prompt (uncond) and under the prompt (cond).
Shapes: (n, s, d) = frames, tokens, channels of one stream.
Indices: a *frame* of the video, a *position* among a timestep's keyframes, a *row* of the cache.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from tokenflow.diffusion.layouts import find_layout
from tokenflow.propagation.cache import BlendedRows, KeyframeCache
from tokenflow.propagation.correspondences import FlowCorrespondences, find_correspondences

STREAMS = SOURCE, UNCOND, COND = 0, 1, 2


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multi-head attention of queries (b, q, d) over keys and values (b, k, d): (b, q, d).

    bias: (b, k), added to the logits of each key.
    """
    query, key, value = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)
    )  # b heads tokens d/heads
    bias = None if bias is None else bias[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2)


def extended_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    own_weight: float = 1.0,
) -> torch.Tensor:
    """Self-attention of the joint edit (section 4.1): every frame attends to the tokens of all frames.

    query: (n, s, d). key, value: (m, s, d), of frames that were edited before and, last, of these n frames.
    All frames form one long sequence, so no key or value is repeated.
    own_weight: how often a frame's own tokens count. The paper's 1 averages away what differs between frames,
    such as textures that turn.
    """
    keys, values = (x.flatten(0, 1)[None] for x in (key, value))  # 1 ms d
    if own_weight == 1:
        return attention(query.flatten(0, 1)[None], keys, values, heads).view_as(query)
    n_frames, n_tokens, _ = query.shape
    bias = query.new_zeros(n_frames, len(key), n_tokens)
    bias.diagonal(len(key) - n_frames)[:] = math.log(own_weight)
    keys, values = (x.expand(n_frames, -1, -1) for x in (keys, values))  # views: n ms d
    return attention(query, keys, values, heads, bias.flatten(1))


@dataclass(frozen=True)
class Blend:
    """The two keyframes that each frame blends: their positions (n, 2) and their weights (n, 2).

    The weights of a frame sum to 1. If the second is 0, the frame takes the first keyframe alone.
    """

    positions: torch.Tensor
    weights: torch.Tensor

    @property
    def whole(self) -> torch.Tensor:
        """The position of the keyframe that a frame takes alone, or -1 if it blends two: (n,)."""
        return torch.where(self.weights[:, 0] == 1, self.positions[:, 0], -1)


def flanking_blend(frames: torch.Tensor, keyframes: torch.Tensor) -> Blend:
    """The paper's blend (section 4.2): the nearest keyframe on each side, weighted by closeness.

    A keyframe takes itself alone. A frame outside the outermost keyframes takes the nearer of them alone.
    `frames` (n,) and `keyframes` (k,), ascending, are indices in the video.
    """
    last = len(keyframes) - 1
    right = torch.searchsorted(keyframes, frames).clamp(max=last)  # the first at or after the frame
    left = (torch.searchsorted(keyframes, frames, right=True) - 1).clamp(min=0)  # the last up to it
    d_left, d_right = (frames - keyframes[left]).abs(), (frames - keyframes[right]).abs()
    w_left = torch.where(left == right, 1.0, d_right / (d_left + d_right).clamp(min=1))
    return Blend(torch.stack([left, right], dim=1), torch.stack([w_left, 1 - w_left], dim=1))


def previous_blend(frames: torch.Tensor, interval: int) -> Blend:
    """The blend of the authors' code: the keyframes of the frame's own interval and of the previous one.

    The weights are a sigmoid of the distances to the intervals' midpoints. Frames of the first interval
    take its keyframe alone.
    """
    own = frames // interval
    previous = (own - 1).clamp(min=0)
    d_own = (frames - own * interval - interval // 2).abs()
    d_previous = (frames - (own - 1) * interval - interval // 2).abs()
    w_own = torch.where(own == 0, 1.0, torch.sigmoid(d_previous / (d_own + d_previous)))
    return Blend(torch.stack([own, previous], dim=1), torch.stack([w_own, 1 - w_own], dim=1))


def propagate(
    key_outputs: torch.Tensor, nearest: torch.Tensor, blended: BlendedRows
) -> torch.Tensor:
    """Propagate the keyframes' self-attention outputs (k, s, d) to n frames (equation 4): (n, s, d).

    nearest: (n, 2, s), from `find_correspondences` with the same rows and weights.
    """
    n_tokens, sequence = key_outputs.shape[1], key_outputs.flatten(0, 1)  # of all keyframes' tokens
    tokens = nearest + n_tokens * blended.rows[..., None]  # n 2 s
    first, second = (
        sequence.index_select(0, tokens[:, side].flatten()).unflatten(0, (-1, n_tokens))
        for side in (0, 1)
    )  # n s d
    return first.lerp_(second, blended.weights[:, 1, None, None])


@dataclass
class SourceFeatures:
    """What propagation to n frames needs from the source stream at one timestep.

    It is found when the source passes, or was kept with an inversion; then no source need pass.
    nearest: the correspondences (n, 2, s) of each self-attention layer, by its name.
    features: (n, c, h, w), injected into the residual block by Plug-and-Play; None without injection.
    """

    nearest: dict[str, torch.Tensor] = field(default_factory=dict)
    features: torch.Tensor | None = None

    def select(self, frames: slice) -> "SourceFeatures":
        """Those of some of the n frames, as views."""
        features = None if self.features is None else self.features[frames]
        return SourceFeatures({name: of[frames] for name, of in self.nearest.items()}, features)


@dataclass
class JointEdit:
    """What UNet passes do that edit keyframes jointly and put them into the cache.

    edited: the keyframes' positions. attended: earlier keyframes to which these attend too.
    attended_later: whether later ones attend to these.
    extended: without it each keyframe is edited by itself, as a baseline for comparisons.
    own_weight: how often a keyframe's own tokens count in extended attention.
    attention: the source's queries and keys of injected layers, for the streams that pass after the source.
    """

    edited: Sequence[int]
    attended: Sequence[int] = ()
    attended_later: bool = False
    inject_attention: bool = False
    inject_features: bool = False
    extended: bool = True
    own_weight: float = 1.0
    source: SourceFeatures = field(default_factory=SourceFeatures)
    attention: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


@dataclass
class Propagation:
    """What UNet passes do in which frames take the outputs of the cached keyframes that they blend.

    along_flow: for each number of tokens, where the optical flow leads, if tokens follow it.
    """

    blended: BlendedRows
    inject_features: bool = False
    source: SourceFeatures = field(default_factory=SourceFeatures)
    along_flow: Mapping[int, FlowCorrespondences] = field(default_factory=dict)


class TokenFlow:
    """What the layers of one UNet do in its next pass, and what they remember between passes.

    A pass takes all streams or some of them. If streams pass one by one, the source comes first.
    task: what the passes do until another one is set.
    propagated: the streams whose outputs are remembered and propagated. The authors' code propagates in the
    source too; otherwise the source's frames attend to themselves, as in its inversion.
    finds_correspondences: whether the keyframes' source tokens are remembered, to be searched.
    """

    def __init__(self, propagated: Sequence[int], finds_correspondences: bool) -> None:
        self.propagated, self.finds_correspondences = propagated, finds_correspondences
        self.cache = KeyframeCache()
        self.streams: tuple[int, ...] = SOURCE, UNCOND, COND  # of the next pass, ascending
        self.task: JointEdit | Propagation | None = None

    def split(self, tensor: torch.Tensor) -> dict[int, torch.Tensor]:
        """Split a tensor of the pass (streams x n, ...) into one (n, ...) for each stream."""
        return dict(zip(self.streams, tensor.chunk(len(self.streams)), strict=True))

    def inject_features(self, module, args, output: torch.Tensor) -> torch.Tensor | None:
        """Give the edit the source's features (Plug-and-Play)."""
        if not self.task.inject_features:
            return None
        source = self.task.source
        if SOURCE in self.streams:
            source.features = self.split(output)[SOURCE]
        return source.features.to(output).repeat(len(self.streams), 1, 1, 1)


class LayerProcessor:
    """Attention processor of one self-attention layer."""

    def __init__(self, name: str) -> None:
        self.name = name


class TokenFlowAttention(LayerProcessor):
    """Edits keyframes jointly or propagates, as the task of the `TokenFlow` says."""

    def __init__(self, tokenflow: TokenFlow, name: str, injected: bool = False) -> None:
        super().__init__(name)
        self.tokenflow, self.injected = tokenflow, injected

    @torch.compiler.disable  # it depends on what passed before
    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """The layer's output for its input, the output of `norm1`; both (streams x n, s, d)."""
        if isinstance(self.tokenflow.task, JointEdit):
            return self._edit_jointly(attn, hidden_states, self.tokenflow.task)
        return self._propagate(attn, hidden_states, self.tokenflow.task)

    def _edit_jointly(
        self, attn: Attention, hidden_states: torch.Tensor, task: JointEdit
    ) -> torch.Tensor:
        tokenflow, cache = self.tokenflow, self.tokenflow.cache
        query, key, value = (
            tokenflow.split(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )  # each n s d, by stream
        if self.injected and task.inject_attention:
            self._inject_attention(query, key, task)
        outputs = []
        for stream in tokenflow.streams:
            if stream == SOURCE or not task.extended:
                outputs.append(attention(query[stream], key[stream], value[stream], attn.heads))
            else:
                keys = self._join_attended("keys", stream, key[stream], task)
                values = self._join_attended("values", stream, value[stream], task)
                outputs.append(
                    extended_attention(query[stream], keys, values, attn.heads, task.own_weight)
                )
        output = project_output(attn, torch.cat(outputs))
        if SOURCE in tokenflow.streams and tokenflow.finds_correspondences:
            cache.write((self.name, "tokens"), task.edited, tokenflow.split(hidden_states)[SOURCE])
        for stream, of_stream in tokenflow.split(output).items():
            if stream in tokenflow.propagated:
                cache.write((self.name, "outputs", stream), task.edited, of_stream)
        return output

    def _inject_attention(
        self, query: dict[int, torch.Tensor], key: dict[int, torch.Tensor], task: JointEdit
    ) -> None:
        """Give all streams the source's queries and keys (Plug-and-Play)."""
        source = (query[SOURCE], key[SOURCE]) if SOURCE in query else task.attention[self.name]
        if COND not in query:
            task.attention[self.name] = source
        for stream in query:
            query[stream], key[stream] = source

    def _join_attended(
        self, kind: str, stream: int, new: torch.Tensor, task: JointEdit
    ) -> torch.Tensor:
        """The keys or values of the attended keyframes, followed by the `new` ones (n, s, d)."""
        name, cache = (self.name, kind, stream), self.tokenflow.cache
        attended = cache.read(name, task.attended)
        if task.attended_later:
            cache.write(name, task.edited, new)
        return torch.stack([*attended, *new]) if attended else new

    def _propagate(
        self, attn: Attention, hidden_states: torch.Tensor, task: Propagation
    ) -> torch.Tensor:
        tokenflow, cache, name = self.tokenflow, self.tokenflow.cache, self.name
        tokens, nearest = tokenflow.split(hidden_states), task.source.nearest
        along_flow = task.along_flow.get(hidden_states.shape[1])
        if SOURCE in tokens:
            key_tokens = cache.tensor((name, "tokens"))
            if along_flow:
                nearest[name] = along_flow.find(tokens[SOURCE], key_tokens)
            else:
                nearest[name] = find_correspondences(tokens[SOURCE], key_tokens, task.blended)
        elif along_flow:
            nearest[name] = along_flow.complete(nearest[name])
        outputs = []
        for stream in tokenflow.streams:
            if stream in tokenflow.propagated:
                key_outputs = cache.tensor((name, "outputs", stream))
                outputs.append(propagate(key_outputs, nearest[name], task.blended))
            else:
                outputs.append(frame_self_attention(attn, tokens[stream]))
        return torch.cat(outputs)


def frame_self_attention(attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """The layer's output (n, s, d) without TokenFlow: each frame attends to itself."""
    output = attention(attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens), attn.heads)
    return project_output(attn, output)


def project_output(attn: Attention, output: torch.Tensor) -> torch.Tensor:
    """The layer's output (..., d) for the output of its attention heads."""
    projection, dropout = attn.to_out
    return dropout(projection(output))


@contextmanager
def install_tokenflow(
    unet: UNet2DConditionModel,
    propagated: Sequence[int] = (UNCOND, COND),
    finds_correspondences: bool = True,
) -> Iterator[TokenFlow]:
    """Install TokenFlow in every self-attention of `unet`, and take it out again at the end.

    Yields the `TokenFlow` that controls the next pass; its class explains the arguments. A pass takes
    its streams concatenated: (streams x n, 4, h, w). Raises the errors of `replace_self_attentions`.
    """
    tokenflow = TokenFlow(propagated, finds_correspondences)
    injected = find_layout(unet.config).injected_attention

    def make_processor(name: str) -> TokenFlowAttention:
        return TokenFlowAttention(tokenflow, name, bool(injected.match(name)))

    with replace_self_attentions(unet, make_processor, tokenflow.inject_features):
        yield tokenflow


@contextmanager
def replace_self_attentions(
    unet: UNet2DConditionModel,
    make_processor: Callable[[str], LayerProcessor],
    feature_hook: Callable,
) -> Iterator[None]:
    """Replace the processor of every self-attention and hook into the injected residual block.

    Raises UserError if the UNet is of no known layout, and RuntimeError if TokenFlow is already installed
    or, in the next pass, if something else has replaced a processor. In every case the UNet is restored.
    """
    before = dict(unet.attn_processors)
    if any(isinstance(processor, LayerProcessor) for processor in before.values()):
        raise RuntimeError("TokenFlow is already installed in this UNet")
    block, resnet = find_layout(unet.config).injected_resnet
    names = [name for name in before if name.endswith(".attn1.processor")]
    ours = {name: make_processor(name) for name in names}
    layers = [unet.get_submodule(name.removesuffix(".processor")) for name in names]

    def check(module, args) -> None:
        if any(layer.processor is not ours[n] for n, layer in zip(names, layers, strict=True)):
            raise RuntimeError(
                "TokenFlow's attention was replaced while it was installed in this UNet; switch xformers, "
                "attention slicing and other attention processors before that"
            )

    convolution = unet.up_blocks[block].resnets[resnet].conv2
    hooks = [
        convolution.register_forward_hook(torch.compiler.disable(feature_hook)),
        unet.register_forward_pre_hook(torch.compiler.disable(check)),
    ]
    try:
        unet.set_attn_processor(before | ours)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        unet.set_attn_processor(dict(before))  # a copy, because the setter empties its argument
